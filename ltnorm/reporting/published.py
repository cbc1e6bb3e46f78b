"""Published numbers, to show beside one's own; never a part of statistics.

The table is results/published.csv: one value a row, with the keys of the recipe that it was found
with, so that it stands only where it belongs. Values are converted from errors where those were
published. An empty source is one that is not known; `method_source` is who proposed the method.
"""

import csv
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ltnorm.errors import LtnormError
from ltnorm.recipe import BUDGETS, Recipe, Retrain
from ltnorm.reporting import schema

FILE = "published.csv"
# Columns that say what was run, by the key of the recipe that they hold.
KEYS: Mapping[str, str] = {
    "dataset": "dataset.name",
    "profile": "dataset.profile",
    "ratio": "dataset.ratio",
    "n_max": "dataset.n_max",
    "model": "model.name",
    "norm": "norm.name",
    "loss": "loss.name",
    "loss_schedule": "loss.schedule",
    "retrain": "retrain.method",
    "epochs": "train.epochs",
}
NUMBERS = ("ratio", "n_max", "epochs")
SETTINGS = "settings"  # more of them, as `--set` takes them: loss.base=focal, loss.gamma=1.0
TOLD = ("label", "source", "method_source", "note", "trials")
COLUMNS = (*KEYS, SETTINGS, "metric", "value", *TOLD)
# Defaults of options that rows name; a recipe's settings leave out what is the default.
OPTION_DEFAULTS: Mapping[str, Any] = {"loss.base": "focal"}
# Settings that a run may have besides those that a row names: they do not change what is learned.
NEUTRAL = ("tag", "train.precision", "eval.groups", "identity")
# Names are in a run's settings whatever they are.
USUAL: Mapping[str, Any] = {
    "sampler.name": "instance",
    "retrain.sampler.name": "balanced",
    "retrain.loss.name": "ce",
}
HINT = "mend the line, or restore the file that ships with ltnorm"


@dataclass(frozen=True)
class Published:
    """What one source reports of one setting.

    Attributes:
        keys: dotted keys of the recipe and their values.
        label: what its row is called: the source in two or three words, led by what tells it from
            the other rows of the table that it stands in.
        paper: the source in two or three words.
        values: metric -> value in percent.
        source: the citation of the values; empty where it is not known.
        method_source: the citation of the method; empty for a baseline.
        note: how the values were found, where that differs from ltnorm's way.
        trials: how many runs they are the mean of, where that is told.
    """

    keys: dict[str, Any]
    label: str
    paper: str
    values: dict[str, float]
    source: str
    method_source: str
    note: str
    trials: int | None


def default_path() -> Path:
    """The table that ships: inside the installed package, or in results/ of a checkout."""
    package = Path(__file__).parent.parent
    installed = package / FILE
    return installed if installed.is_file() else package.parent / "results" / FILE


def read_beside(places: Sequence[Path]) -> list[Published]:
    """The tables that lie as published.csv in folders of results; without one that which ships.

    Raises:
        LtnormError: a table is damaged.
    """
    tables = [table for place in places if (table := place / FILE).is_file()]
    return [one for table in tables or [default_path()] for one in read(table)]


def read(path: Path) -> list[Published]:
    """The published settings in a table; rows that differ in the metric alone are one.

    Raises:
        LtnormError: the file cannot be read, or a line is damaged, which it names.
    """
    found: dict[tuple[str, ...], Published] = {}
    for line, row in _rows(path):
        where = f"{path}, line {line}"
        one = _published(row, where)
        same = tuple(row[column] for column in (*KEYS, SETTINGS, *TOLD))
        values = found.setdefault(same, one).values
        metric = row["metric"]
        if metric in values:
            raise LtnormError(f"{where}: repeats {metric} of the same setting and source", HINT)
        values[metric] = _metric(row, where)
    return list(found.values())


def matching(
    published: Sequence[Published], settings: Mapping[str, Any], by: Collection[str]
) -> list[Published]:
    """Those that were found with the settings of a block.

    Args:
        published: what there is.
        settings: a block's settings by dotted key; what is left out has its default.
        by: sections or dotted keys that the rows of the block differ in; these are not compared.
    """

    values = _defaults(settings) | dict(settings)
    other = [key for key in settings if key not in NEUTRAL and settings[key] != USUAL.get(key)]

    def is_shared(key: str) -> bool:
        parts = key.split(".")
        return not any(".".join(parts[: i + 1]) in by for i in range(len(parts)))

    return [
        one
        for one in published
        if all(values.get(key) == wanted for key, wanted in one.keys.items() if is_shared(key))
        and all(key in one.keys for key in other if is_shared(key))
    ]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The lines of a table by number, each whole."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if missing := [column for column in COLUMNS if column not in header]:
                raise LtnormError(f"{path}, line 1: no column {', '.join(missing)}", HINT)
            for cells in reader:
                if len(cells) != len(header):
                    text = f"{len(cells)} cells where the header has {len(header)}"
                    raise LtnormError(f"{path}, line {reader.line_num}: {text}", HINT)
                yield reader.line_num, dict(zip(header, cells, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise LtnormError(f"{path} is not a readable CSV: {error}", HINT) from error


def _published(row: Mapping[str, str], where: str) -> Published:
    keys: dict[str, Any] = {}
    for column, key in KEYS.items():
        cell = row[column] or None
        keys[key] = _number(cell, column, where) if cell and column in NUMBERS else cell
    keys |= dict(_settings(row[SETTINGS], where))
    trials = row["trials"]
    if trials and not (trials.isascii() and trials.isdigit()):
        raise LtnormError(f"{where}: trials '{trials}' is not a whole number", HINT)
    told = {column: row[column] for column in TOLD if column != "trials"}
    return Published(
        keys=keys, paper=row["label"], values={}, trials=int(trials) if trials else None, **told
    )


def _settings(cell: str, where: str) -> Iterator[tuple[str, Any]]:
    for item in cell.split(",") if cell.strip() else ():
        option, equals, value = item.strip().partition("=")
        try:
            if not option or not equals:
                raise ValueError
            yield option, yaml.safe_load(value)
        except (ValueError, yaml.YAMLError):
            text = f"{where}: {SETTINGS} '{item.strip()}' is not key=value"
            raise LtnormError(text, HINT) from None


def _metric(row: Mapping[str, str], where: str) -> float:
    if row["metric"] not in schema.METRICS:
        text = f"{where}: unknown metric '{row['metric']}'"
        raise LtnormError(text, f"one of {', '.join(schema.METRICS)}")
    return _number(row["value"], "value", where)


def _number(cell: str, column: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise LtnormError(f"{where}: {column} '{cell}' is not a number", HINT)
    return value


def _defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that rows can name, as they are where settings leave them out."""
    has_retrain = any(key.startswith("retrain.") for key in settings)
    second = Retrain(method="crt") if has_retrain else None
    recipe = Recipe(retrain=second).model_dump(mode="json")
    values: dict[str, Any] = dict(OPTION_DEFAULTS)
    for key in KEYS.values():
        section, _, field = key.partition(".")
        values[key] = (recipe[section] or {}).get(field)
    if any(f"train.{budget}" in settings for budget in BUDGETS):
        values["train.epochs"] = None
    return values
