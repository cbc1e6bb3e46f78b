"""Selecting runs by a condition: `--where 'ratio == 100 and norm.components == 3'`.

A name is a column of result.csv, or a dotted key of the recipe. Of a key the value is looked up in
the run's settings (what is not the default), then in its recipe.yaml, then among the defaults, for
a key that is younger than the run.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from ltnorm.errors import LtnormError, NothingFound, UsageError, did_you_mean
from ltnorm.recipe import Recipe, Retrain
from ltnorm.reporting import labels, schema
from ltnorm.reporting.condition import Condition, quoted
from ltnorm.reporting.schema import Run
from ltnorm.validation import NAMED

SHOWN = 8  # values in a hint
# Keys that runs of one fingerprint may differ in; all others of a recipe they share.
OWN = ("workers", "eval.every")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built
_MISSING = object()


def select(runs: Sequence[Run], condition: Condition) -> list[Run]:
    """The runs that a condition holds for, in their order.

    Raises:
        UsageError: an unknown name, or values of two kinds compared.
        NothingFound: it holds for none.
        LtnormError: a recipe that is needed is missing or damaged.
    """
    values = Values()
    known = known_names()
    if any(name not in known and _is_option(name) for name in condition.names):
        known |= values.options(runs)
    check(condition, known)
    chosen = [run for run in runs if condition(lambda name, run=run: values.of(run, name))]
    if not chosen:
        raise NothingFound(
            f"--where {condition.text}: none of {len(runs)} runs is like that",
            _what_there_is(condition, runs, values),
        )
    return chosen


def known_names() -> set[str]:
    """The columns of result.csv and the dotted keys of a recipe, without the options of entries."""
    return {*schema.COLUMNS, *labels.defaults()}


def check(condition: Condition, known: Iterable[str]) -> None:
    """Check the names of a condition before any run is looked at.

    Raises:
        UsageError: one that is not known; the hint has the nearest.
    """
    known = sorted(known)
    for name in sorted(condition.names.difference(known)):
        constants = {"true": "True", "false": "False", "null": "None", "none": "None"}
        if name in constants:
            raise UsageError(f"--where: '{name}' is not known", f"write {constants[name]}")
        message = f"--where: '{name}' is neither a column of result.csv nor a key of a run's recipe"
        if name in condition.unquoted:
            raise UsageError(message, f"text stands in quotes: {condition.unquoted[name]}")
        raise UsageError(message, did_you_mean(name, _near(name, known)))


class Values:
    """What names mean in runs. Each recipe is read once a setting, and only if it is needed."""

    def __init__(self) -> None:
        self._settings: dict[str, Mapping[str, Any]] = {}
        self._recipes: dict[str, Mapping[str, Any]] = {}
        self._defaults = {retrain: _defaults(retrain) for retrain in (False, True)}

    def of(self, run: Run, name: str) -> Any:
        """The value of a name in a run; None if the run has no such thing."""
        if name in schema.COLUMNS:
            return getattr(run.result, name)
        for place in self._places(run, name):
            value = _at(place, name)
            if value is not _MISSING:
                return value
        return None

    def options(self, runs: Iterable[Run]) -> set[str]:
        """The dotted keys of options that any of the recipes has."""
        keys: set[str] = set()
        seen: set[str] = set()
        for run in runs:
            if run.result.fingerprint not in seen:
                seen.add(run.result.fingerprint)
                keys.update(labels.settings(run.result), labels.flatten(self._of_recipe(run)))
        return {key for key in keys if _is_option(key)}

    def _places(self, run: Run, name: str) -> Iterator[Mapping[str, Any]]:
        if name in OWN:
            yield _read(run)
        else:
            yield self._of_settings(run)
            yield self._of_recipe(run)
        yield self._defaults[run.result.retrain is not None]

    def _of_settings(self, run: Run) -> Mapping[str, Any]:
        key = run.result.fingerprint
        if key not in self._settings:
            self._settings[key] = json.loads(run.result.settings)
        return self._settings[key]

    def _of_recipe(self, run: Run) -> Mapping[str, Any]:
        key = run.result.fingerprint
        if key not in self._recipes:
            self._recipes[key] = _read(run)
        return self._recipes[key]


def _read(run: Run) -> Mapping[str, Any]:
    path = run.directory / schema.RECIPE
    hint = "put the file back, or use --where with columns of result.csv only"
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
    except OSError as error:
        raise LtnormError(f"cannot read {path}: {error.strerror or error}", hint) from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise LtnormError(f"{path} is damaged: not readable as YAML", hint) from error
    if not isinstance(recipe, dict):
        raise LtnormError(f"{path} is damaged: not a mapping of sections", hint)
    return recipe


def _defaults(retrain: bool) -> Mapping[str, Any]:
    second = Retrain(method="crt") if retrain else None
    return Recipe(retrain=second).model_dump(mode="json")


def _is_option(name: str) -> bool:
    """Whether a name can be an option of an entry of the registry, `norm.components`."""
    return name.rpartition(".")[0] in NAMED


def _at(place: Mapping[str, Any], name: str) -> Any:
    """The value at a dotted key; None below a section that is null."""
    value: Any = place
    for part in name.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _near(name: str, known: Iterable[str]) -> list[str]:
    """Where to look for what was meant: the keys of a section, those of that last part, columns."""
    section, _, last = name.rpartition(".")
    pools: list[list[str]] = [[], [], []]
    for key in known:
        parent, _, end = key.rpartition(".")
        pools[0] += [key] if section and parent == section else []
        pools[1] += [key] if end == last else []
        pools[2] += [key] if not parent else []
    return next(pool for pool in pools if pool)


def _what_there_is(condition: Condition, runs: Sequence[Run], values: Values) -> str:
    """A hint: the values of the name that comes first."""
    if not condition.names or not runs:
        return "leave out --where for all runs"
    name = min(condition.names, key=condition.text.find)
    found = {quoted(value): value for value in (values.of(run, name) for run in runs)}
    numbers = sorted(value for value in found.values() if type(value) in (int, float))
    if len(found) > SHOWN and len(numbers) == len(found):
        return f"{name} is from {quoted(numbers[0])} to {quoted(numbers[-1])} in them"
    shown = list(dict.fromkeys([*map(quoted, numbers), *sorted(found)]))
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return f"{name} is {', '.join(shown[:SHOWN])}{more} in them"
