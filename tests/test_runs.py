"""`ltnorm runs`: the list of what lies in a results tree."""

import io
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
import rich.console
from test_compare import result
from test_state import made

from ltnorm.cli import runs as listing
from ltnorm.reporting import schema, state


def ago(**since):
    return (datetime.now(UTC) - timedelta(**since)).isoformat()


@pytest.fixture
def tree(tmp_path):
    """A run of each state below results/, and a folder that is none."""
    top = tmp_path / "results" / "set"
    places = {name: top / name / "seed0" for name in ("bad", "done", "fell", "goes", "left")}
    for place in places.values():
        place.mkdir(parents=True)
    (top / "no-run").mkdir()
    made(places["goes"])
    made(places["fell"], state="failed", error="the loss became nan", hint="lower it", updated=AGO)
    made(places["left"], updated=AGO, epochs=None)
    schema.write_result(places["done"], result(finished=ago(minutes=5, seconds=1)))
    (places["done"] / "checkpoint.pt").write_bytes(b"x" * 3 * 2**20)
    (places["bad"] / schema.RESULT).write_text("schema,fingerprint\n2,x\n3,y\n")
    return tmp_path / "results"


AGO = ago(hours=3, minutes=1)


def test_every_run_is_listed_with_its_state_progress_age_and_size(ltnorm, tree):
    answer = ltnorm("runs")
    assert (answer.code, answer.err) == (0, "")
    rows = {line.split()[0]: line.split() for line in answer.out.splitlines() if "seed0 " in line}
    assert rows["set/goes/seed0"][1:5] == ["running", "12/40", "30", "%"]
    assert rows["set/fell/seed0"][1:7] == ["failed", "12/40", "30", "%", "3", "h"]
    assert rows["set/left/seed0"][1:7] == ["unfinished", "12", "30", "%", "3", "h"]
    assert rows["set/done/seed0"][1:7] == ["finished", "200/200", "100", "%", "5", "min"]
    assert rows["set/done/seed0"][7:] == ["3.00", "MiB"]
    assert rows["set/bad/seed0"][1] == "damaged"
    assert "set/fell/seed0: the loss became nan\n  lower it\n" in answer.out
    assert "set/bad/seed0: results/set/bad/seed0/result.csv is damaged" in answer.out
    last = answer.out.splitlines()[-1]
    assert last == ("5 runs: 1 damaged, 1 failed, 1 finished, 1 running, 1 unfinished · 3.00 MiB")


def test_failed_lists_what_needs_care_alone(ltnorm, tree):
    answer = ltnorm("runs --failed")
    assert answer.code == 0
    for name in ("bad", "fell", "left"):
        assert f"set/{name}/seed0 " in answer.out
    for name in ("done", "goes"):
        assert f"set/{name}/" not in answer.out
    assert answer.out.splitlines()[-1].startswith("3 runs: 1 damaged, 1 failed, 1 unfinished")
    whole = ltnorm("runs --failed results/set/done")
    assert (whole.code, whole.out) == (0, "none of 1 run is failed, unfinished or damaged\n")


def test_json_has_every_field_of_every_run(ltnorm, tree):
    runs = json.loads(ltnorm("runs --json").out)["runs"]
    assert [run["state"] for run in runs] == [
        "damaged",
        "finished",
        "failed",
        "running",
        "unfinished",
    ]
    assert all(set(run) == set(state.RunState.__dataclass_fields__) for run in runs)
    failed = runs[2]
    assert failed["directory"] == "results/set/fell/seed0"
    assert (failed["epoch"], failed["epochs"], failed["fraction"]) == (12, 40, 0.3)
    assert (failed["error"], failed["hint"]) == ("the loss became nan", "lower it")
    assert runs[1]["size"] > 3 * 2**20
    only = json.loads(ltnorm("runs --json --failed").out)["runs"]
    assert only == [run for run in runs if run["state"] not in ("finished", "running")]


def test_paths_are_named_as_the_user_did(ltnorm, tree):
    below = ltnorm("runs results/set/goes results/set/done").out
    assert "results/set/goes/seed0 " in below
    one = ltnorm("runs results/set/goes/seed0").out
    assert "\n. " in one
    row = ltnorm("runs results/set/done/seed0/result.csv").out
    assert "results/set/done/seed0 " in row


def test_no_run_at_all_is_an_error(failing, tmp_path):
    (tmp_path / "results").mkdir()
    assert "no runs in results" in failing("runs", code=3)
    assert "nowhere" in failing("runs nowhere", code=3)


def test_looking_changes_nothing(ltnorm, tree):
    def files():
        return {path: os.lstat(path).st_mtime_ns for path in tree.rglob("*")}

    before = files()
    assert ltnorm("runs").code == 0
    assert files() == before


@pytest.mark.parametrize(
    ("seconds", "age"),
    [(-5, "0 s"), (59, "59 s"), (60, "1 min"), (7199, "1 h"), (86399, "23 h"), (200000, "2 d")],
)
def test_an_age_has_its_largest_unit(seconds, age):
    now = datetime.now(UTC)
    assert listing._age((now - timedelta(seconds=seconds)).isoformat(), now) == age


@pytest.mark.parametrize("width", [50, 80, 160])
def test_no_number_is_cut_on_a_narrow_terminal(tree, width):
    found = schema.find_runs([tree])
    console = rich.console.Console(width=width, file=io.StringIO())
    console.print(listing._shown(state.states(found, size=True), [tree], len(found)))
    shown = console.file.getvalue()
    for cell in ("200/200", "100 %", "5 min", "3.00 MiB"):
        assert cell in shown
    assert max(map(len, shown.splitlines())) <= width


@pytest.mark.parametrize("command", ["runs", "diff results/set/fell/seed0 results/set/left/seed0"])
def test_neither_torch_nor_pandas_is_loaded(tree, command):
    code = f"""
import sys
from ltnorm.cli import main
code = main({command.split()!r})
print([m for m in ("torch", "numpy", "pandas") if m in sys.modules], code, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree.parent, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[] 0"


def test_many_runs_are_listed_quickly(tmp_path):
    text = None
    for i in range(400):
        place = tmp_path / f"setting{i // 5}" / f"seed{i % 5}"
        place.mkdir(parents=True)
        if text is None:
            schema.write_result(place, result())
            text = (place / schema.RESULT).read_text()
        (place / schema.RESULT).write_text(text)
        (place / schema.RECIPE).touch()
    start = time.perf_counter()
    assert len(state.states(schema.find_runs([tmp_path]), size=True)) == 400
    assert time.perf_counter() - start < 2  # a fifth of 2,000
