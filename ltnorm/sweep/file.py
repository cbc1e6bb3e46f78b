"""A file of a sweep, read.

recipe: cifar10-lt                  a name or a path; else the data set's own
set: {train.epochs: 100}            for all runs
grid: {norm: [bn, gn], ratio: [10, 100], train.lr: [0.1, 0.2], seed: 0-4}
exclude: [{norm: gn, train.lr: 0.2}]

A file can hold several such grids, with a line --- between them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ltnorm.errors import UsageError, did_you_mean
from ltnorm.reporting.labels import flatten
from ltnorm.resolve import shipped_recipes
from ltnorm.sweep.grid import TRAIN_BUDGETS, Grid, path_of, short
from ltnorm.validation import Mistake, report

KEYS = ("recipe", "set", "grid", "exclude")


def read_grids(path: Path) -> list[Grid]:
    """The grids of a file.

    Raises:
        UsageError: with every mistake and its dotted path in one message.
    """
    mistakes: list[Mistake] = []
    grids = []
    documents = _read(path)
    for number, data in enumerate(documents, start=1):
        found: list[Mistake] = []
        grid = _grid(data, path, found)
        of = f"grid {number}: " if len(documents) > 1 else ""
        grid.name = f"{path}: {of}".removesuffix(": ")
        grids.append(grid)
        mistakes += [Mistake(of + m.path, m.text, m.hint) for m in found]
    if mistakes:
        raise _in_file(report(mistakes), path)
    return grids


def _grid(data: Mapping[str, Any], path: Path, mistakes: list[Mistake]) -> Grid:
    """The grid of a document, and what is wrong with it."""
    mistakes += [
        Mistake(str(key), "unknown key", did_you_mean(str(key), KEYS))
        for key in data
        if key not in KEYS
    ]
    grid = Grid(_recipe(data.get("recipe"), path, mistakes))
    told = [key for part in ("set", "grid") for key in flatten(_mapping(data, part, []))]
    if len(budgets := [key for key in told if key in TRAIN_BUDGETS]) > 1:
        text = f"one budget is enough, not {' and '.join(dict.fromkeys(budgets))}"
        mistakes.append(Mistake(budgets[-1], text))
    for key, value in flatten(_mapping(data, "set", mistakes)).items():
        grid.fix(key, value)
    for key, values in flatten(_mapping(data, "grid", mistakes)).items():
        if path_of(key) in grid.fixed:
            text = "is in set as well"
            mistakes.append(Mistake(f"grid.{key}", text, "leave out one of the two"))
        try:
            grid.vary(key, values)
        except UsageError as error:
            text = error.message.removeprefix(f"{short(path_of(key))}: ")
            mistakes.append(Mistake(f"grid.{key}", text, error.hint))
    exclusions = data.get("exclude") or []
    for i, exclusion in enumerate(exclusions if isinstance(exclusions, list) else [exclusions]):
        if not isinstance(exclusion, Mapping) or not exclusion:
            text = f"not a mapping, got {exclusion!r:.40}"
            mistakes.append(Mistake(f"exclude.{i}", text, "like {norm: gn, ratio: [10, 50]}"))
            continue
        try:
            grid.exclude({str(key): value for key, value in exclusion.items()})
        except UsageError as error:
            mistakes.append(Mistake(f"exclude.{i}", error.message, error.hint))
    return grid


def _read(path: Path) -> list[Mapping[str, Any]]:
    """The documents of a file; empty ones, as before a first ---, are none."""
    try:
        data = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UsageError(f"no sweep {path}", "name a YAML file, or give --norm, --grid") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        hint = "a sweep starts like `grid: {norm: [bn, gn], seed: 0-4}`"
        raise UsageError(f"{path}: not readable as YAML{line}", hint) from error
    try:
        json.dumps(data, default=str)
    except (ValueError, RecursionError, TypeError) as error:
        raise UsageError(f"{path}: contains itself", "see the &anchors in it") from error
    data = [document for document in data if document is not None] or data
    if not data or not all(isinstance(document, Mapping) for document in data):
        hint = "a sweep starts like `grid: {norm: [bn, gn], seed: 0-4}`"
        raise UsageError(f"{path}: not a mapping of {', '.join(KEYS)}", hint)
    return data


def _recipe(name: Any, path: Path, mistakes: list[Mistake]) -> str | None:
    """A recipe's name, or its path, which may be told from where the sweep lies."""
    if name is None or isinstance(name, str):
        beside = path.parent / (name or "")
        return str(beside) if name and name not in shipped_recipes() and beside.exists() else name
    mistakes.append(Mistake("recipe", f"not a name or a path, got {name!r:.40}"))
    return None


def _mapping(data: Mapping[str, Any], key: str, mistakes: list[Mistake]) -> Mapping[str, Any]:
    value = data.get(key) or {}
    if isinstance(value, Mapping):
        return {str(k): v for k, v in value.items()}
    mistakes.append(Mistake(key, f"not a mapping of keys, got {value!r:.40}"))
    return {}


def _in_file(error: UsageError, path: Path) -> UsageError:
    message = error.message.replace(" in the recipe", "", 1)
    return UsageError(f"{path}: {message}", error.hint)
