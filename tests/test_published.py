"""The published numbers: exactly those of the table, where they belong, and damage is named."""

import csv
import subprocess
from pathlib import Path

import pytest

from ltnorm import registry, resolve, validation
from ltnorm.errors import LtnormError
from ltnorm.reporting import published
from ltnorm.reporting.published import COLUMNS, default_path, matching, read

# CIFAR-10 ratio 100, 50, CIFAR-100 ratio 100, 50; first the LDAM paper, then Bag of Tricks.
PAIRS = {
    "cifar10-lt": "70.36/71.95 -/76.45 38.32/37.73 -/43.78",
    "cifar10-lt-focal": "70.38/71.56 -/77.91 38.41/37.22 -/41.79",
    "cifar10-lt-cb-focal": "74.57/75.20 -/78.99 36.02/38.56 -/42.37",
    "cifar10-lt-ldam": "73.35/73.66 -/79.01 39.60/38.88 -/43.59",
    "cifar10-lt-ldam-drw": "77.03/77.73 -/81.60 42.04/42.47 -/47.29",
    "cifar10-lt-ce-drw": "74.86 - 40.66 -",
    "cifar10-lt-balanced-softmax": "77.54 81.11 42.99 46.55",
    "cifar10-lt-logit-adjust": "77.67 - 43.89 -",
    "cifar10-lt-tau-norm": "72.70 79.78 40.96 45.69",
    "cifar10-lt-crt": "74.99 80.17 40.26 45.36",
}
SETS = [("cifar10", 100), ("cifar10", 50), ("cifar100", 100), ("cifar100", 50)]


def flat(recipe):
    """A recipe's settings by dotted key, as a block has them."""

    def walk(place, prefix=""):
        for key, value in place.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(recipe.settings()))


def settings_of(name, **changes):
    flags = {key.replace("__", "."): value for key, value in changes.items()}
    [recipe] = resolve.resolve(resolve.read(name), resolve.Overrides(flags))
    return flat(recipe)


@pytest.fixture(scope="module")
def table():
    return read(default_path())


@pytest.mark.parametrize("name", PAIRS)
def test_every_shipped_recipe_finds_exactly_its_numbers(table, name):
    for (dataset, ratio), cell in zip(SETS, PAIRS[name].split(), strict=True):
        settings = settings_of(name, dataset__name=dataset, dataset__ratio=ratio)
        found = [one.values["all"] for one in matching(table, settings, ()) if "all" in one.values]
        assert found == [float(value) for value in cell.split("/") if value != "-"]


def test_the_table_holds_nothing_else(table):
    listed = [v for row in PAIRS.values() for v in row.replace("/", " ").split() if v != "-"]
    values = [value for one in table for value in one.values.values()]
    assert sorted(values) == sorted([*map(float, listed), 66.1, 37.3, 10.6])
    [groups] = [one for one in table if "all" not in one.values]
    assert groups.values == {"head": 66.1, "medium": 37.3, "tail": 10.6}
    assert "RIDE" in groups.label
    assert all(one.label for one in table)


def test_sources_are_those_of_the_two_papers(table):
    assert {one.source for one in table if one.label == "LDAM paper"} == {
        "Cao et al. 2019, arXiv 1906.07413"
    }
    twice = [one for one in table if one.label == "Bag of Tricks"]
    assert len(twice) == 20
    assert all("Zhang et al. 2021" in one.source for one in twice)
    [ten, hundred] = [one for one in table if one.keys["loss.name"] == "logit-adjust"]
    assert (ten.trials, "weight decay 1e-4" in hundred.note) == (5, True)


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset__ratio": 20},
        {"dataset__profile": "step"},
        {"dataset__n_max": 2000},
        {"dataset__name": "svhn"},
        {"model__name": "resnet20"},
        {"norm__name": "gn"},
        {"loss__name": "vs"},
        {"retrain__method": "ncm"},
        {"train__epochs": 30},
        {"train__steps": 100},
    ],
)
def test_another_setting_finds_nothing(table, changes):
    [key] = changes
    assert matching(table, settings_of("cifar10-lt"), ())
    settings = settings_of("cifar10-lt", **changes)
    assert matching(table, settings, ()) == []
    # Nor by the norm, unless the norm is all that differs; by what differs, it is found.
    assert bool(matching(table, settings, {"norm"})) == (key == "norm__name")
    if key not in ("train__steps", "retrain__method"):
        assert matching(table, settings, {key.replace("__", ".")})
        assert matching(table, settings, {key.partition("__")[0]})


def test_options_of_a_loss_tell_settings_apart(table):
    assert not matching(table, settings_of("cifar10-lt-focal", loss__gamma=2.0), ())
    softmax = {"loss__base": "softmax", "loss__gamma": 1.0}
    assert not matching(table, settings_of("cifar10-lt-cb-focal", **softmax), ())
    ce = {one.keys["loss.name"] for one in matching(table, settings_of("cifar10-lt"), {"loss"})}
    assert ce == {"ce", "focal", "cb", "ldam", "balanced-softmax"}  # logit-adjust has another decay


def test_the_keys_are_those_of_recipes_and_the_defaults_those_of_the_registry(table):
    for one in table:
        data: dict = {}
        for key, value in one.keys.items():
            section, _, field = key.partition(".")
            if value is not None:
                data.setdefault(section, {})[field] = value
        recipe = validation.validate(data)
        assert matching([one], flat(recipe), ()) == [one]
    options = registry.options_model("loss", "cb")()
    assert {"loss.base": options.base} == published.OPTION_DEFAULTS


def edited(tmp_path, edit):
    """The shipped table with one change."""
    with default_path().open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    edit(rows)
    path = tmp_path / "p.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def cell(line, column, value):
    def edit(rows):
        rows[line - 1][COLUMNS_HERE.index(column)] = value

    return edit


COLUMNS_HERE = next(csv.reader(default_path().open(newline="", encoding="utf-8")))


@pytest.mark.parametrize(
    ("edit", "line", "told"),
    [
        (cell(3, "metric", "top5"), 3, "top5"),
        (cell(4, "value", "high"), 4, "high"),
        (cell(4, "value", "nan"), 4, "nan"),
        (cell(4, "value", ""), 4, "value"),
        (cell(5, "ratio", "x"), 5, "ratio"),
        (cell(5, "trials", "many"), 5, "trials"),
        (cell(5, "settings", "gamma"), 5, "gamma"),
        (cell(5, "settings", "gamma={"), 5, "gamma"),
        (cell(1, "source", "sauce"), 1, "source"),
        (lambda rows: rows[5].pop(), 6, "cells"),
        (lambda rows: rows.insert(7, rows[6]), 8, "repeats"),
        (lambda rows: rows.clear(), 1, "dataset"),
    ],
)
def test_damage_is_told_with_file_and_line(tmp_path, edit, line, told):
    path = edited(tmp_path, edit)
    with pytest.raises(LtnormError) as error:
        read(path)
    assert f"{path}, line {line}:" in error.value.message
    assert told in error.value.message
    assert error.value.hint


def test_what_is_no_table_is_told(tmp_path):
    binary = tmp_path / "b.csv"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.csv", binary, tmp_path):
        with pytest.raises(LtnormError, match="not a readable CSV"):
            read(path)


def test_a_table_of_ones_own_is_read_with_a_mark_of_bytes_and_other_columns(tmp_path):
    path = edited(tmp_path, lambda rows: [row.append("more") for row in rows])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path) == read(default_path())
    assert set(COLUMNS_HERE) == set(COLUMNS)


def test_the_table_is_not_ignored_by_git():
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        pytest.skip("needs a checkout")
    ignored = subprocess.run(["git", "check-ignore", "-q", "results/published.csv"], cwd=root)
    assert ignored.returncode == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"train__lr": 0.001},
        {"train__batch_size": 1024},
        {"train__weight_decay": 0.0},
        {"train__ema": 0.99},
        {"dataset__val": 500},
        {"dataset__class_order": "reversed"},
        {"sampler__name": "balanced"},
        {"train__mixup": 0.2},
    ],
)
def test_what_papers_did_not_run_has_no_published_numbers(table, changes):
    where = {"dataset__name": "cifar10", "dataset__ratio": 100}
    assert matching(table, settings_of("cifar10-lt", **where), ())
    assert not matching(table, settings_of("cifar10-lt", **where, **changes), ())
