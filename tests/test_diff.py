"""`ltnorm diff`: two runs side by side."""

import json

import pytest
import yaml
from test_compare import result
from test_state import made

from ltnorm import resolve as recipes
from ltnorm.reporting import diff, schema
from ltnorm.resolve import Overrides

FLAGS = {"loss.name": "ldam", "train.epochs": 7}


def put(directory, norm="bn", seed=0, flags=None, row=True, **changes):
    """A run's folder, with the recipe and the result row of a real recipe."""
    directory.mkdir(parents=True)
    [recipe] = recipes.resolve({}, Overrides(flags or {}, norms=[norm], seeds=[seed]))
    (directory / schema.RECIPE).write_text(recipe.to_yaml())
    if row:
        schema.write_result(directory, result(norm, seed, flags=flags, **changes))
    return directory


def keys(rows, name="key"):
    return [row[name] for row in rows]


@pytest.fixture
def compared(ltnorm):
    def run(*more):
        answer = ltnorm("diff a b", *more)
        assert answer.code == 0, answer.err
        return json.loads(answer.out) if "--json" in more else answer.out

    return run


def test_what_differs_is_told_and_nothing_else(compared, tmp_path):
    put(tmp_path / "a", tail=10.0, nll=1.5)
    put(tmp_path / "b", "gn", 3, FLAGS, tail=12.5, nll=1.25, index_sha256="cd", torch="9.9")
    found = compared("--json")
    ours, theirs = (
        diff.flatten(yaml.safe_load((tmp_path / side / schema.RECIPE).read_text())) for side in "ab"
    )
    differing = {k for k in ours | theirs if ours.get(k, diff) != theirs.get(k, diff)}
    assert {*keys(found["recipe"]), *keys(found["apart"])} == differing
    assert found["apart"] == [{"key": "seed", "a": 0, "b": 3}]
    recipe = {row["key"]: row for row in found["recipe"]}
    assert recipe["train.epochs"] == {"key": "train.epochs", "a": 200, "b": 7}
    assert recipe["norm.momentum"] == {"key": "norm.momentum", "a": 0.1}  # GroupNorm has none
    assert (found["same_setting"], found["same_images"]) == (False, False)
    assert keys(found["metrics"], "name") == list(schema.METRICS)
    metrics = {row["name"]: row for row in found["metrics"]}
    assert metrics["tail"] == {"name": "tail", "a": 10.0, "b": 12.5, "difference": 2.5}
    assert metrics["all"]["difference"] == 0
    assert {row["key"]: row["b"] for row in found["environment"]} == {
        "index_sha256": "cd",
        "torch": "9.9",
    }
    shown = compared()
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    for line in (
        "norm.name bn gn",
        "norm.momentum 0.1 –",
        "train.epochs 200 7",
        "seed 0 3",
        "tail 10.0 12.5 +2.5",
        "nll 1.500 1.250 -0.250",
        "parameters 464,154 464,154 +0",
        f"torch {result().torch} 9.9",
    ):
        assert line in lines
    assert "trained on other images" in shown
    assert "train.lr" not in shown


def test_a_difference_turned_round_has_the_other_sign(tmp_path):
    a, b = put(tmp_path / "a", tail=10.0), put(tmp_path / "b", "gn", tail=12.5)
    there, back = (diff.diff(diff.load(x), diff.load(y)) for x, y in ((a, b), (b, a)))
    assert [m.difference for m in there.metrics] == [-m.difference for m in back.metrics]
    assert {(d.key, d.a, d.b) for d in there.recipe} == {(d.key, d.b, d.a) for d in back.recipe}


def test_two_seeds_are_one_setting(compared, tmp_path):
    put(tmp_path / "a", seed=0, tail=None)
    put(tmp_path / "b", seed=1)
    found = compared("--json")
    assert (found["recipe"], found["same_setting"], found["same_images"]) == ([], True, True)
    tail = next(row for row in found["metrics"] if row["name"] == "tail")
    assert (tail["a"], tail["difference"]) == (None, None)
    shown = compared()
    assert "the same setting" in shown
    assert "not part of the setting" in shown
    assert "trained on the same images; the same device, torch, ltnorm" in shown
    assert "tail – 10.0 –" in [" ".join(line.split()) for line in shown.splitlines()]


def test_a_section_that_one_run_lacks(compared, tmp_path):
    put(tmp_path / "a", row=False)
    put(tmp_path / "b", flags={"retrain.method": "crt"}, row=False)
    rows = {row["key"]: row for row in compared("--json")["recipe"]}
    assert rows["retrain.method"] == {"key": "retrain.method", "b": "crt"}
    assert "retrain" not in rows


def test_of_an_unfinished_run_recipes_alone_are_compared(compared, tmp_path):
    put(tmp_path / "a")
    put(tmp_path / "b", "gn", row=False)
    recipe = (tmp_path / "b" / schema.RECIPE).read_text()
    made(tmp_path / "b", state="unfinished", error="interrupted")
    (tmp_path / "b" / schema.RECIPE).write_text(recipe)
    shown = compared()
    assert "norm.name" in shown
    assert "b is unfinished, 30 % done: interrupted; so only recipes are compared" in shown
    assert "metric" not in shown
    found = compared("--json")
    assert found["states"] == ["finished", "unfinished"]
    assert (found["metrics"], found["environment"], found["same_images"]) == ([], [], None)


def test_settings_that_differ_without_effect_are_one(compared, tmp_path):
    """A recipe of an earlier version lacks a key whose default is what it did."""
    put(tmp_path / "a")
    put(tmp_path / "b")
    file = tmp_path / "b" / schema.RECIPE
    content = yaml.safe_load(file.read_text())
    del content["train"]["sam_rho"]
    file.write_text(yaml.safe_dump(content))
    found = compared("--json")
    assert (found["same_setting"], keys(found["recipe"])) == (True, ["train.sam_rho"])
    assert "the same fingerprint, but 1 key of the recipes differ" in compared()


def test_a_run_is_named_by_its_directory_or_a_file_in_it(ltnorm, tmp_path):
    put(tmp_path / "a")
    put(tmp_path / "b", "gn")
    by_file = ltnorm("diff a/result.csv b/result.csv --json")
    assert by_file.out == ltnorm("diff a b --json").out != ""


def test_what_is_no_run_is_refused_with_a_hint(failing, tmp_path):
    run = put(tmp_path / "results" / "x" / "seed0")
    assert "results/x/seed0" in failing("diff results results", code=3)
    assert "nowhere" in failing("diff results/x/seed0 nowhere", code=3)
    (tmp_path / "file").touch()
    assert "`ltnorm runs`" in failing("diff results/x/seed0 file", code=3)
    assert "name two" in failing("diff results/x/seed0 results/x/seed0/result.csv", code=2)
    other = put(tmp_path / "other")
    (other / schema.RECIPE).write_text("- 1\n")
    assert "other/recipe.yaml is damaged" in failing("diff results/x/seed0 other", code=1)
    (other / schema.RECIPE).write_text("a: [1")
    assert "other/recipe.yaml is damaged" in failing("diff results/x/seed0 other", code=1)
    (run / schema.RESULT).write_text("")
    assert "not a result" in failing("diff results/x/seed0 other", code=1)
