"""What becomes of a run: told by real processes that are killed, stopped, or met by another."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from conftest import TINY
from hypothesis import example, given
from hypothesis import strategies as st
from test_compare import result

from ltnorm.errors import LtnormError
from ltnorm.reporting import schema, state
from ltnorm.reporting.state import State

BN = "results/synthetic-exp10/resnet8-bn-ce/seed0"
GN = "results/synthetic-exp10/resnet8-gn-ce/seed0"
LONG = ["--epochs", "100000", "--quiet"]
SHORT = ["--set", "train.seconds=3", "--quiet"]


def started(folder, *more):
    """A real `ltnorm train` of BN in a folder."""
    folder.mkdir()
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    command = [sys.executable, "-m", "ltnorm", "train", "--recipe", "tiny.yaml", "--norm", "bn"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *more], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def training(tmp_path):
    """Start a training in a folder of its own, to be killed, stopped, or met."""
    made = []

    def start(*budget):
        made.append(started(tmp_path / "other", *budget))
        return tmp_path / "other", made[-1]

    yield start
    for process in made:
        process.kill()
        process.communicate()


def seen(folder: Path) -> state.RunState | None:
    runs = schema.find_runs([folder / BN])
    return state.read(runs[0]) if runs else None


def when(folder: Path, condition) -> state.RunState:
    """The state of a run once the condition holds for it."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if (folder / BN).is_dir() and (found := seen(folder)) and condition(found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"never so in {folder}: {seen(folder)}")


def test_a_run_that_another_process_makes_is_told(training):
    folder, process = training(*SHORT)
    running = when(folder, lambda run: run.fraction)
    assert (running.state, running.pid) == (State.running, process.pid)
    with pytest.raises(state.Busy) as caught, state.under_way(folder / BN):
        pytest.fail("is held")
    assert f"{BN} (process {process.pid} on" in caught.value.message
    assert "`ltnorm runs`" in caught.value.hint
    assert process.wait(timeout=60) == 0
    assert seen(folder).state is State.finished
    assert not (folder / BN / state.STATUS).exists()


def test_a_killed_run_is_unfinished_with_its_progress(training):
    folder, process = training(*LONG)
    running = when(folder, lambda run: run.epoch)
    assert running.state is State.running
    assert 0 < running.fraction < 1
    process.kill()
    process.wait()
    left = seen(folder)
    assert left.state is State.unfinished
    assert left.epoch >= running.epoch
    assert left.epochs == 100000
    assert "without a word" in left.error
    assert "same `ltnorm train`" in left.hint
    with state.under_way(folder / BN) as run:  # the lock has gone with its process
        assert run.status.locked


def test_a_stopped_run_says_that_it_was_interrupted(training):
    folder, process = training(*LONG)
    when(folder, lambda run: run.epoch)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    left = seen(folder)
    assert (left.state, left.error) == (State.unfinished, "interrupted")
    assert left.epoch > 0


def test_a_failed_run_says_why_until_it_is_made(ltnorm, tmp_path):
    command = "train --recipe tiny.yaml --norm bn --tag t"
    where = tmp_path / f"{BN.removesuffix('/seed0')}-t/seed0"
    assert ltnorm(f"{command} --lr 1e30").code == 1
    [run] = schema.find_runs([tmp_path])
    failed = state.read(run)
    assert failed.state is State.failed
    assert "the loss became" in failed.error
    assert "--lr" in failed.hint
    assert failed.directory == where
    assert ltnorm(f"{command} --lr 1e30 --force").code == 1  # another attempt, the same end
    assert state.read(run).state is State.failed


def test_both_stages_tell_their_progress(ltnorm, monkeypatch):
    told, tell = {}, state.UnderWay.tell

    def spy(self, *progress):
        told.setdefault(self.file.parent.parent.name, []).append(progress)
        tell(self, *progress)

    monkeypatch.setattr(state.UnderWay, "tell", spy)
    retrain = "--set retrain.method=crt --set retrain.epochs=3"
    assert ltnorm(f"train --recipe tiny.yaml --norm bn {retrain} --quiet").code == 0
    assert set(told) == {"resnet8-bn-ce", "resnet8-bn-ce-crt"}
    for name, epochs in (("resnet8-bn-ce", 2), ("resnet8-bn-ce-crt", 3)):
        fractions = [fraction for fraction, *_ in told[name]]
        assert fractions == sorted(fractions)
        assert told[name][-1] == (1.0, epochs, epochs)
        assert {epoch for _, epoch, _ in told[name]} >= set(range(1, epochs + 1))


def made(directory: Path, **changes) -> schema.Run:
    """A folder of a run that has told something, by default just now and elsewhere."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / schema.RECIPE).write_text("seed: 0\n")
    now = datetime.now(UTC).isoformat()
    status = state.Status(State.running, 0.3, 12, 40, now, now, "elsewhere", 1, True)
    told = vars(status) | changes
    (directory / state.STATUS).write_text(json.dumps(told))
    (directory / state.LOCK).touch()
    [run] = schema.find_runs([directory])
    return run


AGO = (datetime.now(UTC) - timedelta(hours=1)).isoformat()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, State.running),
        ({"updated": AGO}, State.unfinished),
        ({"host": None}, State.unfinished),  # ours, and its lock is free
        ({"host": None, "locked": False}, State.running),
        ({"host": None, "locked": False, "updated": AGO}, State.unfinished),
        ({"state": "failed", "error": "boom"}, State.failed),
        ({"state": "unfinished"}, State.unfinished),
    ],
)
def test_where_no_lock_is_seen_what_was_told_lately_counts(tmp_path, changes, expected):
    if "host" in changes:
        changes = changes | {"host": os.uname().nodename}
    assert state.read(made(tmp_path, **changes)).state is expected


def test_a_held_lock_says_more_than_the_clock(tmp_path):
    run = made(tmp_path, updated=AGO)
    with state._locked(tmp_path):
        assert state.read(run).state is State.running
    assert state.read(run).state is State.unfinished


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    import fcntl

    def lockless(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", lockless)
    with state.under_way(tmp_path) as run:
        run.tell(0.5, 1, 2)
        (tmp_path / schema.RECIPE).touch()
        assert state.read(schema.find_runs([tmp_path])[0]).state is State.running
    with pytest.raises(ValueError, match="x"), state.under_way(tmp_path):
        raise ValueError("x")
    assert state.read(schema.find_runs([tmp_path])[0]).state is State.failed


def test_a_process_that_tells_nothing_is_heard_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "PULSE", 0.02)
    with state.under_way(tmp_path) as run:
        for _ in range(3):  # written again and again
            (tmp_path / state.STATUS).unlink()
            end = time.monotonic() + 10
            while not (tmp_path / state.STATUS).exists() and time.monotonic() < end:
                time.sleep(0.01)
            assert state.read_status(tmp_path).pid == run.status.pid
    time.sleep(0.1)
    assert not (tmp_path / state.STATUS).exists()  # and no more once it is over


@contextlib.contextmanager
def another_host(directory: Path, seconds: float):
    """A process of another host, whose lock is not seen here, tells of a run so long."""
    made(directory)
    told = json.loads((directory / state.STATUS).read_text())

    def beat():
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            told["fraction"] += 1e-3  # (its clock stands still)
            schema.write_text(directory / state.STATUS, json.dumps(told))
            time.sleep(0.02)

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    thread.join()


def test_a_lock_that_other_hosts_do_not_see_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "WATCH", 0.5)
    with another_host(tmp_path, 0.3):
        with pytest.raises(state.Busy, match="process 1 on elsewhere"), state.under_way(tmp_path):
            pytest.fail("is made elsewhere")
        start = time.monotonic()
        with state.under_way(tmp_path, wait=True):  # until nothing is heard of it any more
            assert time.monotonic() - start > 0.5
    with another_host(tmp_path, 0.0), state.under_way(tmp_path) as run:  # killed long ago
        assert run.status.host == socket.gethostname()


def test_a_killed_process_of_this_host_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "WATCH", 60)
    made(tmp_path, host=socket.gethostname(), locked=True)
    start = time.monotonic()
    with state.under_way(tmp_path):
        assert time.monotonic() - start < 10


def test_a_clock_that_was_set_back_keeps_nothing_running(tmp_path):
    ahead = (datetime.now(UTC) + timedelta(days=2)).isoformat()
    run = made(tmp_path, host="elsewhere", locked=False, updated=ahead)
    assert state.read(run).state is State.unfinished


def test_a_result_counts_whatever_became_of_repeating_it(tmp_path):
    made(tmp_path, state="failed", error="boom", hint="mend it")
    schema.write_result(tmp_path, result(finished="2026-01-02T03:04:05+00:00", epochs=29.5))
    [run] = schema.find_runs([tmp_path])
    found = state.read(run)
    assert (found.state, found.fraction, found.epoch, found.error) == (
        State.finished,
        1.0,
        30,
        "boom",
    )
    assert found.updated == "2026-01-02T03:04:05+00:00"
    assert state.unfinished([run]) == []
    with state.under_way(tmp_path):  # repeated
        [run] = schema.find_runs([tmp_path])
        assert state.read(run).state is State.running


def test_a_run_that_says_nothing_is_unfinished(tmp_path):
    (tmp_path / schema.RECIPE).write_text("")
    [run] = schema.find_runs([tmp_path])
    found = state.read(run, size=True)
    assert (found.state, found.fraction, found.size) == (State.unfinished, None, 0)
    assert datetime.now(UTC) - datetime.fromisoformat(found.updated) < timedelta(minutes=1)
    assert state.unfinished([run])[0].directory == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == [schema.RECIPE]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)
KEYS = [*state.Status.__dataclass_fields__]


@given(key=st.sampled_from(KEYS), value=JSON)
@example(key="fraction", value=2)
def test_any_value_in_a_status_is_read_or_told(tmp_path_factory, key, value):
    directory = tmp_path_factory.getbasetemp() / "values"
    found = state.read(made(directory, **{key: value}))
    assert found.state in (State.running, State.failed, State.unfinished, State.damaged)
    if found.state is State.damaged:
        assert state.STATUS in found.error
    else:
        assert 0 <= found.fraction <= 1
        datetime.fromisoformat(found.updated)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_damaged_status_never_ends_the_listing(tmp_path_factory, content):
    directory = tmp_path_factory.getbasetemp() / "contents"
    run = made(directory)
    (directory / state.STATUS).write_bytes(content)
    found = state.read(run)
    assert found.state is State.damaged
    assert str(directory / state.STATUS) in str(found)


def test_a_damaged_result_is_told_with_its_path(tmp_path):
    (tmp_path / schema.RESULT).write_text("schema,fingerprint\n")
    [run] = schema.find_runs([tmp_path])
    found = state.read(run)
    assert found.state is State.damaged
    assert str(tmp_path / schema.RESULT) in found.error


def test_a_run_goes_on_where_its_status_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / state.STATUS).mkdir()
    with state.under_way(tmp_path) as run:
        run.tell(0.5, 1, 2)
    with contextlib.suppress(LtnormError), state.under_way(tmp_path):
        raise LtnormError("the error of the run", "it is what is told")


def test_a_status_is_written_once_an_epoch_or_second(tmp_path, monkeypatch):
    writes, write = [], schema.write_text
    monkeypatch.setattr(schema, "write_text", lambda *a, **m: (writes.append(a[0]), write(*a)))
    with state.under_way(tmp_path) as run:
        for step in range(100):
            run.tell(step / 200, 0, 2)
        assert len(writes) <= 2  # the start, and a second on a slow machine
        for epoch in range(1, 4):
            before = len(writes)
            run.tell(epoch / 3, epoch, 3)
            assert len(writes) == before + 1
            assert state.read_status(tmp_path).epoch == epoch
        monkeypatch.setattr(state, "SECONDS", 0.0)
        run.tell(1.5, 3, 3)
        assert state.read_status(tmp_path).fraction == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == [state.LOCK]


def test_runs_and_results_are_found_in_one_order_once(tmp_path):
    for place in ("b/seed1", "b/seed0", "a/seed0"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / schema.RECIPE).touch()
    schema.write_result(tmp_path / "b/seed1", result())
    (tmp_path / "c").mkdir()  # no run
    row = tmp_path / "b/seed1" / schema.RESULT
    runs = schema.find_runs([tmp_path, row, tmp_path / "b"])
    assert [str(run.directory.relative_to(tmp_path)) for run in runs] == [
        "a/seed0",
        "b/seed0",
        "b/seed1",
    ]
    assert [run.result for run in schema.find_runs([tmp_path]) if run.result] == [row]
    assert [str(run.directory) for run in state.unfinished(runs)] == [
        str(tmp_path / place) for place in ("a/seed0", "b/seed0")
    ]
