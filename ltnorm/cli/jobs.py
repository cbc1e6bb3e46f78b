"""The runs of one command made by processes: of `ltnorm sweep`, and of `ltnorm train --jobs`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltnorm.console import Output
from ltnorm.errors import UsageError

if TYPE_CHECKING:
    from ltnorm.recipe import Recipe
    from ltnorm.sweep.grid import Cell
    from ltnorm.sweep.plan import Job, Precision
    from ltnorm.sweep.work import Launcher, Work

# How often a lost run is tried again.
RETRIES = 2


@dataclass(frozen=True)
class Shared:
    """What the runs of a command share: flags of `ltnorm train` that are not of the recipe."""

    root: Path
    data_dir: Path
    out: Path
    pretrained: Path | None = None
    log: str | None = None
    checkpoint_steps: int | None = None

    def arguments(self) -> list[str]:
        """As a command line has them."""
        given = {
            "--root": self.root,
            "--data-dir": self.data_dir,
            "--out": self.out,
            "--pretrained": self.pretrained and self.pretrained.absolute(),
            "--log": self.log,
            "--checkpoint-steps": self.checkpoint_steps,
        }
        pairs = [(flag, str(value)) for flag, value in given.items() if value is not None]
        return [word for pair in pairs for word in pair]


def on_gpu(recipes: Sequence["Recipe"]) -> bool:
    """Whether some runs can be on a GPU.

    Raises:
        UsageError: some run names which.
    """
    devices = {recipe.device for recipe in recipes}
    for device in sorted(devices):
        if ":" in device:
            hint = f"--device cuda; CUDA_VISIBLE_DEVICES={device[5:]} chooses which"
            raise UsageError(f"device {device}: runs by processes are handed their GPUs", hint)
    return bool(devices - {"cpu", "mps"})


@contextmanager
def here(
    recipes: Sequence["Recipe"],
    arguments: Sequence[str],
    jobs: int | None,
    gpus_per_run: float | None = None,
) -> Iterator["Launcher"]:
    """What makes runs by processes of this machine; it ends those that are still running."""
    from ltnorm.sweep import local

    gpus = local.visible_gpus() if on_gpu(recipes) else []
    launcher = local.Local(local.places(jobs, gpus_per_run, gpus), arguments)
    try:
        yield launcher
    finally:
        launcher.stop()


def plan(
    cells: Sequence["Cell"],
    shared: Shared,
    launcher: "Launcher",
    output: Output,
    *,
    dry_run: bool = False,
) -> list["Job"]:
    """The runs, checked, and their data sets prepared, unless nothing is to be written."""
    from ltnorm.data.making import Making
    from ltnorm.sweep import plan as planning

    workers = cells[0].recipe.workers or None
    making = Making(workers=workers, tell=output.note, counting=output.counting)
    jobs = planning.plan(
        cells,
        shared.root,
        shared.data_dir,
        shared.out,
        _precision(launcher, output),
        making=None if dry_run else making,
        pretrained=shared.pretrained,
    )
    for warning in planning.doubts(jobs):
        output.warn(warning)
    return jobs


def _precision(launcher: "Launcher", output: Output) -> "Precision":
    """What `auto` is where the runs are made, found out once, so that all are comparable."""

    @cache
    def found(device: str, asked: str) -> str:
        precision, reason = launcher.precision(device, asked)
        output.note(f"precision {precision}: {reason}")
        return precision

    return found


def carry_out(
    planned: Sequence["Job"],
    launcher: "Launcher",
    retries: int,
    force: bool,
    out: Path,
    output: Output,
    done: dict[Any, Any],
) -> "Work":
    """Make the runs, telling how far they are; `done` is told which are finished."""
    from ltnorm.sweep.progress import Progress
    from ltnorm.sweep.work import Work

    progress = Progress(output, out)
    progress.work = work = Work.of(planned, force, progress.tell)
    if work.before:
        output.note(f"{work.before} of {work.total} runs are finished; --force repeats them")
    try:
        with progress.show():
            work.carry_out(launcher, retries, force, progress.watch)
    finally:
        done |= work.finished
        work.release()
    return work


def train(
    recipes: Sequence["Recipe"],
    shared: Shared,
    jobs: int,
    repeat: Sequence[str],
    output: Output,
    done: dict[Any, Any],
) -> tuple["list[Job]", "Work"]:
    """Make the runs of `ltnorm train` by so many processes at a time.

    Args:
        recipes: of the runs.
        shared: by them.
        jobs: how many are made at a time.
        repeat: `--force`, and `--keep-first` with it.
        output: where it is told how far they are.
        done: is told which are finished.
    """
    from ltnorm.sweep.grid import Cell

    cells = [Cell({}, recipe) for recipe in recipes]
    kept = [flag for flag in repeat if flag != "--force"]
    with here(recipes, [*shared.arguments(), *kept], min(jobs, len(recipes))) as launcher:
        planned = plan(cells, shared, launcher, output)
        work = carry_out(planned, launcher, RETRIES, "--force" in repeat, shared.out, output, done)
    return planned, work
