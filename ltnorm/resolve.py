"""From a recipe file and a command line to the recipes of its runs.

Precedence: defaults < recipe file < flag < `--set key=value`.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ltnorm import registry
from ltnorm.errors import UsageError, did_you_mean
from ltnorm.recipe import BUDGETS, Recipe
from ltnorm.validation import KINDS, NAMED, Mistake, common_fields, report, try_validate

# How the classes of a data set are cut.
CUT = ("profile", "ratio", "n_max", "class_order")
VOIDING = ("dataset.profile", "dataset.ratio", "dataset.n_max")


@dataclass
class Overrides:
    """What the command line says: flags by dotted path, `--set` items, norms and seeds."""

    flags: dict[str, Any] = field(default_factory=dict)
    sets: Sequence[str] = ()
    norms: Sequence[str] = ()
    seeds: Sequence[int] = ()


def resolve(
    base: Mapping[str, Any], overrides: Overrides, kinds: Iterable[str] = KINDS
) -> list[Recipe]:
    """The recipes of one command: each norm with each seed, seeds innermost.

    A `--set norm.X=...` goes to those of the norms that have X; it is a mistake if none has.
    `kinds` are the sections whose options are checked and filled in.

    Raises:
        UsageError: with every mistake and its dotted path in one message.
    """
    mistakes: list[Mistake] = []
    recipes = try_resolve(base, overrides, mistakes, kinds)
    if mistakes:
        raise report(list(dict.fromkeys(mistakes)))
    return recipes


def try_resolve(
    base: Mapping[str, Any],
    overrides: Overrides,
    mistakes: list[Mistake],
    kinds: Iterable[str] = KINDS,
) -> list[Recipe]:
    """The recipes of `resolve` that can be, and what is wrong with the others, in `mistakes`.

    Raises:
        UsageError: a `--set` that cannot be read.
    """
    sets = [parse_set(item) for item in overrides.sets]
    named = [str(value) for key, value in sets if key == "norm.name"]
    seeds = [value for key, value in sets if key == "seed"] or list(overrides.seeds)
    default = str(_section(base, "norm").get("name", "bn"))
    norms = list(dict.fromkeys(named or overrides.norms)) or [default]
    sets = [(key, value) for key, value in sets if key not in ("norm.name", "seed")]

    typed = {**overrides.flags, **dict(sets)}
    if typed.get("dataset.profile") == "natural" and typed.get("dataset.ratio") is not None:
        hint = "leave out one of the two"
        mistakes.append(Mistake("dataset.ratio", "has no effect with profile natural", hint))
    for given in (dict(sets), overrides.flags):
        if len(budgets := [k for k in BUDGETS if f"train.{k}" in given]) > 1:
            text = f"one budget is enough, not {' and '.join(budgets)}"
            mistakes.append(Mistake(f"train.{budgets[-1]}", text))
    known = [norm for norm in norms if _is_known(norm, mistakes)]
    _check_norm_options(sets, known, mistakes)
    recipes: list[Recipe | None] = []
    for norm in known or ["bn"]:
        data = _merge(base, norm, overrides.flags, sets)
        wanted = seeds or [data.get("seed", 0)]
        for seed in (s for i, s in enumerate(wanted) if s not in wanted[:i]):
            recipes.append(try_validate(data | {"seed": seed}, mistakes, kinds))
    return [recipe for recipe in recipes if recipe]


def _merge(
    base: Mapping[str, Any],
    norm: str,
    flags: Mapping[str, Any],
    sets: Iterable[tuple[str, Any]],
) -> dict[str, Any]:
    """The recipe of one norm as nested mappings: base < flags < sets."""
    data = copy.deepcopy(dict(base))
    _put(data, "norm.name", norm)
    for key, value in sorted([*flags.items(), *sets], key=_rank):
        if key in flags or not key.startswith("norm.") or _has_option(norm, key[len("norm.") :]):
            _put(data, key, value)
    return data


def _rank(item: tuple[str, Any]) -> int:
    """What makes other keys void comes before them; else the order is kept.

    A name decides which options a section has, a profile or ratio how a data set is cut.
    """
    key = item[0]
    return 0 if key.endswith(".name") else VOIDING.index(key) + 1 if key in VOIDING else 9


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


def parse_set(item: str) -> tuple[str, Any]:
    """The dotted path and the value of a `--set`.

    Raises:
        UsageError: it is not `key=value`, or names a section.
    """
    key, equals, value = item.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {item}: not key=value", "for example --set train.lr=0.2")
    plain = ("tag", "seed", "device", "workers")
    if key.strip() in Recipe.model_fields and key.strip() not in plain:
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
    return option in _options(norm)


def _options(norm: str) -> set[str]:
    """What can be set of a norm: its options, and what all norms have."""
    own = set(registry.options_model("norm", norm).model_fields)
    return own | (common_fields("norm", norm) - {"name"})


def _check_norm_options(
    sets: Iterable[tuple[str, Any]], norms: Sequence[str], mistakes: list[Mistake]
) -> None:
    for key, _ in sets:
        option = key.removeprefix("norm.")
        if not norms or option == key or any(_has_option(n, option) for n in norms):
            continue
        known = sorted({option for norm in norms for option in _options(norm)})
        text = f"none of the norms ({', '.join(norms)}) has an option '{option}'"
        mistakes.append(Mistake(key, text, did_you_mean(option, known)))


def _put(data: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path. What contradicts it from before goes.

    Naming another entry of a section drops the options of the old one, a budget drops the others.
    """
    *parents, last = path.split(".")
    node = data
    for parent in parents:
        child = node.get(parent)
        child = node[parent] = {} if child is None else child
        if not isinstance(child, dict):
            raise UsageError(f"{path}: '{parent}' is not a section", "see `ltnorm list recipes`")
        node = child
    section = ".".join(parents)
    if last == "name" and section in NAMED and node.get("name", value) != value:
        for key in set(node) - common_fields(section, value):
            del node[key]
    for key in _contradicted(section, last, value, node):
        node.pop(key, None)
    node[last] = value


def _contradicted(section: str, key: str, value: Any, node: Mapping[str, Any]) -> Sequence[str]:
    """The keys of a section that a new value of one of them makes void."""
    if section == "train" and key in BUDGETS:
        return BUDGETS
    if section != "dataset":
        return ()
    if key == "name" and _is_natural(value) != _is_natural(node.get("name")):
        return CUT
    if key == "profile" and value == "natural":
        return CUT
    return CUT if key in ("ratio", "n_max") and node.get("profile") == "natural" else ()


def _is_natural(name: Any) -> bool:
    entry = registry.DATASETS.get(name)
    return entry is not None and entry.natural


def recipes_folder() -> Path:
    """Where the shipped recipes lie: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    installed = here / "recipes"
    return installed if installed.is_dir() else here.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes, name -> file."""
    files = recipes_folder().glob("*.yaml")
    return {path.stem: path for path in sorted(files, key=lambda path: path.stem)}


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
