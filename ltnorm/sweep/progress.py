"""How far a sweep is, told while it works: a live table on a terminal, else a line a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ltnorm.console import Output
from ltnorm.reporting.state import State
from ltnorm.sweep.plan import Job
from ltnorm.sweep.work import Running, Work

if TYPE_CHECKING:
    from rich.console import RenderableType

# Reading what runs say of themselves is not free on a network.
REFRESH = 0.5
UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


class Progress:
    """Tells how far the runs of `work` are, which it is given before it is asked to `show`."""

    work: Work

    def __init__(self, output: Output, out: Path) -> None:
        self.output, self.out, self.live = output, out, None
        self.began = self.shown = time.monotonic()

    @contextmanager
    def show(self) -> Iterator[None]:
        """While the runs are made."""
        self.began = time.monotonic()
        if not self.output.err.is_terminal or self.output.quiet:
            yield
            return
        live = Live(console=self.output.err, auto_refresh=False, transient=True)
        with live as self.live:
            yield

    def watch(self) -> None:
        """Called often; draws the table anew from time to time."""
        if self.live and time.monotonic() - self.shown > REFRESH:
            self.shown = time.monotonic()
            self.live.update(self.table(), refresh=True)

    def tell(self, what: str, job: Job, why: str) -> None:
        """A run was finished, failed, lost, or is held by another process."""
        place = job.directory
        if what == "failed":
            self.output.warn(f"{place} failed: {why}")
        elif what in ("lost", "held"):
            self.output.note(f"{place}: {why}")
        elif not self.live:
            work = self.work
            result = work.finished[job]
            tail = "" if result.tail is None else f"  tail {result.tail:.1f}"
            done = len(work.finished) + len(work.failed)
            line = f"finished {place}  all {result.all:.1f}{tail}  ({done} of {work.total} runs)"
            self.output.note(line)

    def table(self) -> "RenderableType":
        """What is going on: counts, and a line for each run that is being made."""
        rows = Table.grid(padding=(0, 2), expand=True)
        rows.add_column(ratio=3, no_wrap=True, overflow="ellipsis")
        rows.add_column(ratio=2)
        for _ in range(3):
            rows.add_column(justify="right", no_wrap=True)
        room = max(1, self.output.err.height - 4)
        running = self.work.running
        fractions = [0.0]
        for i, run in enumerate(running):
            fraction, cells = self._row(run)
            fractions.append(fraction)
            if i < room:
                rows.add_row(*cells)
        whole = Table.grid(expand=True)
        whole.add_row(Text(self._summary(sum(fractions))))
        whole.add_row(rows)
        if len(running) > room:
            whole.add_row(Text(f"and {len(running) - room} more", style="dim"))
        return whole

    def _row(self, run: Running) -> tuple[float, list["RenderableType"]]:
        status = run.job.status()
        name = Text(shown(run.job.directory, self.out))
        age = Text(duration(time.monotonic() - run.started), style="dim")
        if status is None or status.state is not State.running:
            return 0.0, [name, Text("starting", style="dim"), Text(), Text(), age]
        bar = ProgressBar(total=1.0, completed=status.fraction)
        percent = Text(f"{int(100 * status.fraction)} %")
        epochs = f"/{status.epochs}" if status.epochs else ""
        return status.fraction, [name, bar, percent, Text(f"epoch {status.epoch}{epochs}"), age]

    def _summary(self, under_way: float) -> str:
        """The counts, and how long the rest will take, by what was done since the start."""
        work, spent = self.work, time.monotonic() - self.began
        parts = [f"{len(work.finished)} of {work.total} runs finished"]
        for what, count in (
            ("failed", len(work.failed)),
            ("running", len(work.running)),
            ("made by others", len(work.elsewhere)),
            ("waiting", len(work.waiting)),
        ):
            parts += [f"{count} {what}"] if count else []
        done = len(work.finished) - work.before + len(work.failed) + under_way
        rest = work.total - len(work.finished) - len(work.failed) - under_way
        parts.append(f"{duration(spent)} so far")
        if done > 0:
            parts.append(f"about {duration(spent * rest / done)} left")
        return " · ".join(parts)


def shown(directory: Path, out: Path) -> str:
    """A run by its place in the results tree."""
    return str(directory.relative_to(out)) if directory.is_relative_to(out) else str(directory)


def duration(seconds: float) -> str:
    """A time in its largest unit, and the next one where that says more: `1 h 20 min`."""
    seconds = round(seconds)
    for i, (size, unit) in enumerate(UNITS):
        if seconds >= size or size == 1:
            text = f"{seconds // size} {unit}"
            if i < len(UNITS) - 1 and seconds // size < 10:
                smaller, name = UNITS[i + 1]
                rest = seconds % size // smaller
                text += f" {rest} {name}" if rest else ""
            return text
    raise AssertionError("unreachable")
