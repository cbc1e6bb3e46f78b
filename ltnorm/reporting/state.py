"""How far a run is: what it says of itself while it is made, and what its directory tells.

    lock         held by the process that makes the run; the system frees it when that ends
    status.json  how far it is, or how it ended before its time; gone once it is finished

Both lie in the run's directory, beside what `schema` tells of.
"""

import contextlib
import errno
import json
import math
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from ltnorm.errors import LtnormError
from ltnorm.reporting import schema

LOCK, STATUS = "lock", "status.json"
AGAIN = "give the same `ltnorm train` or `retrain` command again"
# A status is written at the end of each epoch, and in between not more often than this.
SECONDS = 1.0
# Who only looks whether a lock is held, holds it for a moment: training waits so long for that,
# and who looks for another that looks.
PATIENCE, GLANCE = 0.5, 0.01
# A process that makes a run tells so at least so often, and who cannot trust a lock watches so long
# whether it does.
PULSE, WATCH = 10.0, 25.0
# Where a lock cannot be seen, a run that has told something since then counts as running.
FRESH = timedelta(minutes=15)
LOCKLESS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


class Busy(LtnormError):
    """Another process makes the run."""


class State(StrEnum):
    """What has become of a run."""

    finished = "finished"
    running = "running"
    failed = "failed"
    unfinished = "unfinished"
    damaged = "damaged"


@dataclass(frozen=True)
class Status:
    """What status.json says.

    Attributes:
        state: running, failed, or unfinished (interrupted); a killed process leaves "running".
        fraction: of training that is done, 0 .. 1.
        epoch, epochs: that are done, and how many there will be, where that is known.
        started, updated: UTC, ISO 8601.
        host, pid: of the process.
        locked: whether that holds the lock; some network file systems have none.
        error, hint: why it ended.
    """

    state: State
    fraction: float
    epoch: int
    epochs: int | None
    started: str
    updated: str
    host: str
    pid: int
    locked: bool
    error: str | None = None
    hint: str | None = None


class UnderWay:
    """A run that this process makes: keeps its status.json, as well as it can."""

    def __init__(self, directory: Path, locked: bool) -> None:
        self.file, self.written = directory / STATUS, 0.0
        host, pid, now = socket.gethostname(), os.getpid(), _now()
        self.status = Status(State.running, 0.0, 0, None, now, now, host, pid, locked)
        self._writing, self._ended = threading.Lock(), threading.Event()
        self._write()
        threading.Thread(target=self._beat, name="status", daemon=True).start()

    def tell(self, fraction: float, epoch: int, epochs: int | None) -> None:
        """So much of training is done, and so many epochs, of so many."""
        due = epoch != self.status.epoch or time.monotonic() - self.written >= SECONDS
        told = {"fraction": min(fraction, 1.0), "epoch": epoch, "epochs": epochs}
        if due:
            self._write(**told)
        else:
            with self._writing:
                self.status = replace(self.status, **told)

    def fail(self, error: BaseException) -> None:
        """The run ends here."""
        if isinstance(error, LtnormError):
            state, what, hint = State.failed, error.message, error.hint
        elif isinstance(error, Exception):
            what = f"{type(error).__name__}: {error}"
            state, hint = State.failed, "LTNORM_DEBUG=1 shows where it happened"
        else:  # Ctrl-C, SIGTERM
            state, what, hint = State.unfinished, "interrupted", AGAIN
        self._ended.set()
        self._write(state=state, error=what, hint=hint)

    def finish(self) -> None:
        """Its result is there."""
        self._ended.set()
        with self._writing, contextlib.suppress(OSError):
            self.file.unlink(missing_ok=True)

    def _beat(self) -> None:
        """Write now and then what is known, also while nothing is told."""
        while not self._ended.wait(PULSE):
            self._write(beat=True)

    def _write(self, beat: bool = False, **changes: Any) -> None:
        # A run must not fail because it cannot tell of itself.
        with self._writing, contextlib.suppress(OSError):
            if beat and self._ended.is_set():
                return
            self.status = replace(self.status, updated=_now(), **changes)
            self.written = time.monotonic()
            text = json.dumps(asdict(self.status), indent=2) + "\n"
            schema.write_text(self.file, text, sync=False)


@contextlib.contextmanager
def under_way(directory: Path, wait: bool = False) -> Iterator[UnderWay]:
    """Hold the lock of a run while it is made, and keep its status.

    Raises:
        Busy: another process makes the run, unless this is to `wait` for its end.
        LtnormError: the lock cannot be made.
    """
    with _locked(directory, wait) as locked:
        while (other := _other(directory, locked)) and _goes_on(directory, other):
            if not wait:
                raise _busy(directory)
        run = UnderWay(directory, locked)
        try:
            yield run
        except BaseException as error:
            run.fail(error)
            raise
        run.finish()


@contextlib.contextmanager
def _locked(directory: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock; gives whether there is one: a file system without locks does without."""
    from filelock import FileLock, Timeout

    lock = FileLock(directory / LOCK, fallback_to_soft=False)
    try:
        lock.acquire(-1 if wait else PATIENCE, poll_interval=1 if wait else PATIENCE / 10)
    except Timeout as error:
        raise _busy(directory) from error
    except OSError as error:
        if error.errno not in LOCKLESS:
            raise LtnormError(
                f"cannot lock {directory / LOCK}: {error.strerror or error}",
                "choose another folder with --out DIR",
            ) from error
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _other(directory: Path, locked: bool) -> Status | None:
    """The status of a process that may be making a run though this one holds its lock, if any.

    There are network file systems whose locks keep out only the processes of the same host.
    """
    with contextlib.suppress(LtnormError):
        status = read_status(directory)
        if status and status.state is State.running:
            here = status.host == socket.gethostname()
            gone = status.pid == os.getpid() or (locked and status.locked)
            return None if here and gone else status
    return None


def _goes_on(directory: Path, other: Status) -> bool:
    """Whether a process still tells of a run. The clocks of two hosts differ: this watches."""
    ends = time.monotonic() + WATCH
    while time.monotonic() < ends:
        time.sleep(min(1.0, WATCH / 10))
        now = _other(directory, False)
        if now != other:
            return now is not None
    return False


def _busy(directory: Path) -> Busy:
    return Busy(
        f"another process is making {directory}{_maker(directory)}",
        "`ltnorm runs` shows how far it is; once it is finished it is skipped",
    )


def _maker(directory: Path) -> str:
    with contextlib.suppress(LtnormError):
        if status := read_status(directory):
            return f" (process {status.pid} on {status.host})"
    return ""


def read_status(directory: Path) -> Status | None:
    """What a run says of itself, or None.

    Raises:
        LtnormError: its status.json is damaged.
    """
    file = directory / STATUS
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        return _parse(told)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise LtnormError(f"{file} is damaged: {error}", AGAIN) from error


def _parse(told: Any) -> Status:
    values: dict[str, Any] = {}
    for field in fields(Status):
        if not isinstance(told, Mapping) or field.name not in told:
            raise ValueError(f"it has no {field.name}")
        value = values[field.name] = told[field.name]
        kind = {float: int | float, State: str}.get(field.type, field.type)
        # To Python, true and false are numbers.
        fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if not fits or (isinstance(value, int | float) and not 0 <= value < 1e15):
            raise ValueError(f"its {field.name} is {value!r:.40}")
    if values["fraction"] > 1:
        raise ValueError(f"its fraction is {values['fraction']}")
    _time(values["started"]), _time(values["updated"])
    values["state"] = State(values["state"])
    if values["state"] not in (State.running, State.failed, State.unfinished):
        raise ValueError(f"its state is {values['state']}")
    return Status(**values)


@dataclass(frozen=True)
class RunState:
    """What has become of a run, as far as its directory tells; None is what it does not tell.

    Attributes:
        directory: of the run.
        state: see `read`.
        fraction, epoch, epochs: see `Status`; epochs of a finished run are those of all stages.
        started: UTC, ISO 8601; the last time that it was begun.
        updated: when it was finished, or told something last.
        host, pid: of the process that made it, until it is finished.
        size: of its files, in bytes, where that is asked for.
        error, hint: why it is not finished. A finished run has them if repeating it failed.
    """

    directory: Path
    state: State
    fraction: float | None = None
    epoch: int | None = None
    epochs: int | None = None
    started: str | None = None
    updated: str | None = None
    host: str | None = None
    pid: int | None = None
    size: int | None = None
    error: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        """In one line: path, state, how far, and why."""
        done = "" if self.fraction is None else f", {100 * self.fraction:.0f} % done"
        why = f": {self.error}" if self.error else ""
        return f"{self.directory} is {self.state}{done}{why}"


def states(runs: Sequence[schema.RunFolder], size: bool = False) -> list[RunState]:
    """What has become of each run."""
    return [read(run, size) for run in runs]


def unfinished(runs: Sequence[schema.RunFolder]) -> list[RunState]:
    """Of runs those without a result: running, failed, unfinished or damaged."""
    return states([run for run in runs if not run.result])


def read(run: schema.RunFolder, size: bool = False) -> RunState:
    """What has become of a run.

    - running: a process holds its lock. From another host a lock can go unseen, and some file
      systems have none; then it is one that has told something in the last 15 minutes.
    - finished: it has a result, whatever became of repeating it.
    - damaged: its result, or without one its status, cannot be read.
    - failed: it says so.
    - unfinished: anything else: it was interrupted, or its process was killed.

    Nothing is created, and nothing is raised for what lies there.
    """
    known = RunState(run.directory, State.unfinished, size=_size(run.directory) if size else None)
    try:
        status = read_status(run.directory) if STATUS in run.files else None
    except LtnormError as error:
        state = State.running if _held(run.directory) else State.damaged
        known = replace(known, state=state, error=error.message, hint=error.hint)
        status = None
    if status:
        known = _told(known, status)
    result = run.result or run.directory / schema.RESULT
    if known.state is not State.running and os.path.isfile(result):
        return _finished(known, result)
    return replace(known, updated=known.updated or _changed(run.directory))


def _told(known: RunState, status: Status) -> RunState:
    """What a status says, once it is known whether its process is there."""
    told = {f.name: getattr(status, f.name) for f in fields(Status) if f.name != "locked"}
    known = replace(known, **told)
    if status.state is not State.running or _is_running(known.directory, status):
        return known
    error = "its process ended without a word: it was killed, or the machine stopped"
    return replace(known, state=State.unfinished, error=error, hint=AGAIN)


def _is_running(directory: Path, status: Status) -> bool:
    held = _held(directory)
    if held or (held is False and status.locked and status.host == socket.gethostname()):
        return bool(held)
    return abs(datetime.now(UTC) - _time(status.updated)) < FRESH  # clocks jump and differ


def _held(directory: Path) -> bool | None:
    """Whether a process holds the lock of a run; None if that cannot be seen."""
    from filelock import FileLock, Timeout

    file = directory / LOCK
    if not os.path.isfile(file):  # trying would make it
        return False
    try:
        with FileLock(file, fallback_to_soft=False).acquire(GLANCE, poll_interval=GLANCE / 2):
            return False
    except Timeout:
        return True
    except OSError:  # not ours to write
        return None


def _finished(known: RunState, file: Path) -> RunState:
    try:
        result = schema.read_result(file)
        updated = _time(result.finished).isoformat()
    except (LtnormError, ValueError) as error:
        why = getattr(error, "message", f"{file} is damaged: {error}")
        hint = getattr(error, "hint", "`ltnorm train --force` makes it anew")
        return replace(known, state=State.damaged, error=why, hint=hint, updated=_changed(file))
    if known.started and datetime.fromisoformat(known.started) <= _time(result.finished):
        known = replace(known, error=None, hint=None)  # killed when nothing was left to do
    epochs = math.ceil(result.epochs)  # the last may be a part of one
    return replace(
        known,
        state=State.finished,
        fraction=1.0,
        epoch=epochs,
        epochs=epochs,
        updated=updated,
        host=None,
        pid=None,
    )


def _size(directory: Path) -> int:
    """Bytes of the files in a directory."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # gone since, or a broken link
                total += entry.stat().st_size if entry.is_file() else 0
    return total


def _changed(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _time(text: str) -> datetime:
    """A point in time. Raises ValueError where it has no zone, or is none."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text} has no time zone")
    return moment
