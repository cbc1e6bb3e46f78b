"""The work of a sweep: its runs, waiting, running, finished and failed, until none is left."""

import contextlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from filelock import BaseFileLock, FileLock, Timeout

from ltnorm.errors import LtnormError
from ltnorm.reporting import schema
from ltnorm.reporting.schema import Result
from ltnorm.reporting.state import WATCH, State, Status
from ltnorm.sweep.plan import ATTEMPT, Job

# Held by the sweep that makes a run.
CLAIM = "sweep.lock"
POLL = 0.25
# The exit code of a process of which nothing more is known.
LOST = -100
# How long a run's result may take from another machine through a shared folder.
SETTLE = 30.0
# Runs that another process makes are looked at again after so many seconds.
LOOK = 2.0


class Attempt(Protocol):
    """A run in the hands of a launcher."""

    def ended(self) -> int | None:
        """Its exit code; negative if its process was lost; None while it is made.

        Raises:
            LtnormError: it could not be begun.
        """


class Launcher(Protocol):
    """What makes runs. Until it is stopped, nothing is to be printed on stdout."""

    # Whether results appear at once, as on one machine.
    immediate: bool

    @property
    def places(self) -> Sequence[str | None]:
        """Those of the runs that are made at a time: a GPU, or None."""

    def precision(self, device: str, asked: str) -> tuple[str, str]:
        """What a precision is where the runs are made, and why."""

    def has_room(self, running: int) -> bool:
        """Whether another run can be started beside those that are running."""

    def start(self, job: Job, number: int, force: Sequence[str] = ()) -> Attempt:
        """Start a run, for the `number`th time, with the flags that repeat what is finished."""

    def stop(self) -> None:
        """End all that is running, in order if there is time."""


@dataclass(frozen=True)
class Failure:
    """A run that has failed: why, and what to do about it."""

    job: Job
    error: str
    hint: str


@dataclass
class Running:
    """A run that is being made."""

    job: Job
    attempt: Attempt
    claim: BaseFileLock | None = None
    started: float = field(default_factory=time.monotonic)
    # When the process had ended well, while its result was not yet seen.
    ended: float | None = None


@dataclass
class Work:
    """The runs of a sweep by what has become of them.

    Attributes:
        finished: with their results, those that were finished before included.
        before: how many those were.
        elsewhere: runs that wait for another process, which makes them or their first stage.
        tell: told of each run that finished, failed or was lost.
    """

    waiting: list[Job]
    tell: Callable[[str, Job, str], None]
    running: list[Running] = field(default_factory=list)
    finished: dict[Job, Result] = field(default_factory=dict)
    failed: list[Failure] = field(default_factory=list)
    elsewhere: list[Job] = field(default_factory=list)
    attempts: dict[Job, int] = field(default_factory=dict)
    # Runs and first stages that have been repeated, and what runs elsewhere have told, and when.
    repeated: set[Path] = field(default_factory=set)
    heard: dict[Job, tuple[Status | None, float]] = field(default_factory=dict)
    before: int = 0
    looked: float = 0.0

    @classmethod
    def of(cls, jobs: Sequence[Job], force: bool, tell: Callable[[str, Job, str], None]) -> "Work":
        """The runs that are to be made: all, or those that are not finished."""
        work = cls([], tell)
        for job in jobs:
            result = None if force else job.result()
            if result:
                work.finished[job] = result
            else:
                work.waiting.append(job)
        work.before = len(work.finished)
        return work

    @property
    def total(self) -> int:
        """How many runs there are."""
        ready = len(self.waiting) + len(self.running) + len(self.elsewhere)
        return ready + len(self.finished) + len(self.failed)

    def carry_out(
        self, launcher: Launcher, retries: int, force: bool, watch: Callable[[], None]
    ) -> None:
        """Make all runs, and go on after failures; `watch` is called meanwhile."""
        while self.waiting or self.running or self.elsewhere:
            for run in list(self.running):
                self._collect(run, retries, launcher.immediate)
            self._look_elsewhere(force)
            while self.waiting and launcher.has_room(len(self.running)):
                self._start(self.waiting.pop(0), launcher, force)
            watch()
            time.sleep(POLL)

    def release(self) -> None:
        """Leave what is running to other sweeps."""
        for run in self.running:
            _release(run.claim)

    def _start(self, job: Job, launcher: Launcher, force: bool) -> None:
        """Start a run, unless somebody else has finished it since, or is at it."""
        if (not force or job.directory in self.repeated) and (result := job.result()):
            self._finish(job, result)
        elif self._is_held(job, force) or not (claim := _claim(job)):
            self.elsewhere.append(job)
        else:
            number = self.attempts[job] = self.attempts.get(job, 0) + 1
            try:
                flags = self._force(job) if force else []
                self.running.append(Running(job, launcher.start(job, number, flags), claim))
            except LtnormError as error:
                _release(claim)
                self._fail(Failure(job, error.message, error.hint))

    def _force(self, job: Job) -> list[str]:
        """What repeats a run; a first stage that runs share is repeated once."""
        return ["--force", *(["--keep-first"] if job.first in self.repeated else [])]

    def _is_held(self, job: Job, force: bool = False) -> bool:
        """Whether a run must wait for another process that makes it, or the first of two stages.

        One of ours that was lost is free: from another machine its last words may look alive. So
        is one that has told nothing for longer than a process that makes it would be silent: who
        makes it then finds out whether it is held.
        """
        first = job.first or job.directory
        if force or (job.first and not schema.finished(first)):
            made = [part for run in self.running for part in (run.job.first, run.job.directory)]
            if first in made:
                return True
        if job in self.attempts or not job.is_running():
            return False
        told, now = job.status(), time.monotonic()
        before, since = self.heard.get(job, (None, now))
        if job not in self.heard:
            self.tell("held", job, "another process is making it")
        if job not in self.heard or told != before:
            self.heard[job] = told, now
            return True
        return now - since < WATCH

    def _look_elsewhere(self, force: bool) -> None:
        """See what has become of the runs that other processes make."""
        if time.monotonic() - self.looked < LOOK:
            return
        self.looked = time.monotonic()
        still = [job for job in self.elsewhere if self._is_held(job, force)]
        self.waiting += [job for job in self.elsewhere if job not in still]
        self.elsewhere = still

    def _collect(self, run: Running, retries: int, immediate: bool) -> None:
        """See whether a run has ended, and how."""
        job, now = run.job, time.monotonic()
        try:
            code = run.attempt.ended()
        except LtnormError as error:
            self._end(run)
            self._fail(Failure(job, error.message, error.hint))
            return
        if code is None:
            return
        if code == 0:
            run.ended = run.ended or now
            if result := job.result():
                self._end(run)
                self._finish(job, result)
            elif immediate or now - run.ended > SETTLE:
                self._end(run)
                error = f"it ended well, but its result is not in {job.directory}"
                hint = "all machines must share the folders of --out and --data-dir"
                self._fail(Failure(job, error, hint))
            return
        self._end(run)
        # A process that was asked to end (143) was not asked by us.
        lost = code < 0 or code in (130, 143)
        if lost and self.attempts[job] <= retries:
            self.waiting.insert(0, job)
            times = f"{self.attempts[job]} of {retries}"
            self.tell("lost", job, f"{_fate(code)}; trying again, {times}")
        else:
            self._fail(explain(job, code, self.attempts[job]))

    def _end(self, run: Running) -> None:
        self.running.remove(run)
        _release(run.claim)

    def _finish(self, job: Job, result: Result) -> None:
        self.repeated |= {job.directory, *filter(None, [job.first])}
        self.finished[job] = result
        self.tell("finished", job, "")

    def _fail(self, failure: Failure) -> None:
        self.failed.append(failure)
        self.tell("failed", failure.job, failure.error)


def _claim(job: Job) -> BaseFileLock | None:
    """A lock that keeps other sweeps off a run, also while its process starts; None: they have it.

    Where it cannot be had, the run's own lock decides, and the run tells what is wrong.
    """
    lock = FileLock(job.directory / CLAIM, fallback_to_soft=False)
    with contextlib.suppress(OSError):
        job.directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
    return lock


def _release(claim: BaseFileLock | None) -> None:
    if claim:
        claim.release()


def _fate(code: int) -> str:
    if code in (130, 143):
        return "its process was told to end"
    return f"its process was killed (signal {-code})" if code > LOST else "its process was lost"


def explain(job: Job, code: int, attempts: int) -> Failure:
    """Why a run has failed: as it says itself, or by how its process ended."""
    if code < 0 or code in (130, 143):
        times = f", {attempts} times" if attempts > 1 else ""
        hint = f"often memory was short: fewer --jobs, or a smaller --batch-size; see {job.log}"
        return Failure(job, _fate(code) + times, hint)
    told = job.status()
    if said := _last_words(job):
        return Failure(job, *said)
    if told and told.state is State.failed and told.error:
        return Failure(job, told.error, told.hint or f"see {job.log}")
    return Failure(job, f"its process ended with exit code {code}", f"see {job.log}")


def _last_words(job: Job) -> tuple[str, str] | None:
    """The `error:` and the `hint:` that the last attempt ended with, by its log."""
    try:
        text = job.log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    text = text[text.rfind(ATTEMPT) :]
    found = re.findall(r"^error: (.*)\nhint: (.*)$", text, flags=re.MULTILINE)
    return found[-1] if found else None
