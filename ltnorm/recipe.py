"""A recipe is everything that defines a run, in sections.

`ltnorm.validation` makes one of nested mappings, `ltnorm.resolve` of a file and a command line.
Paths are not part of a recipe, so that the `recipe.yaml` that lies beside a result repeats the
run anywhere.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from ltnorm import registry


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) else value  # YAML reads 2024 as a number


def _auto(value: Any) -> Any:
    return None if value == "auto" else value


def _schedule(value: Any) -> Any:
    return "step" if value == "multistep" else value  # torch's name for drops at milestones


def _jitter(value: Any) -> Any:
    """One strength is that of brightness, contrast and saturation; what is not given is 0."""
    if isinstance(value, int | float):
        value = (value, value, value)
    return (*value, *[0.0] * (4 - len(value))) if isinstance(value, list | tuple) else value


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("the smallest comes first")
    return pair


Fraction = Annotated[float, Field(ge=0, le=1)]
Area = Annotated[float, Field(gt=0, le=1)]
Hue = Annotated[float, Field(ge=0, le=0.5)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Tau = Annotated[float, Field(ge=0, le=100)]  # beyond, weights overflow
# Raised when the default of any option changes, or what an option means.
IDENTITY = 1
TRAINING_METHODS = ("crt", "lws")
TAU_METHODS = ("tau-norm", "logit-adjust")
BUDGETS = ("epochs", "steps", "seconds")
Tag = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9._+-]+$", max_length=64), BeforeValidator(_number_as_text)
]
RandomSeed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """A part of the recipe; unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NamedSection(Section):
    """A part that names an entry of the registry; the entry's options stand beside the name.

    `kind` is the table of the registry.
    """

    model_config = ConfigDict(extra="allow")
    kind: ClassVar[str]
    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The options of the named entry, all of them, defaults filled in."""
        return dict(self.__pydantic_extra__ or {})

    def changes(self) -> str:
        """What is not the default, as `--set` takes it: `components=3, dual_path=false`."""
        changed = _not_default(self, self.model_dump(mode="json"))
        del changed["name"]
        return ", ".join(
            f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in changed.items()
        )


class Dataset(NamedSection):
    """Which images: the source and how its classes are cut to a long tail.

    The profile `natural` cuts nothing. It is what data sets start from that are imbalanced by
    nature; where a ratio is asked of them, their most frequent class is the head.
    """

    kind = "dataset"
    name: str = "synthetic"
    profile: Literal["exp", "step", "pareto", "natural"] = "exp"
    ratio: Annotated[float, Field(ge=1)] | None = 100.0
    n_max: PositiveInt | None = None
    val: NonNegativeInt = 0
    class_order: Literal["label", "reversed", "seeded", "frequency"] = "label"
    data_seed: RandomSeed = 0

    @model_validator(mode="before")
    @classmethod
    def _as_it_is(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        entry = registry.DATASETS.get(data.get("name"))
        natural = entry is not None and entry.natural
        if "profile" not in data and natural and data.get("ratio") is None:
            data = {**data, "profile": "natural"}
        if data.get("profile") == "natural":
            return {"ratio": None} | data
        return {"class_order": "frequency"} | data if natural else data

    @property
    def title(self) -> str:
        """What the data set is called: a folder by its own name."""
        return self.options.get("title") or self.name

    @property
    def slug(self) -> str:
        """The title as a part of a file's name, and as different from others."""
        plain = re.sub(r"[^\w.+-]+", "-", self.title).strip("-.") or self.name
        plain = plain.encode()[:60].decode(errors="ignore")
        if plain == self.title:
            return plain
        return f"{plain}-{hashlib.sha256(self.title.encode()).hexdigest()[:4]}"

    @property
    def cut(self) -> str:
        """The profile and the ratio in a word, as `exp100`."""
        return self.profile + (f"{self.ratio:.12g}" if self.ratio is not None else "")


class Model(NamedSection):
    """The backbone.

    `weight_standardization` gives each filter of its convolutions mean 0 and variance 1 (Qiao et
    al. 2019, arXiv 1903.10520). `pretrained` is the sha256 of the file of weights that it starts
    from, which a run is given by `--pretrained FILE`.
    """

    kind = "model"
    name: str = "resnet32"
    weight_standardization: bool = False
    pretrained: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None


class Norm(NamedSection):
    """The normalization layer, with the options of its training objective.

    `layers` are those that it takes, the others being `bn`: the first alone, or the last ones, at
    the smallest height.
    """

    kind = "norm"
    name: str = "bn"
    layers: Literal["all", "first", "last"] = "all"


class Loss(NamedSection):
    """The training loss, and how classes are weighted in it.

    `weights` auto are the loss's own; with schedule drw (deferred re-weighting, arXiv 1906.07413)
    a loss that has none gets effective ones. Until `drw_start`, a fraction of the training, drw
    weights all classes alike. `beta` is of effective weights: (1 - beta) / (1 - beta^n).
    """

    kind = "loss"
    name: str = "ce"
    weights: Literal["auto", "none", "inverse", "effective"] = "auto"
    beta: Beta = 0.9999
    schedule: Literal["constant", "drw"] = "constant"
    drw_start: Annotated[float, Field(gt=0, lt=1)] = 0.8

    @model_validator(mode="after")
    def _one_identity(self) -> "Loss":
        if self.name in registry.LOSSES and self.weights == self._own_weights:
            object.__setattr__(self, "weights", "auto")
        return self

    @property
    def _own_weights(self) -> str:
        own = registry.lookup("loss", self.name).weights
        return "effective" if own == "none" and self.schedule == "drw" else own

    @property
    def class_weights(self) -> str:
        """The weights, with `auto` resolved: none, inverse or effective."""
        return self._own_weights if self.weights == "auto" else self.weights


class Sampler(NamedSection):
    """How often the images of each class are drawn in an epoch."""

    kind = "sampler"
    name: str = "instance"


class Train(Section):
    """Optimization, schedule, augmentation and precision; the defaults are LDAM-DRW's.

    The budget is one of `epochs`, `steps` and `seconds`. `milestones` are fractions of it, and so
    is the `warmup` of steps and seconds.

    `crop` padded takes a window of the image's own size from the image padded by `crop_padding`,
    resized takes a part of its area in `crop_scale`, as RandomResizedCrop; auto is padded, but
    resized where images stay files. `color_jitter` are the strengths of brightness, contrast,
    saturation and hue. `views` are how many times each image of a batch is in it, each time
    augmented anew.

    How it is computed: `compile` puts the model through torch.compile; `graph` replays a step as
    a CUDA graph; `stack` trains the seeds of a command together, step by step; `deterministic`
    has torch use no kernel whose result depends on the order of threads.
    """

    epochs: PositiveInt | None = None
    steps: PositiveInt | None = None
    seconds: PositiveFloat | None = None
    batch_size: Annotated[int, Field(ge=2)] = 128
    views: Annotated[int, Field(ge=1, le=16)] = 1
    optimizer: Literal["sgd", "adamw", "sam"] = "sgd"
    lr: PositiveFloat = 0.1
    momentum: Fraction = 0.9
    nesterov: bool = False
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    sam_rho: PositiveFloat = 0.05
    weight_decay: NonNegativeFloat = 2e-4
    decay_norm: bool = True
    clip_grad: PositiveFloat | None = None
    ema: Beta = 0.0
    schedule: Annotated[Literal["step", "cosine"], BeforeValidator(_schedule)] = "step"
    warmup_epochs: NonNegativeInt = 5
    warmup: Beta = 0.05
    milestones: Annotated[tuple[Fraction, ...], AfterValidator(lambda m: tuple(sorted(m)))] = (
        0.8,
        0.9,
    )
    decay: PositiveFloat = 0.01
    crop: Literal["auto", "padded", "resized"] = "auto"
    crop_padding: NonNegativeInt = 4
    crop_scale: Annotated[tuple[Area, Area], AfterValidator(_ascending)] = (0.08, 1.0)
    flip: bool = True
    color_jitter: Annotated[
        tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, Hue], BeforeValidator(_jitter)
    ] = (0.0, 0.0, 0.0, 0.0)
    cutout: NonNegativeInt = 0
    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
    auto_augment: Literal[
        "none", "cifar10", "imagenet", "svhn", "randaugment", "trivialaugment"
    ] = "none"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    graph: bool = False
    stack: bool = False
    deterministic: bool = False

    @model_validator(mode="before")
    @classmethod
    def _default_budget(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and all(data.get(key) is None for key in BUDGETS):
            return {**data, "epochs": 200}
        return data

    @property
    def images_per_step(self) -> int:
        """Of a whole batch, each as often as it has views."""
        return self.batch_size * self.views

    def cropped(self, files: bool) -> str:
        """How images are cropped, padded or resized, of a set of files or of pixels."""
        return self.crop if self.crop != "auto" else "resized" if files else "padded"


class Evaluation(Section):
    """What is measured, and how classes are grouped in the report.

    `every` N also measures the accuracy after each N epochs, into epochs.csv; nothing is ever
    chosen by it. 0 measures at the end only.
    """

    split: Literal["test", "val"] = "test"
    groups: Literal["auto", "shots", "thirds"] = "auto"
    every: NonNegativeInt = 0


class Retrain(Section):
    """A second stage: the classifier anew, everything before it as the first stage left it.

    crt, lws      trained for `epochs`, by SGD, cosine from `lr`, with the sampler and loss given
                  here; lws trains one factor a class (arXiv 1910.09217)
    tau-norm      weights w_c / |w_c|^tau, without a bias
    logit-adjust  bias b_c - tau log(n_c / N) (arXiv 2007.07314)
    ncm           the nearest class mean, by cosine

    A `tau` that is null, or auto, is tuned on validation images.
    `norm` is the norm layers' mode in crt and lws. frozen: evaluation, as they were left.
    shifted: batch statistics, and running statistics that go on, with weight and bias fixed
    (MiSLAS, arXiv 2104.00466). adapting: weight and bias are trained besides.
    """

    method: Literal["crt", "lws", "tau-norm", "logit-adjust", "ncm"]
    norm: Literal["frozen", "shifted", "adapting"] = "frozen"
    epochs: PositiveInt = 10
    lr: PositiveFloat = 0.1
    sampler: Sampler = Sampler(name="balanced")
    loss: Loss = Loss()
    tau: Annotated[Tau | None, BeforeValidator(_auto)] = None
    tag: Tag | None = None

    @property
    def trains(self) -> bool:
        """Whether the method trains, as opposed to computing the classifier."""
        return self.method in TRAINING_METHODS


class Recipe(Section):
    """One run, whole. `validate` and `resolve` fill in every option.

    `workers` are the processes that decode images which stay files; null is as many as the device
    leaves cores for.
    """

    dataset: Dataset = Dataset()
    model: Model = Model()
    norm: Norm = Norm()
    loss: Loss = Loss()
    sampler: Sampler = Sampler()
    train: Train = Train()
    retrain: Retrain | None = None
    eval: Evaluation = Evaluation()
    tag: Tag | None = None
    seed: RandomSeed = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:(0|[1-9]\d?))?)$")] = "auto"
    workers: Annotated[int, Field(ge=0, le=1024)] | None = None

    def settings(self) -> dict[str, Any]:
        """What identifies the experiment, in words: names, and all that is not the default.

        Without the seed, the device, the workers and how often it looks. Since a default is left
        out, an option that is added later changes no identity. Where a default changes, `IDENTITY`
        is raised, so that what ran with the old one is another experiment (tests/test_identity.py
        holds that).
        """
        apart: dict[str, Any] = dict.fromkeys(("seed", "device", "workers"), True)
        apart["eval"] = {"every"}
        if not self.train.epochs:
            apart["train"] = {"warmup_epochs"}  # of other budgets it is `warmup`
        named = {"identity": IDENTITY} if IDENTITY > 1 else {}
        return named | _not_default(self, self.model_dump(mode="json", exclude=apart))

    def fingerprint(self) -> str:
        """A hash of `settings()`: runs with the same one differ by seed alone."""
        canonical = json.dumps(self.settings(), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved recipe; `ltnorm train --recipe` on it repeats the run."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _not_default(section: Section, dumped: Mapping[str, Any]) -> dict[str, Any]:
    """Of a dumped section its name and what is not the default; empty parts are left out."""
    options: Mapping[str, Any] = {}
    if isinstance(section, NamedSection):
        options = registry.options_model(section.kind, section.name)().model_dump(mode="json")
    fields = type(section).model_fields
    kept: dict[str, Any] = {}
    for key, value in dumped.items():
        if key not in fields:  # an option of the named entry
            if value != options.get(key):
                kept[key] = value
        elif isinstance(part := getattr(section, key), Section):
            if rest := _not_default(part, value):
                kept[key] = rest
        elif key in ("name", "method") or getattr(section, key) != fields[key].default:
            kept[key] = value
    return kept
