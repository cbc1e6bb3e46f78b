"""Runs as tasks of a Ray cluster, which is started here or joined.

A run is made in the worker process itself, so that its lock goes with the worker. Lost ones are
tried again by the sweep, not by Ray, so that it can tell so.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ltnorm import __version__
from ltnorm.errors import LtnormError, UsageError
from ltnorm.sweep.local import GRACE, command_of, logging_to
from ltnorm.sweep.plan import Job
from ltnorm.sweep.work import LOST

# Of processes that Ray starts, and of this one. Nothing is to be told to anybody.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}
PROBE_SECONDS = 120.0


def _import() -> Any:
    """Ray, told to be silent.

    Raises:
        UsageError: it is not installed.
    """
    os.environ |= {key: os.environ.get(key, value) for key, value in ENVIRONMENT.items()}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            "--launcher ray needs Ray, which is not installed",
            "pip install 'ltnorm[ray]', or --launcher local",
        ) from error
    return ray


@dataclass
class Task:
    """A run in Ray's hands."""

    ray: Any
    reference: Any

    def ended(self) -> int | None:
        """See `work.Attempt`."""
        ready, _ = self.ray.wait([self.reference], timeout=0)
        if not ready:
            return None
        try:
            return self.ray.get(self.reference)
        except self.ray.exceptions.TaskCancelledError:
            return LOST
        except self.ray.exceptions.RayTaskError as error:
            raise _cause(error) from error
        except self.ray.exceptions.RayError:
            return LOST


@dataclass
class Ray:
    """Makes runs by tasks of a Ray cluster; see `work.Launcher`.

    Attributes:
        arguments: of each command, beside the recipe; paths are absolute.
        jobs: how many at a time; None is as many as the cluster holds.
        gpus, cpus: that a run takes, parts of one as well; gpus None is one, if there are any.
        address: of the cluster; None starts one here, which ends with the sweep.
        on_gpu: whether runs may use a GPU.
    """

    arguments: Sequence[str]
    jobs: int | None
    gpus: float | None
    cpus: float
    address: str | None
    on_gpu: bool
    tasks: list[Task] = field(default_factory=list)
    hushed: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    immediate = False

    def __post_init__(self) -> None:
        self.ray = _import()
        # Of lost workers Ray tells on stdout, which is for the product alone.
        nothing = self.hushed.enter_context(open(os.devnull, "w"))  # noqa: SIM115
        self.hushed.enter_context(contextlib.redirect_stdout(nothing))
        try:
            self._join()
        except BaseException:
            self.stop()
            raise

    def _join(self) -> None:
        """Start or join the cluster, and see what it has.

        Raises:
            LtnormError: that cannot be done.
            UsageError: it has too little for a run.
        """
        with _silent(), _own_signals():
            try:
                self.ray.init(
                    address=self.address or "local",
                    include_dashboard=None if self.address else False,
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:200]
                where = f"join the Ray cluster at {self.address}" if self.address else "start Ray"
                raise LtnormError(
                    f"cannot {where}: {reason}", "`ray status` tells of a cluster that runs"
                ) from error
        there = self.ray.cluster_resources()
        if self.gpus is None:
            self.gpus = 1.0 if self.on_gpu and there.get("GPU") else 0.0
        needed = {"CPU": self.cpus, "GPU": self.gpus}
        for kind, count in needed.items():
            if count > there.get(kind, 0.0):
                raise UsageError(
                    f"a run needs {count:g} {kind}, and the Ray cluster has {there.get(kind, 0):g}",
                    f"a smaller --{kind.lower()}s-per-run",
                )
        self.options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_retries": 0}

    @property
    def places(self) -> Sequence[str | None]:
        """As many as the cluster holds at a time, at most `jobs`; it can grow and shrink."""
        there = self.ray.cluster_resources()
        needed = (("CPU", self.cpus), ("GPU", self.gpus or 0.0))
        room = [int(there.get(kind, 0.0) / count + 1e-9) for kind, count in needed if count]
        count = min([*room, self.jobs] if self.jobs else room, default=1)
        return [None] * max(1, count)

    def precision(self, device: str, asked: str) -> tuple[str, str]:
        """What a precision is where the runs are made, found out there.

        Raises:
            LtnormError: no worker answers, or it has another version of ltnorm.
        """
        probe = self.ray.remote(_probe).options(**self.options)
        try:
            version, found, reason = self.ray.get(
                probe.remote(device, asked), timeout=PROBE_SECONDS
            )
        except self.ray.exceptions.GetTimeoutError as error:
            raise LtnormError(
                f"no Ray worker has answered in {PROBE_SECONDS:g} s", "`ray status` tells why"
            ) from error
        except self.ray.exceptions.RayTaskError as error:
            raise _cause(error) from error
        except self.ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[:200]
            raise LtnormError(
                f"a Ray worker failed: {reason}", "all nodes need the same Python and ltnorm"
            ) from error
        if version != __version__:
            raise LtnormError(
                f"the Ray workers have ltnorm {version}, this is {__version__}",
                "install the same version on all nodes",
            )
        return found, reason

    def has_room(self, running: int) -> bool:
        """Whether the cluster holds more runs."""
        return running < len(self.places)

    def start(self, job: Job, number: int, force: Sequence[str] = ()) -> Task:
        """Hand a run to Ray."""
        make = self.ray.remote(make_run).options(**self.options)
        directory = str(job.directory.absolute())
        command = command_of(job.directory.absolute(), [*self.arguments, *force])
        if job.recipe.workers is None:
            command += ["--workers", str(max(1, int(self.cpus)))]
        reference = make.remote(directory, job.recipe.to_yaml(), number, command)
        self.tasks.append(Task(self.ray, reference))
        return self.tasks[-1]

    def stop(self) -> None:
        """Interrupt what runs, which saves itself, then end it; and the cluster, if it is ours."""
        with contextlib.suppress(Exception), _silent():
            asked = [task.reference for task in self.tasks]
            _, alive = (
                self.ray.wait(asked, num_returns=len(asked), timeout=0) if asked else ([], [])
            )
            for reference in alive:
                self.ray.cancel(reference)
            if alive:
                self.ray.wait(alive, num_returns=len(alive), timeout=GRACE)
            for reference in alive:
                self.ray.cancel(reference, force=True)
        with contextlib.suppress(Exception), _silent():
            self.ray.shutdown()
        self.hushed.close()


def _cause(error: Any) -> LtnormError:
    """What went wrong in a task, outside of its command."""
    if isinstance(error.cause, LtnormError):
        return error.cause
    reason = f"{type(error.cause).__name__}: {error.cause}"
    return LtnormError(
        f"a Ray worker cannot run ltnorm: {reason}",
        "all nodes need the same Python and the same ltnorm",
    )


def _probe(device: str, asked: str) -> tuple[str, str, str]:
    """In a worker: its version of ltnorm, and what a precision is there, and why."""
    from ltnorm.training.device import resolve_device, resolve_precision

    return (__version__, *resolve_precision(asked, resolve_device(device)))


def make_run(directory: str, recipe: str, number: int, command: Sequence[str]) -> int:
    """In a worker: make a run, and give the exit code of its command.

    The recipe comes by Ray, since a shared folder may not show yet what another machine wrote.
    """
    from ltnorm.cli import main

    # By SIGINT it is asked to end; a sweep that runs in the background has it ignored, and so would
    # the workers.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    place = Path(directory)
    with logging_to(place, recipe, number) as log, _redirected(log):
        return main(command)


@contextlib.contextmanager
def _redirected(log: TextIO) -> Iterator[None]:
    """What this process prints goes to a log, also what libraries print; stdout goes nowhere."""
    with open(os.devnull, "w") as nothing, _sent(nothing.fileno(), log.fileno()):
        yield


@contextlib.contextmanager
def _sent(*descriptors: int) -> Iterator[None]:
    """What goes to stdout and to stderr goes to these, from Python and from C++ alike."""
    kept = [os.dup(1), os.dup(2)]
    try:
        _flush()
        for number, descriptor in enumerate(descriptors, start=1):
            os.dup2(descriptor, number)
        yield
    finally:
        _flush()
        for number, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray answers SIGTERM by an exit of its own; the answer that was there before stays."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Ray's own words are for nobody who asked for a table: they are dropped."""
    with open(os.devnull, "w") as nothing, _sent(nothing.fileno(), nothing.fileno()):
        yield
