"""`ltnorm sweep`: grids, plans, the work and its failures, job arrays. Ray: test_sweep_ray."""

import dataclasses
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import rich.console
import torch
import yaml
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from ltnorm import cores
from ltnorm.cli import main
from ltnorm.console import Output
from ltnorm.errors import LtnormError, UsageError
from ltnorm.reporting import schema, state
from ltnorm.sweep import child, estimate, file, grid, local, plan, progress, work

PROJECT = Path(__file__).parent.parent
SETTING = Path("results/synthetic-exp10")
FOUR = "sweep --recipe tiny.yaml --norm bn --norm gn --seeds 0-1"
NORMS = ("bn", "gn", "compound", "split")


class Forked:
    """A process like `subprocess.Popen`'s whose command line runs in a fork, torch being loaded."""

    def __init__(self, command, *, stdin, stdout, stderr, env, process_group):
        assert command[1:3] == ["-m", "ltnorm.sweep.child"]
        self.returncode = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setpgid(0, process_group)
            os.environ |= env
            torch.set_num_threads(1)
            os.dup2(stderr.fileno(), 2)
            sys.stderr, sys.stdout = os.fdopen(2, "w", buffering=1), io.StringIO()
            code = main(command[3:])
        finally:
            os._exit(code)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=None):
        end = time.monotonic() + (timeout or 60)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("train", timeout)
            time.sleep(0.02)

    def terminate(self):
        os.kill(self.pid, signal.SIGTERM)


@pytest.fixture
def forked(monkeypatch):
    monkeypatch.setattr(local.subprocess, "Popen", Forked)
    monkeypatch.setattr(work, "POLL", 0.05)


def when_under_way(directory, act):
    """In a thread: once the run has trained for an epoch, act(its process's id)."""

    def wait():
        while True:
            told = state.read_status(directory)
            if told and told.state is state.State.running and told.epoch:
                return act(told.pid)
            time.sleep(0.02)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def attempts(directory):
    return (directory / plan.LOG).read_text().count(plan.ATTEMPT)


# --- the grid


AXES = st.fixed_dictionaries(
    {
        "norm": st.lists(st.sampled_from(NORMS), min_size=1, max_size=3, unique=True),
        "norm.components": st.lists(st.integers(1, 3), min_size=1, max_size=2, unique=True),
        "train.lr": st.lists(st.sampled_from([0.1, "2e-1", 0.3]), min_size=1, unique=True),
        "seed": st.sampled_from([["0-2"], [1, 4], ["0,2", 5]]),
    }
)


EXCLUDABLE = ("norm", "norm.components", "train.lr")


@settings(max_examples=15)
@given(axes=AXES, data=st.data())
def test_a_grid_is_the_product_of_its_axes_less_what_is_excluded(axes, data):
    values = {key: st.sampled_from(axes[key]) for key in EXCLUDABLE}
    excluded = data.draw(st.lists(st.fixed_dictionaries({}, optional=values).filter(bool)))
    with_components = {"compound", "split"}
    if not with_components & set(axes["norm"]):
        axes["norm"].append("split")
    asked = grid.Grid("smoke")
    for key, values in axes.items():
        asked.vary(key, list(values))
    for exclusion in excluded:
        asked.exclude(exclusion)
    expected = set()
    for norm, components, lr in itertools.product(*(axes[key] for key in EXCLUDABLE)):
        cell = {"norm": norm, "norm.components": components, "train.lr": lr}
        if norm not in with_components:
            del cell["norm.components"]
        if not any(exclusion.items() <= cell.items() for exclusion in excluded):
            expected.add((norm, cell.get("norm.components"), float(lr)))
    if not expected:
        with pytest.raises(UsageError, match="every run"):
            grid.expand(asked)
        return
    cells, _ = grid.expand(asked)
    found = [
        (c.recipe.norm.name, c.recipe.norm.options.get("components"), c.recipe.train.lr)
        for c in cells
    ]
    assert set(found) == expected
    assert len(cells) == len(expected) * len(asked.axes["seed"])  # none twice
    assert len({(c.recipe.fingerprint(), c.recipe.seed) for c in cells}) == len(cells)


def test_all_mistakes_of_a_sweep_are_told_at_once(ltnorm, failing, tmp_path):
    content = {
        "recipe": "tiny.yaml",
        "set": {"loss.gama": 1, "train.steps": 4},
        "grid": {
            "norm": ["bn", "compuond"],
            "loss": ["focal", "ce"],
            "norm.component": [2],
            "train": {"learning_rate": [1]},
            "sampler.power": [1],
        },
        "exclude": [{"norms": "bn"}],
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(content))
    told = failing("sweep s.yaml --dry-run", code=2)
    for path in (
        "loss.gama: no loss of the sweep (focal, ce)",
        "norm.name: unknown norm 'compuond'",
        "norm.component: ",
        "train.learning_rate: unknown key",
        "sampler.power: sampler 'instance' has no option",
        "exclude.norms: no axis",
        "did you mean 'gamma'",
        "did you mean 'norm'",
    ):
        assert path in told
    (tmp_path / "t.yaml").write_text("grdi: 1\ngrid: {norm: [], seed: 4-1}\nexclude: [bn]\n")
    told = failing("sweep t.yaml", code=2)
    for part in (
        "grdi: unknown key",
        "grid.norm: an axis",
        "grid.seed: ",
        "exclude.0: not a mapping",
    ):
        assert part in told
    # What is wrong with some cells names them.
    told = failing("sweep --recipe tiny.yaml --loss ce --loss cb --grid loss.beta=0.9", code=2)
    assert "loss.beta: has an effect only with effective weights (where loss=ce)" in told


def test_several_grids_are_one_sweep_that_makes_what_they_share_once(ltnorm, failing, tmp_path):
    grids = [
        {"recipe": "smoke", "grid": axes}
        for axes in (
            {"norm": ["bn", "gn"], "train.lr": [0.1], "seed": "0-1"},
            {"norm": ["gn", "compound"], "train.lr": [0.1, 0.2], "seed": 0},
        )
    ]
    (tmp_path / "both.yaml").write_text("# both\n---\n" + yaml.safe_dump_all(grids))
    for name, content in zip("ab", grids, strict=True):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    for files in ("a.yaml b.yaml", "both.yaml"):
        answer = ltnorm(f"sweep {files} --dry-run --no-estimate --json")
        assert answer.code == 0, answer.err
        cells = [run["cell"] for run in json.loads(answer.out)["runs"]]
        found = [(c["norm"], c["train.lr"], c["seed"]) for c in cells]
        first = [("bn", 0.1, 0), ("bn", 0.1, 1), ("gn", 0.1, 0), ("gn", 0.1, 1)]
        assert found == [*first, ("gn", 0.2, 0), ("compound", 0.1, 0), ("compound", 0.2, 0)]
    (tmp_path / "bad.yaml").write_text("grid: {norm: bn}\n---\ngrid: {norm: []}\nsets: {}\n")
    told = failing("sweep bad.yaml", code=2)
    assert "grid 2: sets: unknown key" in told
    assert "grid 2: grid.norm: an axis" in told
    # A flag's exclusion is for the grids that have its axes, and may leave one of them empty.
    one = {"recipe": "smoke", "grid": {"loss": ["ce", "focal"], "norm": ["gn"]}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(one))
    answer = ltnorm("sweep a.yaml c.yaml --exclude loss=focal,ce --dry-run --no-estimate --json")
    assert answer.code == 0, answer.err
    assert len(json.loads(answer.out)["runs"]) == 4
    assert "c.yaml: every run is excluded" in answer.err
    assert "no axis" in failing("sweep a.yaml c.yaml --exclude ratio=5", code=2)
    (tmp_path / "d.yaml").write_text("set: {train.lrr: 1}\n")
    assert "d.yaml: train.lrr: unknown" in failing("sweep a.yaml d.yaml", code=2)


@pytest.mark.parametrize("path", sorted((PROJECT / "recipes" / "study").glob("*.yaml")), ids=str)
def test_the_sweeps_of_the_study_are_whole(path):
    grids = file.read_grids(path)
    cells, warnings = grid.expand_all(grids)
    assert cells
    assert not warnings
    assert all(cell.recipe.train.precision != "auto" for cell in cells)  # the same everywhere
    assert f"ltnorm sweep recipes/study/{path.name}" in path.read_text()


def test_a_precision_that_is_found_out_makes_no_second_run(ltnorm, tmp_path):
    axes = {"norm": ["bn"], "train.precision": ["auto", "fp32", "bf16"], "seed": "0-1"}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"recipe": "smoke", "grid": axes}))
    answer = ltnorm("sweep s.yaml --dry-run --no-estimate --json")
    runs = [run["directory"] for run in json.loads(answer.out)["runs"]]
    assert len(runs) == len(set(runs)) == 4


def test_the_layers_of_a_norm_are_an_axis_but_of_bn(ltnorm, failing):
    answer = ltnorm(
        "sweep --recipe smoke --norm bn --norm gn --grid norm.layers=all,first "
        "--dry-run --no-estimate --json"
    )
    cells = [run["cell"] for run in json.loads(answer.out)["runs"]]
    assert [(c["norm"], c.get("norm.layers")) for c in cells] == [
        *(("bn", None), ("gn", "all"), ("gn", "first"))
    ]
    flags = "train --recipe smoke --set norm.layers=first --dry-run --json"
    answer = ltnorm(f"{flags} --norm bn --norm gn")
    assert answer.code == 0, answer.err
    assert "has an option 'layers'" in failing(f"{flags} --norm bn", code=2)


def test_flags_win_over_the_file(ltnorm, tmp_path):
    content = {
        "recipe": "tiny.yaml",
        "set": {"train": {"epochs": 7}},
        "grid": {"norm": ["bn", "gn"], "ratio": [5, 10], "seed": "0-4"},
        "exclude": {"norm": "gn", "ratio": 5},
    }
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "sub" / "s.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "tiny.yaml").unlink()  # it is found beside the sweep
    before = sorted(tmp_path.rglob("*"))
    flags = "--seeds 1,3 --steps 9 --set train.lr=0.02 --exclude ratio=7 --no-estimate --json"
    answer = ltnorm(f"sweep sub/s.yaml {flags} --dry-run")
    assert answer.code == 0, answer.err
    assert "exclude ratio=7 matches no run" in answer.err
    runs = json.loads(answer.out)["runs"]
    cells = [tuple(run["cell"].values()) for run in runs]
    assert cells == [(n, r, s) for n, r in (("bn", 5), ("bn", 10), ("gn", 10)) for s in (1, 3)]
    assert all(run["state"] == "new" for run in runs)
    assert len({run["directory"] for run in runs}) == 6
    assert sorted(tmp_path.rglob("*")) == before


@given(count=st.integers(0, 20), n=st.integers(1, 9))
def test_the_parts_of_a_sweep_are_disjoint_and_together_all(count, n):
    jobs = list(range(count))
    parts = [plan.part(jobs, f"{i}/{n}") for i in range(1, n + 1)]
    assert sorted(itertools.chain(*parts)) == jobs
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for wrong in (f"0/{n}", f"{n + 1}/{n}", "1", "a/b", f"-1/{n}"):
        with pytest.raises(UsageError, match="--part"):
            plan.part(jobs, wrong)


# --- the work


def test_a_killed_run_is_made_again_and_a_failed_one_leaves_the_rest(forked, ltnorm, tmp_path):
    killed, failed = tmp_path / SETTING / "resnet8-bn-ce/seed0", SETTING / "resnet8-gn-ce/seed1"
    failed.mkdir(parents=True)
    (failed / schema.RESULT).write_text("not a result\n")
    command = f"{FOUR} --jobs 2 --set train.epochs=12"
    killer = when_under_way(killed, lambda pid: os.kill(pid, signal.SIGKILL))
    answer = ltnorm(command)
    assert not killer.is_alive()
    assert answer.code == 1
    assert f"{SETTING}/resnet8-bn-ce/seed0: its process was killed (signal 9); trying again" in (
        answer.err
    )
    *_, why, hint, error, last = answer.err.splitlines()
    assert why.startswith(f"{failed}: ")
    assert "is not a result" in why
    assert "delete or move the file" in hint
    assert error == "error: 1 of 4 runs failed"
    assert last.startswith("hint: ")
    others = [SETTING / f"resnet8-{n}-ce/seed{s}" for n, s in (("bn", 0), ("bn", 1), ("gn", 0))]
    assert all(schema.finished(run) for run in others)
    assert [attempts(run) for run in others] == [2, 1, 1]
    assert "bn " in answer.out
    # Each number is as if nothing had happened.
    alone = "train --recipe tiny.yaml --norm bn --set train.epochs=12 --out alone --quiet"
    assert ltnorm(alone).code == 0
    [other] = schema.find_runs([tmp_path / "alone"])
    mine, other = (schema.read_result(d / schema.RESULT) for d in (killed, other.directory))
    same = ("index_sha256", "train_loss", "nll", *schema.METRICS, "steps", "images_processed")
    assert [getattr(mine, k) for k in same] == [getattr(other, k) for k in same]
    # A second start makes only what is missing.
    (failed / schema.RESULT).unlink()
    again = ltnorm(f"{command} --json")
    assert again.code == 0, again.err
    document = json.loads(again.out)
    assert (document["finished"], document["failed"]) == (4, 0)
    assert [run["result"]["seed"] for run in document["runs"]] == [0, 1, 0, 1]
    assert [attempts(run) for run in (*others, failed)] == [2, 1, 1, 2]


def test_runs_of_train_by_processes_are_those_of_one(forked, ltnorm, tmp_path):
    command = "train --recipe tiny.yaml --norm bn --seeds 0-1 --steps 3 --json"
    one = ltnorm(f"{command} --out one")
    several = ltnorm(f"{command} --out several --jobs 2")
    assert (one.code, several.code) == (0, 0), several.err
    assert "finished several" in several.err

    def told(answer):
        runs = json.loads(answer.out)["runs"]
        keys = ("seed", "fingerprint", "index_sha256", "steps", "train_loss", *schema.METRICS)
        return [[run[key] for key in keys] for run in runs]

    assert told(several) == told(one)
    assert len(told(one)) == 2
    logs = sorted((tmp_path / "several").rglob(plan.LOG))
    assert [log.parent.name for log in logs] == ["seed0", "seed1"]
    again = ltnorm(f"{command} --out several --jobs 2")
    assert "2 of 2 runs are finished" in again.err
    assert told(again) == told(one)
    ltnorm(f"{command} --out several --jobs 2 --force")
    assert [log.read_text().count(plan.ATTEMPT) for log in logs] == [2, 2]


def test_a_failed_run_of_train_by_processes_leaves_the_others(forked, ltnorm, tmp_path):
    command = "train --recipe tiny.yaml --norm bn --seeds 0-1 --steps 3 --out out"
    setting = Path(json.loads(ltnorm(f"{command} --json").out)["runs"][0]["directory"]).parent
    shutil.rmtree(setting / "seed1")
    (setting / "seed1").write_text("in the way")
    answer = ltnorm(f"{command} --jobs 2 --force --json")
    assert answer.code == 1
    assert "seed1" in answer.err
    assert "(1 of 2 runs failed)" in answer.err
    assert [run["seed"] for run in json.loads(answer.out)["runs"]] == [0]


def test_processes_of_train_are_refused_where_torchrun_or_a_gpu_is_named(failing, monkeypatch):
    assert "cuda:1" in failing("train --seeds 0-1 --jobs 2 --device cuda:1", code=2)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert "torchrun" in failing("train --seeds 0-1 --jobs 2", code=2)


def test_two_sweeps_of_one_tree_share_the_work(forked, ltnorm, tmp_path):
    command = f"{FOUR} --set train.epochs=4"
    other = Forked(
        ["", "-m", "ltnorm.sweep.child", *command.split()],
        stdin=None,
        stdout=None,
        stderr=(tmp_path / "other").open("w"),
        env={},
        process_group=0,
    )
    answer = ltnorm(command)
    other.wait()
    assert (answer.code, other.returncode) == (0, 0), (tmp_path / "other").read_text()
    runs = [SETTING / f"resnet8-{norm}-ce/seed{seed}" for norm in ("bn", "gn") for seed in (0, 1)]
    assert [attempts(run) for run in runs] == [1] * 4
    for told in (answer.err, (tmp_path / "other").read_text()):
        assert told.count("finished results/") == 4


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_sweep_that_is_ended_ends_its_runs_in_order(forked, failing, tmp_path, sent, code):
    first = tmp_path / SETTING / "resnet8-bn-ce/seed0"
    pids = []
    when_under_way(first, lambda pid: (pids.append(pid), os.kill(os.getpid(), sent)))
    start = time.monotonic()
    told = failing(f"{FOUR} --set train.epochs=9999 --quiet", code=code)
    assert time.monotonic() - start < 30
    assert "interrupted, 0 of 4 runs finished" in told
    assert state.read_status(first).state is state.State.unfinished  # it could still tell so
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_a_run_ends_with_its_parent(monkeypatch):
    read, write = os.pipe()
    if not (pid := os.fork()):
        os.close(write)
        os.dup2(read, 0)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
        threading.Thread(target=child._end_with_parent, daemon=True).start()
        time.sleep(30)
        os._exit(0)
    os.close(read)
    time.sleep(0.1)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143


@dataclasses.dataclass(eq=False)
class FakeJob:
    """A run that ends as `codes` say, attempt by attempt."""

    directory: Path
    codes: list
    first: Path | None = None
    held: int = 0
    done: bool = False

    @property
    def log(self):
        return self.directory / plan.LOG

    def result(self):
        return "result" if self.done else None

    def status(self):
        return None

    def is_running(self):
        self.held -= 1
        return self.held >= 0


class FakeLauncher:
    """Makes `room` fake runs at a time, at once."""

    immediate = True

    def __init__(self, room):
        self.room, self.started, self.flags = room, [], []

    def has_room(self, running):
        return running < self.room

    def start(self, job, number, force=()):
        self.started.append(job)
        self.flags.append(" ".join(force))
        code = job.codes.pop(0)
        if isinstance(code, Exception):
            raise code
        job.done = code == 0
        return type("Attempt", (), {"ended": lambda _: code})()


def test_what_is_tried_again_and_what_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "POLL", 0.0)
    monkeypatch.setattr(work, "LOOK", 0.0)
    fates = {
        "well": [0],
        "lost once": [-9, 0],
        "told to end": [143, 0],
        "lost always": [-9, work.LOST, -11],
        "an error": [1],
        "no result": [0],
        "no room": [LtnormError("disk full", "free it")],
    }
    jobs = {name: FakeJob(tmp_path / name, codes) for name, codes in fates.items()}
    jobs["no result"].result = lambda: None
    jobs["elsewhere"] = FakeJob(tmp_path / "elsewhere", [0], held=3)
    jobs["finished"] = FakeJob(tmp_path / "finished", [], done=True)
    first = tmp_path / "first"
    jobs |= {f"second {i}": FakeJob(tmp_path / f"second{i}", [0], first) for i in (1, 2)}
    told = []
    launcher = FakeLauncher(room=3)
    made = work.Work.of(list(jobs.values()), False, lambda what, job, why: told.append((what, job)))
    assert (made.before, made.total) == (1, len(jobs))
    made.carry_out(launcher, retries=2, force=False, watch=lambda: None)
    failed = {failure.job.directory.name: failure for failure in made.failed}
    assert set(failed) == {"lost always", "an error", "no result", "no room"}
    assert set(made.finished) == {j for n, j in jobs.items() if n not in failed}
    assert made.total == len(jobs)
    assert (failed["no room"].error, failed["no room"].hint) == ("disk full", "free it")
    assert failed["lost always"].error == "its process was killed (signal 11), 3 times"
    assert [launcher.started.count(jobs[n]) for n in ("lost once", "lost always")] == [2, 3]
    assert jobs["finished"] not in launcher.started
    assert sum(what == "lost" for what, _ in told) == 4
    # Two second stages of one first do not make it both at a time.
    two = [FakeJob(tmp_path / f"two{i}", [None], first) for i in (1, 2)]
    made = work.Work.of(two, False, lambda *_: None)
    for _ in two:
        made._start(made.waiting.pop(0), launcher, False)
    assert (len(made.running), made.elsewhere) == (1, [two[1]])


def test_a_first_stage_that_runs_share_is_repeated_once(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "POLL", 0.0)
    monkeypatch.setattr(work, "LOOK", 0.0)
    first = FakeJob(tmp_path / "first", [0], done=True)
    seconds = [FakeJob(tmp_path / f"second{i}", [0], first.directory, done=True) for i in (1, 2)]
    (first.directory).mkdir()
    (first.directory / schema.RESULT).touch()  # finished, from before
    for jobs, flags in (
        ([*seconds, first], ["--force", "--force --keep-first"]),
        ([first, *seconds], ["--force", "--force --keep-first", "--force --keep-first"]),
    ):
        for job in jobs:
            job.codes = [0]
        launcher = FakeLauncher(room=3)
        made = work.Work.of(jobs, True, lambda *_: None)
        made.carry_out(launcher, retries=0, force=True, watch=lambda: None)
        assert launcher.flags == flags
        assert set(made.finished) == set(jobs)


def test_who_tells_nothing_more_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "POLL", 0.01)
    monkeypatch.setattr(work, "LOOK", 0.0)
    monkeypatch.setattr(work, "WATCH", 0.2)
    job, told = FakeJob(tmp_path / "run", [0], held=1 << 30), []
    words = iter([1, 1, 2, *[3] * 10_000])  # its status goes on for a while
    job.status = lambda: next(words)
    made = work.Work.of([job], False, lambda what, *_: told.append(what))
    made.carry_out(FakeLauncher(room=1), retries=0, force=False, watch=lambda: None)
    assert told == ["held", "finished"]


def test_a_failure_is_told_in_the_words_of_its_last_attempt(tmp_path):
    job = FakeJob(tmp_path, [])
    job.log.write_text(
        f"{plan.ATTEMPT}1\nerror: old\nhint: old\n{plan.ATTEMPT}2\nnoise\nerror: new\nhint: mend\n"
    )
    failure = work.explain(job, 1, 2)
    assert (failure.error, failure.hint) == ("new", "mend")
    job.log.write_text(f"{plan.ATTEMPT}1\nerror: old\nhint: old\n{plan.ATTEMPT}2\nKilled\n")
    assert work.explain(job, 1, 2).error == "its process ended with exit code 1"


def test_each_run_gets_a_gpu_or_a_part_of_one():
    assert local.places(None, None, []) == [None]
    assert local.places(3, 0, ["0"]) == [None] * 3
    assert local.places(None, None, ["2", "3"]) == ["2", "3"]
    assert local.places(3, None, ["2", "3"]) == ["2", "3", "2"]
    assert sorted(local.places(None, 0.5, ["2", "3"])) == ["2", "2", "3", "3"]
    assert len(local.places(None, 1 / 3, ["0"])) == 3
    for wrong in ((5, 0.5, ["0", "1"]), (None, 0.5, [])):
        with pytest.raises(UsageError):
            local.places(*wrong)


def test_children_get_their_gpu_and_their_share_of_the_cores(tiny_recipe, tmp_path, monkeypatch):
    started = []

    def popen(command, **options):
        started.append((command, options["env"]))
        return type("Alive", (), {"poll": lambda _: None, "pid": len(started)})()

    monkeypatch.setattr(local.subprocess, "Popen", popen)
    pinned = {}
    monkeypatch.setattr(local, "pin", pinned.__setitem__)
    monkeypatch.setattr(local, "usable", lambda: [*range(4), *range(8, 12)])
    monkeypatch.setattr(local, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launcher = local.Local(["0", "1", "0", "1"], ["--out", "x"])
    for i in range(4):
        assert launcher.has_room(i)
        job = plan.Job(tiny_recipe(seed=i), {}, tmp_path / str(i), None, None)
        launcher.start(job, 1)
    assert not launcher.has_room(4)
    assert sorted(env["CUDA_VISIBLE_DEVICES"] for _, env in started) == ["0", "0", "1", "1"]
    assert {env["OMP_NUM_THREADS"] for _, env in started} == {"2"}
    assert all(command[-2:] == ["--workers", "2"] for command, _ in started)
    assert pinned == {1: (0, 1), 2: (2, 3), 3: (8, 9), 4: (10, 11)}
    assert (tmp_path / "3" / schema.RECIPE).read_text() == tiny_recipe(seed=3).to_yaml()


@given(st.sets(st.integers(0, 99), min_size=1), st.integers(1, 120))
def test_cores_are_divided_evenly(numbers, count):
    shares = cores.divided(sorted(numbers), count)
    assert len(shares) == count
    assert [number for share in shares for number in share] == sorted(numbers)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("places", "allowed", "threads"), [(1, 2, ""), (3, 2, ""), (2, 1, ""), (2, 2, "2")]
)
def test_runs_keep_to_no_cores_where_they_would_lack_some(monkeypatch, places, allowed, threads):
    monkeypatch.setattr(local, "usable", lambda: [4, 5])
    monkeypatch.setattr(local, "cores", lambda: allowed)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert local.Local([None] * places, [])._shares == [()] * places


def test_a_container_has_no_more_cores_than_its_share_of_time(monkeypatch, tmp_path):
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "usable", lambda: list(range(8)))
    (tmp_path / "outer" / "own").mkdir(parents=True)
    monkeypatch.setattr(cores, "SELF", tmp_path / "self")
    assert cores.cores() == 8
    (tmp_path / "self").write_text("4:memory:/x\n0::/outer/own\n")
    assert cores.cores() == 8
    (tmp_path / "outer" / "own" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "outer" / "cpu.max").write_text("250000 100000\n")
    assert cores.cores() == 3


def test_a_process_is_kept_on_its_cores():
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system keeps no process on cores")
    core = cores.usable()[-1]
    process = subprocess.Popen(["sleep", "60"])
    cores.pin(process.pid, [core])
    assert os.sched_getaffinity(process.pid) == {core}
    process.kill()
    process.wait()
    cores.pin(process.pid, [core])  # it has ended: nothing to be said


# --- what is told


def test_a_dry_run_tells_states_and_time(ltnorm, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "_start_up", lambda: 100.0)
    ltnorm("train --recipe tiny.yaml --norm bn --quiet")
    answer = ltnorm(f"{FOUR} --grid train.lr=0.05,0.1 --jobs 3 --dry-run")
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert lines[2].split()[:6] == [f"{SETTING}/resnet8-bn-ce", "0-1", "1", "finished,", "1", "new"]
    assert "8 runs: 1 finished, 7 new" in lines
    assert "about 5 min" in lines[-1]  # seven of 100 s, three at a time
    assert "3 at a time; the longest run 1 min 4" in lines[-1]
    measured = ltnorm("sweep --recipe tiny.yaml --steps 1000 --dry-run --json")
    seconds = json.loads(measured.out)["seconds"] - 100
    assert 1 < seconds < 1000  # a step of 16 tiny images: 1 ms to 1 s


@given(seconds=st.lists(st.floats(0, 1e4), max_size=20), places=st.integers(1, 5))
def test_an_estimate_lies_between_even_shares_and_one_after_the_other(seconds, places):
    total = estimate.makespan(seconds, places)
    longest = max(seconds, default=0.0)
    assert max(longest, sum(seconds) / places) <= total + 1e-6
    assert total <= sum(seconds) / places + longest + 1e-6


def test_the_live_table_tells_what_goes_on(tiny_recipe, tmp_path):
    out = tmp_path / "results"
    jobs = [plan.Job(tiny_recipe(seed=i), {}, out / f"a/seed{i}", None, None) for i in range(5)]
    output = Output()
    output.err = rich.console.Console(file=io.StringIO(), width=100, height=24, force_terminal=True)
    shown = progress.Progress(output, out)
    made = shown.work = work.Work(jobs[2:], lambda *_: None)
    with state.under_way(_folder(jobs[0])) as under_way:
        under_way.tell(0.25, 5, 20)
        made.waiting, made.running = jobs[3:], [work.Running(job, None) for job in jobs[:2]]
        made.failed = [work.Failure(jobs[2], "x", "y")]
        shown.began -= 100
        output.err.print(shown.table())
    text = output.err.file.getvalue()
    assert "0 of 5 runs finished · 1 failed · 2 running · 2 waiting" in text
    assert "1 min 40 s so far · about 5 min left" in text
    for part in ("a/seed0", "25 %", "epoch 5/20", "a/seed1", "starting"):
        assert part in text


def _folder(job):
    job.directory.mkdir(parents=True)
    return job.directory


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.6, "1 min"),
        (100, "1 min 40 s"),
        (3600 * 3 + 125, "3 h 2 min"),
        (2e5, "2 d 7 h"),
    ],
)
def test_a_duration_has_two_units(seconds, text):
    assert progress.duration(seconds) == text


# --- Slurm


@pytest.fixture
def slurm(tmp_path):
    """Run docs/slurm.sh with stubs on the PATH: slurm(script of ltnorm, variables, arguments)."""
    stubs = {"srun": 'exec "$@"', "scontrol": f'echo "$@" > {tmp_path}/queued'}

    def start(ltnorm, variables, *arguments):
        for name, body in (stubs | {"ltnorm": ltnorm}).items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / name).chmod(0o755)
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"} | variables
        command = ["bash", str(PROJECT / "docs" / "slurm.sh"), *arguments]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    return start


def array(ids, task, step=1):
    values = {"ID": task, "MIN": min(ids), "MAX": max(ids), "COUNT": len(ids), "STEP": step}
    return {f"SLURM_ARRAY_TASK_{key}": str(value) for key, value in values.items()}


@pytest.mark.parametrize(("ids", "step"), [(range(1, 4), 1), (range(3), 1), (range(2, 13, 5), 5)])
def test_the_tasks_of_an_array_are_the_parts(slurm, ids, step):
    given = ("my sweep.yaml", "--set", "tag=a b", "--exclude", "norm=gn,ratio=10", "")
    for place, task in enumerate(ids, start=1):
        process = slurm('printf "%s\\0" "$@"', array(list(ids), task, step), *given)
        out, _ = process.communicate()
        assert process.returncode == 0
        expected = ["sweep", *given, "--part", f"{place}/{len(ids)}"]
        assert out.decode().split("\0")[:-1] == expected


def test_an_array_with_gaps_and_none_are_refused(slurm):
    for variables in (array([1, 2, 7], 7), {}):
        process = slurm("echo made", variables)
        out, _ = process.communicate()
        assert process.returncode != 0
        assert b"array" in out
        assert b"made" not in out


@pytest.mark.parametrize(("code", "queued"), [(143, True), (0, False)])
def test_a_task_whose_time_is_over_is_queued_again(slurm, tmp_path, code, queued):
    body = f"trap 'exit {code}' TERM; echo ready; while :; do sleep 0.05; done"
    process = slurm(body, array([1], 1))
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=20)
    assert process.returncode == code
    assert (tmp_path / "queued").exists() == queued
    if queued:
        assert (tmp_path / "queued").read_text() == "requeue 77\n"


def test_a_failed_task_is_not_queued_again(slurm, tmp_path):
    process = slurm("exit 1", array([1], 1))
    process.communicate()
    assert process.returncode == 1
    assert not (tmp_path / "queued").exists()
