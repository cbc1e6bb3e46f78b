"""Runs as processes of this machine."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TextIO

from ltnorm.cores import cores, divided, pin, usable
from ltnorm.errors import LtnormError, UsageError
from ltnorm.reporting import schema
from ltnorm.sweep.plan import ATTEMPT, LOG, Job

# From SIGTERM, in which a run saves itself, to SIGKILL.
GRACE = 5.0


def places(jobs: int | None, gpus_per_run: float | None, gpus: Sequence[str]) -> list[str | None]:
    """A place for each run that is made at a time: the GPU that it gets, or None.

    Args:
        jobs: how many at a time; None is one, or as many as the GPUs hold.
        gpus_per_run: what a run takes of a GPU; None is a whole one, or less where `jobs` are more.
        gpus: of this machine.

    Raises:
        UsageError: there are not as many.
    """
    if not gpus or gpus_per_run == 0:
        if gpus_per_run:
            raise UsageError(
                f"--gpus-per-run {gpus_per_run:g}: this machine has no GPU that torch can use",
                "leave it out to train on the CPU",
            )
        return [None] * (jobs or 1)
    if gpus_per_run is None:
        count = jobs or len(gpus)
        return [gpus[i % len(gpus)] for i in range(count)]
    each = int(1 / gpus_per_run + 1e-9)
    room = [gpu for _ in range(each) for gpu in gpus]
    if jobs and jobs > len(room):
        raise UsageError(
            f"--jobs {jobs}: {len(gpus)} GPUs hold {len(room)} runs of {gpus_per_run:g} each",
            "a smaller --gpus-per-run puts more on one",
        )
    return list(room[:jobs])


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return named[:count] if any(named) else [str(i) for i in range(count)]


@dataclass
class Process:
    """A run that a process of this machine makes."""

    process: subprocess.Popen
    place: str | None
    cores: tuple[int, ...]

    def ended(self) -> int | None:
        """See `work.Attempt`."""
        return self.process.poll()


@dataclass
class Local:
    """Makes runs by processes of this machine; see `work.Launcher`.

    Attributes:
        places: see `places`.
        arguments: of each command, beside the recipe.
    """

    places: Sequence[str | None]
    arguments: Sequence[str]
    running: list[Process] = field(default_factory=list)
    immediate = True

    def precision(self, device: str, asked: str) -> tuple[str, str]:
        """What a precision is on a device of this machine, and why."""
        from ltnorm.training.device import resolve_device, resolve_precision

        return resolve_precision(asked, resolve_device(device))

    def has_room(self, running: int) -> bool:
        """Whether fewer are running than there are places."""
        return running < len(self.places)

    def start(self, job: Job, number: int, force: Sequence[str] = ()) -> Process:
        """Start the command that a user would type for the run.

        Raises:
            LtnormError: its directory cannot be written.
        """
        self.running = [run for run in self.running if run.ended() is None]
        free = list(zip(self.places, self._shares, strict=True))
        for run in self.running:
            free.remove((run.place, run.cores))
        place, share = free[0]
        command = [
            sys.executable,
            "-m",
            "ltnorm.sweep.child",
            *command_of(job.directory, [*self.arguments, *force]),
        ]
        if job.recipe.workers is None and len(self.places) > 1:
            command += ["--workers", str(max(1, self._cores // (1 if place else 2)))]
        with logging_to(job.directory, job.recipe.to_yaml(), number) as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=os.environ | self._environment(place),
                process_group=0,  # Ctrl-C comes to the sweep alone, which ends its runs in order
            )
        if share:
            pin(process.pid, share)
        self.running.append(Process(process, place, share))
        return self.running[-1]

    @property
    def _cores(self) -> int:
        """For each run."""
        return max(1, cores() // len(self.places))

    @cached_property
    def _shares(self) -> list[tuple[int, ...]]:
        """The cores that each place keeps its runs on, so that none takes turns with another.

        They are empty where there is nothing to divide, or not enough for the threads.
        """
        shares = divided(usable(), len(self.places))
        asked = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(asked) if asked.isdecimal() else 1
        enough = len(shares) <= cores() and min(map(len, shares)) >= threads
        return shares if len(shares) > 1 and enough else [()] * len(shares)

    def _environment(self, place: str | None) -> dict[str, str]:
        threads = os.environ.get("OMP_NUM_THREADS") or str(self._cores)
        gpu = {"CUDA_VISIBLE_DEVICES": place} if place else {}
        return {"OMP_NUM_THREADS": threads} | gpu

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to those that are still there after some seconds."""
        alive = [run.process for run in self.running if run.ended() is None]
        try:
            for process in alive:
                process.terminate()
            deadline = time.monotonic() + GRACE
            for process in alive:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for process in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with what decodes images for it
                process.wait()


def command_of(directory: Path, arguments: Sequence[str]) -> list[str]:
    """The command line of a run, whose recipe lies in its directory."""
    return ["train", "--recipe", str(directory), *arguments, "--quiet", "--json"]


@contextlib.contextmanager
def logging_to(directory: Path, recipe: str, number: int) -> Iterator[TextIO]:
    """A run's directory, with its recipe, and its log opened to append the `number`th attempt.

    Raises:
        LtnormError: they cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        schema.write_text(directory / schema.RECIPE, recipe)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        log = (directory / LOG).open("a", encoding="utf-8")
    except OSError as error:
        raise LtnormError(
            f"cannot write {error.filename or directory}: {error.strerror or error}",
            "finished runs are kept; free what is in the way, and type the same command again",
        ) from error
    with log:
        log.write(f"{ATTEMPT}{number}, {now}\n")
        log.flush()
        yield log
