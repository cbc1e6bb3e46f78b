"""What a sweep asks for: axes of values, exclusions, and the recipe of each cell."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ltnorm import registry
from ltnorm.errors import UsageError, did_you_mean
from ltnorm.recipe import BUDGETS, Recipe
from ltnorm.resolve import Overrides, read, try_resolve
from ltnorm.validation import DEFAULT_NAMES, NAMED, Mistake, common_fields, report

# What the usual axes are called in short.
SHORT = {
    "dataset": "dataset.name",
    "ratio": "dataset.ratio",
    "model": "model.name",
    "norm": "norm.name",
    "loss": "loss.name",
    "sampler": "sampler.name",
}
NAMES = {path: short for short, path in SHORT.items()}
MANY = 100_000
TRAIN_BUDGETS = [f"train.{unit}" for unit in BUDGETS]
# What is no part of an experiment: see `Recipe.settings`.
APART = ("device", "workers", "eval.every")


class AllExcluded(UsageError):
    """Nothing is left of a sweep."""

    def __init__(self) -> None:
        super().__init__("every run of the grid is excluded", "see `exclude` of the sweep")


@dataclass
class Grid:
    """A grid of runs, and what all of them share; keys are dotted paths.

    Attributes:
        recipe: that runs start from, by name or path; None is that of the data set.
        axes: key -> values.
        fixed: key -> the value of all runs.
        exclusions: a cell that has one of the values of each key is left out.
        name: where it stands, among several.
    """

    recipe: str | None = None
    axes: dict[str, list[Any]] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    exclusions: list[dict[str, list[Any]]] = field(default_factory=list)
    name: str = ""

    def fix(self, key: str, value: Any) -> None:
        """Give all runs a value; what was said of the key before is void."""
        self._forget(path_of(key))
        self.fixed[path_of(key)] = value

    def vary(self, key: str, values: Any) -> None:
        """Make an axis of a key; what was said of it before is void.

        Raises:
            UsageError: no values, or no seeds.
        """
        path = path_of(key)
        values = _values(path, values)
        if not values or (None in values and path.endswith(".name")):
            raise UsageError(f"{short(path)}: an axis without values", "give a list, or leave out")
        if path in APART:
            text = "no axis: runs that differ in it alone are one"
            raise UsageError(f"{short(path)}: {text}", f"set it for all: --set {path}=...")
        self._forget(path)
        self.axes[path] = values

    def exclude(self, exclusion: Mapping[str, Any]) -> None:
        """Leave out the cells that have these values."""
        paths = {path_of(key): value for key, value in exclusion.items()}
        self.exclusions.append({path: _values(path, value) for path, value in paths.items()})

    def _forget(self, path: str) -> None:
        for old in TRAIN_BUDGETS if path in TRAIN_BUDGETS else [path]:
            self.axes.pop(old, None)
            self.fixed.pop(old, None)


@dataclass(frozen=True)
class Cell:
    """One run of a grid: the values of the axes that it has, and its recipe."""

    values: Mapping[str, Any]
    recipe: Recipe


def path_of(key: str) -> str:
    """The dotted path of a key, which can be a short name."""
    return SHORT.get(key, key)


def short(path: str) -> str:
    """What a key is called in short."""
    return NAMES.get(path, path)


def _values(path: str, values: Any) -> list[Any]:
    """The different values of an axis, seeds also as `0-4`."""
    values = values if isinstance(values, list) else [values]
    if path == "seed":
        from ltnorm.cli.options import parse_seeds

        parts = [[v] if type(v) is int else parse_seeds(str(v)) for v in values]
        values = [seed for part in parts for seed in part]
    return [value for i, value in enumerate(values) if value not in values[:i]]


def expand(grid: Grid) -> tuple[list[Cell], list[str]]:
    """The different runs of a grid, seeds innermost, and what the user should know.

    An option of a norm, a loss, ... is an axis of those that have it: the others run once.

    Raises:
        UsageError: with every mistake and its dotted path in one message; all cells are excluded.
    """
    size = 1
    for values in grid.axes.values():
        size *= len(values)
    if size > MANY:
        raise UsageError(f"a grid of {size:,} runs", f"at most {MANY:,}: make several sweeps")
    mistakes = list(_of_exclusions(grid))
    bases: dict[str, dict[str, Any]] = {}
    used: set[str] = set()
    matched = [False] * len(grid.exclusions)
    chosen: list[tuple[dict[str, Any], dict[str, Any], Mapping[str, Any]]] = []
    for values in _product(grid.axes):
        name = grid.recipe or _default_recipe(grid.fixed | values)
        base = bases[name] = bases.get(name) or read(name)
        whole = _applicable(grid.fixed | values, base)
        used |= whole.keys()
        values = {key: value for key, value in values.items() if key in whole}
        if not _excluded(values, grid.exclusions, matched):
            chosen.append((values, whole, base))
    mistakes += _unused(grid, used, bases.values())
    cells, wrong = _resolved(chosen)
    mistakes += _located(wrong, [values for values, _, _ in chosen])
    if mistakes:
        error = report(list(dict.fromkeys(mistakes)))
        raise UsageError(error.message.replace("in the recipe", "in the sweep"), error.hint)
    if not cells:
        raise AllExcluded
    idle = [e for e, m in zip(grid.exclusions, matched, strict=True) if not m]
    return cells, [f"exclude {_shown(exclusion)} matches no run" for exclusion in idle]


def expand_all(grids: Sequence[Grid]) -> tuple[list[Cell], list[str]]:
    """As `expand`, of several grids in their order; what they share, `plan` makes once.

    Raises:
        UsageError: what is wrong with the first of them that has mistakes; all cells of all of
            them are excluded.
    """
    cells: list[Cell] = []
    warnings: list[str] = []
    for grid in grids:
        where = f"{grid.name}: " if len(grids) > 1 and grid.name else ""
        try:
            found, told = expand(grid)
        except AllExcluded:
            found, told = [], ["every run is excluded"]
        except UsageError as error:
            raise UsageError(where + error.message, error.hint) from error
        cells += found
        warnings += [where + text for text in told]
    if not cells:
        raise AllExcluded
    return cells, warnings


def _product(axes: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    keys = sorted(axes, key=lambda key: key == "seed")
    for values in itertools.product(*(axes[key] for key in keys)):
        yield dict(zip(keys, values, strict=True))


def _default_recipe(values: Mapping[str, Any]) -> str:
    return registry.lookup("dataset", str(values.get("dataset.name", "synthetic"))).recipe


def _name(section: str, values: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Which entry of the registry a section names in a cell."""
    node: Any = base
    for part in section.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    of_base = node.get("name") if isinstance(node, Mapping) else None
    return str(values.get(f"{section}.name") or of_base or DEFAULT_NAMES[section])


def _options(section: str, name: str) -> Iterable[str]:
    """The options of an entry; of one that is unknown, which `resolve` tells of, none."""
    try:
        return registry.options_model(NAMED[section].kind, name).model_fields
    except UsageError:
        return ()


def _applicable(values: dict[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Of a cell's values those that its norm, loss, ... have."""
    kept = {}
    for path, value in values.items():
        section, _, key = path.rpartition(".")
        if section not in NAMED:
            kept[path] = value
            continue
        name = _name(section, values, base)
        if key in common_fields(section, name) or key in _options(section, name):
            kept[path] = value
    return kept


def _unused(grid: Grid, used: set[str], bases: Iterable[Mapping[str, Any]]) -> Iterator[Mistake]:
    """Options that none of the norms, losses, ... has."""
    for path in sorted({*grid.axes, *grid.fixed} - used):
        section, _, key = path.rpartition(".")
        kind = NAMED[section].kind
        fixed = grid.fixed.get(f"{section}.name")
        names = grid.axes.get(f"{section}.name") or [
            fixed or _name(section, {}, base) for base in bases
        ]
        names = list(dict.fromkeys(map(str, names)))
        known = sorted({option for name in names for option in _options(section, name)})
        if known or len(names) > 1:
            text = f"no {kind} of the sweep ({', '.join(names)}) has an option '{key}'"
            yield Mistake(path, text, did_you_mean(key, known) if known else "leave it out")
        else:
            yield Mistake(path, f"{kind} '{names[0]}' has no option '{key}'", "leave it out")


def _of_exclusions(grid: Grid) -> Iterator[Mistake]:
    known = [short(path) for path in grid.axes]
    for exclusion in grid.exclusions:
        for path in exclusion.keys() - grid.axes.keys():
            hint = did_you_mean(short(path), known)
            yield Mistake(f"exclude.{short(path)}", "no axis of the grid", hint)


def _excluded(
    values: Mapping[str, Any], exclusions: Sequence[Mapping[str, Sequence[Any]]], hit: list[bool]
) -> bool:
    """Whether a cell is left out; marks each exclusion that says so."""
    found = [
        all(k in values and _plain(values[k]) in map(_plain, some) for k, some in e.items())
        for e in exclusions
    ]
    hit[:] = [a or b for a, b in zip(hit, found, strict=True)]
    return any(found)


def _plain(value: Any) -> Any:
    """A value by which two are compared: to YAML, 2e-4 is text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Wrong = list[tuple[Mistake, Mapping[str, Any]]]


def _resolved(
    chosen: Sequence[tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]],
) -> tuple[list[Cell], Wrong]:
    """The different recipes of cells, and what is wrong in which of them."""
    cells: dict[tuple[str, int], Cell] = {}
    wrong: Wrong = []
    for values, whole, base in chosen:
        flags = dict(whole)
        norm, seed = flags.pop("norm.name", None), flags.pop("seed", None)
        norms = [] if norm is None else [str(norm)]
        found: list[Mistake] = []
        seeds = [] if seed is None else [seed]
        recipes = try_resolve(base, Overrides(flags, norms=norms, seeds=seeds), found)
        wrong += [(mistake, values) for mistake in found]
        for recipe in recipes if not found else ():
            cells.setdefault((recipe.fingerprint(), recipe.seed), Cell(values, recipe))
    return list(cells.values()), wrong


def _located(wrong: Wrong, all_: Sequence[Mapping[str, Any]]) -> Iterator[Mistake]:
    """Mistakes, with the values that the cells share which have one, if others do not."""
    for mistake in dict.fromkeys(mistake for mistake, _ in wrong):
        there = [values for other, values in wrong if other == mistake]
        shared = {
            key: value
            for key, value in there[0].items()
            if all(key in cell and cell[key] == value for cell in there)
            and any(cell.get(key) != value for cell in all_)
        }
        shared.pop(mistake.path, None)
        if len(there) == len(all_) or not shared:
            yield mistake
        else:
            text = f"{mistake.text} (where {_shown(shared)})"
            yield Mistake(mistake.path, text, mistake.hint or "exclude such runs, or leave it out")


def _shown(values: Mapping[str, Any]) -> str:
    parts = []
    for path, value in values.items():
        value = value if isinstance(value, list) else [value]
        parts.append(f"{short(path)}={','.join(map(str, value))}")
    return ", ".join(parts)
