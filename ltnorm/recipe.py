"""A recipe is everything that defines a run: YAML, flags and `--set` merged and validated.

Precedence: defaults < recipe file < flag < `--set key=value`. Validation reports all mistakes
at once, each with its dotted path. Paths are not part of a recipe, so that the `recipe.yaml`
that lies beside a result repeats the run anywhere.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from ltnorm import registry
from ltnorm.errors import UsageError, did_you_mean


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) else value  # YAML reads 2024 as a number


Fraction = Annotated[float, Field(ge=0, le=1)]
Tag = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9._+-]+$", max_length=64), BeforeValidator(_number_as_text)
]
RandomSeed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """A part of the recipe; unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NamedSection(Section):
    """A part that names an entry of the registry; the entry's options stand beside the name."""

    model_config = ConfigDict(extra="allow")
    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The options of the named entry, all of them, defaults filled in."""
        return dict(self.__pydantic_extra__ or {})


class Dataset(NamedSection):
    """Which images: the source and how its classes are cut to a long tail."""

    name: str = "synthetic"
    profile: Literal["exp", "step", "pareto"] = "exp"
    ratio: Annotated[float, Field(ge=1)] = 100.0
    n_max: PositiveInt | None = None
    val: NonNegativeInt = 0
    class_order: Literal["label", "reversed", "seeded"] = "label"
    data_seed: RandomSeed = 0


class Model(NamedSection):
    """The backbone."""

    name: str = "resnet32"


class Norm(NamedSection):
    """The normalization layer, with the options of its training objective."""

    name: str = "bn"


class Loss(NamedSection):
    """The training loss."""

    name: str = "ce"


class Train(Section):
    """Optimization, schedule, augmentation and precision; the defaults are LDAM-DRW's."""

    epochs: PositiveInt = 200
    batch_size: Annotated[int, Field(ge=2)] = 128
    lr: PositiveFloat = 0.1
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 2e-4
    schedule: Literal["step", "cosine"] = "step"
    warmup_epochs: NonNegativeInt = 5
    milestones: tuple[Fraction, ...] = (0.8, 0.9)
    decay: PositiveFloat = 0.01
    crop_padding: NonNegativeInt = 4
    flip: bool = True
    cutout: NonNegativeInt = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"


class Evaluation(Section):
    """What is measured, and how classes are grouped in the report.

    `every` N also measures the accuracy after each N epochs, into epochs.csv; nothing is ever
    chosen by it. 0 measures at the end only.
    """

    split: Literal["test", "val"] = "test"
    groups: Literal["auto", "shots", "thirds"] = "auto"
    every: NonNegativeInt = 0


class Recipe(Section):
    """One run, whole. Build it with `validate` or `resolve`, which fill in every option."""

    dataset: Dataset = Dataset()
    model: Model = Model()
    norm: Norm = Norm()
    loss: Loss = Loss()
    train: Train = Train()
    eval: Evaluation = Evaluation()
    tag: Tag | None = None
    seed: RandomSeed = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:(0|[1-9]\d?))?)$")] = "auto"

    def settings(self) -> dict[str, Any]:
        """What identifies the experiment: all but the seed, the device and how often it looks."""
        apart = {"seed": True, "device": True, "eval": {"every"}}
        return self.model_dump(mode="json", exclude=apart)

    def fingerprint(self) -> str:
        """A hash of `settings()`: runs with the same one differ by seed alone."""
        canonical = json.dumps(self.settings(), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved recipe; `ltnorm train --recipe` on it repeats the run."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def validate(data: Mapping[str, Any]) -> Recipe:
    """Build a recipe from nested mappings.

    Raises:
        UsageError: with every mistake and its dotted path in one message.
    """
    mistakes: list[Mistake] = []
    recipe = _validate(data, mistakes)
    if recipe is None:
        raise _report(mistakes)
    return recipe


def _validate(
    data: Mapping[str, Any],
    mistakes: "list[Mistake]",
    kinds: Iterable[str] = tuple(registry.TABLES),
) -> Recipe | None:
    """The recipe, or None and at least one more mistake.

    The options of the sections not in `kinds` are left as they are: looking them up can mean to
    import torch.
    """
    before = len(mistakes)
    filled = dict(data)
    for kind in kinds:
        section = data.get(kind, {})
        if isinstance(section, Mapping):
            filled[kind] = _fill_options(kind, section, mistakes)
    recipe = _collect(Recipe, filled, "", mistakes)
    if recipe and recipe.eval.split == "val" and recipe.dataset.val == 0:
        text = "'val' needs held-out images: set dataset.val (--val N) above 0"
        mistakes.append(Mistake("eval.split", text))
    if recipe and recipe.train.nesterov and recipe.train.momentum == 0:
        mistakes.append(Mistake("train.nesterov", "needs train.momentum above 0"))
    return recipe if len(mistakes) == before else None


@dataclass(frozen=True)
class Mistake:
    """One mistake in a recipe: where, what, and perhaps how to mend it."""

    path: str
    text: str
    hint: str = ""


def _report(mistakes: Sequence[Mistake]) -> UsageError:
    listed = "; ".join(f"{m.path}: {m.text}" for m in mistakes)
    hints = list(dict.fromkeys(m.hint for m in mistakes if m.hint))
    hint = "; ".join(hints) or "see `ltnorm list recipes` for valid ones, or the README"
    count = f"{len(mistakes)} mistakes in the recipe: " if len(mistakes) > 1 else ""
    return UsageError(count + listed, hint)


def _collect(model: type[BaseModel], data: Any, prefix: str, mistakes: list[Mistake]) -> Any | None:
    """Validate `data`; on failure add what pydantic found to `mistakes`."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            path = ".".join([*([prefix] if prefix else []), *(str(p) for p in item["loc"])])
            if item["type"] == "extra_forbidden":
                known = _fields_at(model, item["loc"][:-1])
                hint = did_you_mean(str(item["loc"][-1]), known)
                mistakes.append(Mistake(path, "unknown key", hint))
            else:
                text = item["msg"][0].lower() + item["msg"][1:]
                mistakes.append(Mistake(path, f"{text}, got {item['input']!r}"))
    return None


def _fields_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    for part in location:
        annotation = model.model_fields[part].annotation
        assert annotation is not None
        model = annotation
    return list(model.model_fields)


def _common_fields(kind: str) -> set[str]:
    section = Recipe.model_fields[kind].annotation
    assert section is not None
    return set(section.model_fields)


def _fill_options(kind: str, section: Mapping, mistakes: list[Mistake]) -> dict[str, Any]:
    """The section with the options of its entry validated and their defaults filled in."""
    common = {k: v for k, v in section.items() if k in _common_fields(kind)}
    options = {k: v for k, v in section.items() if k not in common}
    name = common.get("name", Recipe.model_fields[kind].default.name)
    try:
        model = registry.options_model(kind, str(name))
    except UsageError as error:
        mistakes.append(Mistake(f"{kind}.name", error.message, error.hint))
        return common
    unknown = [k for k in options if k not in model.model_fields]
    known = [*(_common_fields(kind) - {"name"}), *model.model_fields]
    for key in unknown:
        text = f"unknown key ({kind} '{name}' has no such option)"
        mistakes.append(Mistake(f"{kind}.{key}", text, did_you_mean(str(key), sorted(known))))
    given = {k: v for k, v in options.items() if k not in unknown}
    filled = _collect(model, given, kind, mistakes)
    if filled is None:
        return common
    values = filled.model_dump()
    for target in registry.targets(kind, str(name)):
        if check := getattr(target, "check_options", None):
            mistakes.extend(Mistake(f"{kind}.{key}", text) for key, text in check(**values))
    return common | values


@dataclass
class Overrides:
    """What the command line says: flags by dotted path, `--set` items, norms and seeds."""

    flags: dict[str, Any] = field(default_factory=dict)
    sets: Sequence[str] = ()
    norms: Sequence[str] = ()
    seeds: Sequence[int] = ()


def resolve(
    base: Mapping[str, Any], overrides: Overrides, kinds: Iterable[str] = tuple(registry.TABLES)
) -> list[Recipe]:
    """The recipes of one command: each norm with each seed, seeds innermost.

    A `--set norm.X=...` goes to those of the norms that have X; it is a mistake if none has.
    `kinds` are the sections whose options are checked and filled in.

    Raises:
        UsageError: with every mistake and its dotted path in one message.
    """
    sets = [_parse_set(item) for item in overrides.sets]
    # Names first: they decide which options a section has.
    sets.sort(key=lambda item: not item[0].endswith(".name"))
    named = [str(value) for key, value in sets if key == "norm.name"]
    seeds = [value for key, value in sets if key == "seed"] or list(overrides.seeds)
    default = str(_section(base, "norm").get("name", "bn"))
    norms = list(dict.fromkeys(named or overrides.norms)) or [default]
    sets = [(key, value) for key, value in sets if key not in ("norm.name", "seed")]

    mistakes: list[Mistake] = []
    known = [norm for norm in norms if _is_known(norm, mistakes)]
    _check_norm_options(sets, known, mistakes)
    recipes: list[Recipe | None] = []
    for norm in known or ["bn"]:
        data = _merge(base, norm, overrides.flags, sets)
        wanted = seeds or [data.get("seed", 0)]
        for seed in (s for i, s in enumerate(wanted) if s not in wanted[:i]):
            recipes.append(_validate(data | {"seed": seed}, mistakes, kinds))
    if mistakes:
        raise _report(list(dict.fromkeys(mistakes)))
    return [recipe for recipe in recipes if recipe]


def _merge(
    base: Mapping[str, Any],
    norm: str,
    flags: Mapping[str, Any],
    sets: Iterable[tuple[str, Any]],
) -> dict[str, Any]:
    """The recipe of one norm as nested mappings: base < flags < sets."""
    data: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in base.items()}
    _put(data, "norm.name", norm)
    for key, value in flags.items():
        _put(data, key, value)
    for key, value in sets:
        if not key.startswith("norm.") or _has_option(norm, key.removeprefix("norm.")):
            _put(data, key, value)
    return data


def _is_known(norm: str, mistakes: list[Mistake]) -> bool:
    try:
        registry.lookup("norm", norm)
    except UsageError as error:
        mistakes.append(Mistake("norm.name", error.message, error.hint))
        return False
    return True


def _section(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = data.get(key)
    return section if isinstance(section, Mapping) else {}


def _parse_set(item: str) -> tuple[str, Any]:
    key, equals, value = item.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {item}: not key=value", "for example --set train.lr=0.2")
    if key.strip() in Recipe.model_fields and key.strip() not in ("tag", "seed", "device"):
        raise UsageError(
            f"--set {item}: '{key.strip()}' is a section",
            f"set one of its keys: {key.strip()}.KEY=...",
        )
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(
            f"--set {item}: the value is not YAML", "quote it, for example --set 'tag=\"a b\"'"
        ) from error


def _has_option(norm: str, option: str) -> bool:
    return option in registry.options_model("norm", norm).model_fields


def _check_norm_options(
    sets: Iterable[tuple[str, Any]], norms: Sequence[str], mistakes: list[Mistake]
) -> None:
    for key, _ in sets:
        option = key.removeprefix("norm.")
        if not norms or option == key or any(_has_option(n, option) for n in norms):
            continue
        known = sorted({o for n in norms for o in registry.options_model("norm", n).model_fields})
        text = f"none of the norms ({', '.join(norms)}) has an option '{option}'"
        mistakes.append(Mistake(key, text, did_you_mean(option, known)))


def _put(data: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path; naming another entry of a section drops the options of the old one."""
    *parents, last = path.split(".")
    node = data
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UsageError(f"{path}: '{parent}' is not a section", "see `ltnorm list recipes`")
        node = child
    section = parents[0] if parents else ""
    if last == "name" and section in registry.TABLES and node.get("name", value) != value:
        for key in set(node) - _common_fields(section):
            del node[key]
    node[last] = value


def recipes_folder() -> Path:
    """Where the shipped recipes lie: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    installed = here / "recipes"
    return installed if installed.is_dir() else here.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes, name -> file."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}


def read(name_or_path: str) -> dict[str, Any]:
    """The mapping in a recipe, shipped (by name) or the user's own (by path); not validated."""
    shipped = shipped_recipes()
    path = Path(name_or_path)
    if name_or_path in shipped:
        path = shipped[name_or_path]
    elif path.is_dir() and (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    elif not path.is_file():
        raise UsageError(
            f"no recipe '{name_or_path}': neither a shipped one nor a file",
            did_you_mean(name_or_path, shipped),
        )
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise UsageError(
            f"{path}: not readable as YAML{line}",
            "a recipe is a YAML mapping; see recipes/quick.yaml",
        ) from error
    if not isinstance(data, dict) or not all(isinstance(k, str) for k in data):
        raise UsageError(
            f"{path}: not a mapping of sections", "a recipe starts like `train: {epochs: 10}`"
        )
    return data


def summary(path: Path) -> str:
    """The first comment line of a recipe: what it is."""
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()
