"""Checking a recipe: every mistake is found at once, and told with its dotted path."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ltnorm import registry
from ltnorm.errors import UsageError, did_you_mean
from ltnorm.recipe import (
    BUDGETS,
    TAU_METHODS,
    Dataset,
    Loss,
    Model,
    NamedSection,
    Norm,
    Recipe,
    Retrain,
    Sampler,
    Train,
)

# The sections that name an entry of the registry, by their path.
NAMED: Mapping[str, type[NamedSection]] = {
    "dataset": Dataset,
    "model": Model,
    "norm": Norm,
    "loss": Loss,
    "sampler": Sampler,
    "retrain.sampler": Sampler,
    "retrain.loss": Loss,
}
DEFAULT_NAMES: Mapping[str, str] = {
    path: (Retrain if "." in path else Recipe).model_fields[path.split(".")[-1]].default.name
    for path in NAMED
}
KINDS = tuple(registry.TABLES)
# Keys of `train` that only some values of another key use.
USED_WITH: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "momentum": ("optimizer", ("sgd", "sam")),
    "nesterov": ("optimizer", ("sgd", "sam")),
    "betas": ("optimizer", ("adamw",)),
    "sam_rho": ("optimizer", ("sam",)),
    "milestones": ("schedule", ("step",)),
    "decay": ("schedule", ("step",)),
    "crop_padding": ("crop", ("auto", "padded")),
    "crop_scale": ("crop", ("auto", "resized")),
}


@dataclass(frozen=True)
class Mistake:
    """One mistake in a recipe: where, what, and perhaps how to mend it."""

    path: str
    text: str
    hint: str = ""


def validate(data: Mapping[str, Any]) -> Recipe:
    """Build a recipe from nested mappings.

    Raises:
        UsageError: with every mistake and its dotted path in one message.
    """
    mistakes: list[Mistake] = []
    recipe = try_validate(data, mistakes)
    if recipe is None:
        raise report(mistakes)
    return recipe


def try_validate(
    data: Mapping[str, Any], mistakes: list[Mistake], kinds: Iterable[str] = KINDS
) -> Recipe | None:
    """The recipe, or None and at least one more mistake.

    The options of sections whose kind is not in `kinds` are left as they are: looking them up can
    mean to import torch.
    """
    before = len(mistakes)
    filled = {k: dict(v) if isinstance(v, Mapping) else v for k, v in data.items()}
    for path, section in NAMED.items():
        if section.kind in kinds:
            _fill(filled, path, mistakes)
    recipe = _collect(Recipe, filled, "", mistakes)
    if recipe:
        mistakes.extend(_conflicts(recipe))
    return recipe if len(mistakes) == before else None


def _fill(data: dict[str, Any], path: str, mistakes: list[Mistake]) -> None:
    """Validate and fill in the options of the entry that the section at `path` names."""
    *parents, last = path.split(".")
    for parent in parents:
        data = data.get(parent)  # a copy of the user's, one level down
    if not isinstance(data, dict) or not isinstance(data.get(last, {}), Mapping):
        return  # left to the validation of the whole
    data[last] = _fill_options(path, data.get(last, {}), mistakes)


def _conflicts(recipe: Recipe) -> Iterator[Mistake]:
    """What is right by itself and wrong together, or without effect: a second name of one run."""
    train, dataset = recipe.train, recipe.dataset
    own_splits = "cache_size" in dataset.options  # sets of files, of which one may be val
    if recipe.eval.split == "val" and dataset.val == 0 and not own_splits:
        text = "'val' needs held-out images: set dataset.val (--val N) above 0"
        yield Mistake("eval.split", text)
    for key, unset in (("ratio", None), ("n_max", None), ("class_order", "label")):
        if dataset.profile == "natural" and getattr(dataset, key) != unset:
            hint = "leave it out, or impose a profile with --ratio"
            yield Mistake(f"dataset.{key}", "has no effect with profile natural", hint)
    if dataset.profile != "natural" and dataset.ratio is None:
        yield Mistake("dataset.ratio", f"profile {dataset.profile} needs one")
    if given := [key for key in BUDGETS if getattr(train, key) is not None][1:]:
        text = f"one budget is enough: epochs, steps or seconds, not {' and '.join(given)} as well"
        yield Mistake(f"train.{given[0]}", text)
    if train.nesterov and train.momentum == 0:
        yield Mistake("train.nesterov", "needs train.momentum above 0")
    if train.epochs and train.warmup != Train.model_fields["warmup"].default:
        text = "is of a budget of steps or seconds; of epochs it is train.warmup_epochs"
        yield Mistake("train.warmup", text)
    if recipe.norm.name == "bn" and recipe.norm.layers != "all":
        yield Mistake("norm.layers", "has no effect with bn, which the other layers are as well")
    for key, (chosen, needed) in USED_WITH.items():
        changed = getattr(train, key) != Train.model_fields[key].default
        if changed and getattr(train, chosen) not in needed:
            text = f"has no effect with {chosen} {getattr(train, chosen)}"
            yield Mistake(f"train.{key}", text)
    unit = "steps" if train.steps else "epochs"
    yield from _loss_conflicts("loss", recipe.loss, getattr(train, unit), unit)
    if recipe.retrain:
        epochs = recipe.retrain.epochs
        yield from _loss_conflicts("retrain.loss", recipe.retrain.loss, epochs, "epochs")
        yield from _retrain_conflicts(recipe, recipe.retrain)


def _loss_conflicts(path: str, loss: Loss, budget: int | None, unit: str) -> Iterator[Mistake]:
    if loss.name not in registry.LOSSES:
        return
    own = registry.lookup("loss", loss.name).weights
    if own != "none" and loss.weights not in ("auto", own):
        text = f"{loss.name} is defined with {own} weights, not {loss.weights}"
        yield Mistake(f"{path}.weights", text, f"--loss ce with {path}.weights={loss.weights}")
    if loss.class_weights == "none" and loss.schedule == "drw":
        text = f"{path}.weights=none leaves nothing to defer"
        yield Mistake(f"{path}.schedule", text, f"leave out {path}.weights, or set it to effective")
    if loss.schedule == "drw" and budget and loss.drw_start > (budget - 1) / budget + 1e-9:
        text = f"of {budget} {unit} none starts after {loss.drw_start:.0%} of the training"
        yield Mistake(f"{path}.drw_start", text, f"raise --{unit}, or lower the start")
    for key, needed in (
        ("drw_start", loss.schedule == "drw"),
        ("beta", loss.class_weights == "effective"),
    ):
        if not needed and getattr(loss, key) != Loss.model_fields[key].default:
            what = "schedule=drw" if key == "drw_start" else "effective weights"
            yield Mistake(f"{path}.{key}", f"has an effect only with {what}")


def _retrain_conflicts(recipe: Recipe, retrain: Retrain) -> Iterator[Mistake]:
    cosine = _is_cosine(recipe.loss)
    if cosine and retrain.method not in ("crt", "ncm"):
        text = f"{retrain.method} needs weights with a norm and a bias: {recipe.loss.name} has none"
        yield Mistake("retrain.method", text, "crt and ncm are for a cosine classifier, too")
    if _is_cosine(retrain.loss) and not cosine:
        text = f"{retrain.loss.name} needs a cosine classifier, the first stage has a linear one"
        yield Mistake("retrain.loss.name", text, "choose another loss for the second stage")
    elif cosine and _is_cosine(retrain.loss):
        scale = recipe.loss.options["scale"]
        if retrain.loss.options["scale"] != scale:
            text = f"the first stage's cosine classifier has a scale of {scale:g}"
            yield Mistake("retrain.loss.scale", text, f"retrain.loss.scale={scale:g}")
    yield from _tau_conflicts(recipe, retrain)
    for key in () if retrain.trains else ("norm", "epochs", "lr", "sampler", "loss"):
        value, default = getattr(retrain, key), Retrain.model_fields[key].default
        if isinstance(value, NamedSection):
            value, default = (value.name, value.changes()), (default.name, "")
        if value != default:
            yield Mistake(f"retrain.{key}", f"has no effect: {retrain.method} does not train")


def _tau_conflicts(recipe: Recipe, retrain: Retrain) -> Iterator[Mistake]:
    if retrain.method not in TAU_METHODS:
        if retrain.tau is not None:
            yield Mistake("retrain.tau", f"has an effect only with {' and '.join(TAU_METHODS)}")
    elif retrain.tau is None and recipe.dataset.val == 0:
        text = "tau is tuned on validation images, and there are none"
        yield Mistake("retrain.tau", text, "give it (retrain.tau=1), or hold out images: --val N")
    elif retrain.tau is None and recipe.eval.split == "val":
        text = "tau would be tuned on the very images that are evaluated"
        yield Mistake("retrain.tau", text, "give it (retrain.tau=1), or evaluate on the test set")


def _is_cosine(loss: Loss) -> bool:
    return loss.name in registry.LOSSES and registry.lookup("loss", loss.name).cosine


def report(mistakes: Sequence[Mistake]) -> UsageError:
    """The one error for all mistakes."""
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
            elif item["type"] == "missing":
                mistakes.append(Mistake(path, "is needed", f"see {path} in docs/training.md"))
            else:
                text = item["msg"][0].lower() + item["msg"][1:]
                choices = re.findall(r"'([^']*)'", item.get("ctx", {}).get("expected", ""))
                hint = did_you_mean(str(item["input"]), choices) if choices else ""
                mistakes.append(Mistake(path, f"{text}, got {item['input']!r}", hint))
    return None


def _fields_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    for part in location:
        annotation = model.model_fields[part].annotation
        kinds = (annotation, *get_args(annotation))
        model = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return list(model.model_fields)


def common_fields(path: str, name: Any = None) -> set[str]:
    """The keys that the section at `path` has whatever entry it names.

    If it is known that it names `bn`, without `layers`: those beside a norm are `bn` anyway.
    """
    fields = set(NAMED[path].model_fields)
    return fields - {"layers"} if (path, name) == ("norm", "bn") else fields


def _fill_options(path: str, section: Mapping, mistakes: list[Mistake]) -> dict[str, Any]:
    """The section with the options of its entry validated and their defaults filled in."""
    kind = NAMED[path].kind
    common = {k: v for k, v in section.items() if k in common_fields(path)}
    options = {k: v for k, v in section.items() if k not in common}
    common.setdefault("name", DEFAULT_NAMES[path])
    name = str(common["name"])
    try:
        model = registry.options_model(kind, name)
    except UsageError as error:
        mistakes.append(Mistake(f"{path}.name", error.message, error.hint))
        return common
    unknown = [k for k in options if k not in model.model_fields]
    known = [*(common_fields(path) - {"name"}), *model.model_fields]
    for key in unknown:
        text = f"unknown key ({kind} '{name}' has no such option)"
        mistakes.append(Mistake(f"{path}.{key}", text, did_you_mean(str(key), sorted(known))))
    given = {k: v for k, v in options.items() if k not in unknown}
    filled = _collect(model, given, path, mistakes)
    if filled is None:
        return common
    values = filled.model_dump()
    for target in registry.targets(kind, name):
        if check := getattr(target, "check_options", None):
            mistakes.extend(Mistake(f"{path}.{key}", text) for key, text in check(**values))
    return common | values
