"""What is printed where: the product on stdout, all else on stderr; quiet and JSON modes."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from ltnorm.launch import speaks

if TYPE_CHECKING:
    from rich.progress import Progress

# Wide enough that no table wraps when stdout is a file or a pipe.
_PIPE_WIDTH = 160
GAP = 2  # between two columns of a table
# A longer text is folded, so that the numbers keep their place.
LABEL_WIDTH = 36


def _console(stderr: bool) -> Console:
    # Paths and names are printed as they are: `:cat:` is no emoji.
    console = Console(stderr=stderr, highlight=False, emoji=False)
    if not speaks():  # of several processes one speaks
        return Console(file=open(os.devnull, "w", encoding="utf-8"), width=_PIPE_WIDTH)
    if not console.is_terminal:
        console = Console(stderr=stderr, highlight=False, emoji=False, width=_PIPE_WIDTH)
    return console


class Bars:
    """The bars of all trainings that are under way: a terminal has one live display at a time."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._shown = 0

    @contextmanager
    def shown(self, make: Callable[[], "Progress"]) -> Iterator["Progress"]:
        """What `make` gives, begun with the first of several at the same time, ended with all."""
        if self._progress is None:
            self._progress = make()
            self._progress.start()
        self._shown += 1
        try:
            yield self._progress
        finally:
            self._shown -= 1
            if not self._shown:
                self._progress.stop()
                self._progress = None


@dataclass
class Output:
    """Where a command prints. stdout: tables, one JSON document, directories. stderr: the rest.

    `tell` hears of training as well: the part done, the epochs done, and how many there will be.
    `log` names what else a run writes of itself, see `training.log`.
    """

    quiet: bool = False
    json: bool = False
    out: Console = field(default_factory=lambda: _console(stderr=False))
    err: Console = field(default_factory=lambda: _console(stderr=True))
    tell: Callable[[float, int, int | None], None] | None = None
    log: str | None = None
    bars: Bars = field(default_factory=Bars)

    def product(self, renderable: RenderableType) -> None:
        """A table or text for people, on stdout; nothing in JSON mode."""
        if not self.json:
            self.out.print(renderable, markup=False, soft_wrap=isinstance(renderable, str))

    def raw(self, text: str) -> None:
        """Text for programs, on stdout, as it is."""
        self.out.file.write(text if text.endswith("\n") else f"{text}\n")

    def document(self, value: Any) -> None:
        """The one JSON document of a command, on stdout."""
        if self.json:
            self.raw(json.dumps(value, indent=2))

    def note(self, text: str) -> None:
        """What happens meanwhile, on stderr; nothing in quiet mode."""
        if not self.quiet:
            self.err.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """What the user must know, on stderr, also in quiet mode."""
        self.err.print(f"warning: {text}", markup=False, soft_wrap=True)

    @contextmanager
    def training(self, label: str, epochs: int | None) -> Iterator["TrainingProgress"]:
        """The progress of one run: bars on a terminal, one line an epoch otherwise.

        `epochs` are how many there will be, where that is known.
        """
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        live = self.err.is_terminal and not self.quiet

        def bars() -> Progress:
            return Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[state]}", markup=False),
                TimeRemainingColumn(compact=True),
                expand=True,
                console=self.err,
                disable=not live,
            )

        with self.bars.shown(bars) as progress:
            yield TrainingProgress(self, progress, label, epochs, live)

    @contextmanager
    def counting(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Something done to many things: a bar on a terminal, a line otherwise.

        Gives a function that is told how many are done.
        """
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        live = self.err.is_terminal and not self.quiet
        if not live:
            self.note(f"{label}: {total:,}")
        columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
        text = TextColumn("{task.description}", markup=False)
        with Progress(text, *columns, console=self.err, disable=not live, expand=True) as progress:
            task = progress.add_task(label, total=total)
            yield lambda done: progress.update(task, completed=done)


class TrainingProgress:
    """Told of every step and epoch of a run by the training loop."""

    # A loss is read from the device only when somebody hears of it, and not more often than this.
    refresh_seconds = 0.5

    def __init__(
        self, output: Output, progress: "Progress", label: str, epochs: int | None, live: bool
    ) -> None:
        self.output, self.progress, self.label, self.live = output, progress, label, live
        self.epochs = epochs
        self.of = f"/{epochs}" if epochs else ""
        self.task = progress.add_task(label, total=1.0, state="")
        self.shown = 0.0

    def due(self) -> bool:
        """Whether `step` should be called now."""
        heard = self.live or self.output.tell is not None
        return heard and time.monotonic() - self.shown > self.refresh_seconds

    def step(self, done: float, epoch: int, loss: float, images_per_second: float) -> None:
        """In the midst of an epoch, when a part of the run is done, in 0 .. 1."""
        self._show(done, epoch, loss, images_per_second)
        self._tell(done, epoch - 1)

    def _show(self, done: float, epoch: int, loss: float, images_per_second: float) -> None:
        self.shown = time.monotonic()
        state = f"epoch {epoch}{self.of}  loss {loss:.3f}  {images_per_second:,.0f} images/s"
        self.progress.update(self.task, completed=done, state=state)

    def _tell(self, done: float, epochs: int) -> None:
        if self.output.tell:
            self.output.tell(done, epochs, self.epochs)

    def epoch(
        self, done: float, epoch: int, loss: float, lr: float, images_per_second: float
    ) -> None:
        """An epoch is over."""
        self._tell(done, epoch)
        if self.live:
            self._show(done, epoch, loss, images_per_second)
        else:
            self.output.note(
                f"{self.label}  epoch {epoch}{self.of}  loss {loss:.4f}  lr {lr:.4g}  "
                f"{images_per_second:,.0f} images/s"
            )


@dataclass(frozen=True)
class Grid:
    """A table of columns, each led by its heading; see `grid`."""

    columns: Sequence[Sequence[str]]
    left: Sequence[int]
    text_width: int | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lines where nothing is to be folded: rich takes a second for a thousand rows."""
        widths = [_width(column) for column in self.columns]
        most = self.text_width
        folded = most is not None and any(widths[i] > most for i in self.left)
        plain = all(cell.isprintable() for column in self.columns for cell in column)
        if folded or not plain or sum(widths) + GAP * (len(widths) - 1) > options.max_width:
            yield self._table(widths)
            return
        rows = [self._line(cells, widths) for cells in zip(*self.columns, strict=True)]
        heading, *others = rows
        rule = "─" * (sum(widths) + GAP * (len(widths) - 1))
        body = "\n".join(["", rule, *others])
        yield Text.assemble((heading, "table.header"), body, no_wrap=True, overflow="ignore")

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        parts = []
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            room = " " * (width - cell_len(cell))
            parts.append(cell + room if i in self.left else room + cell)
        return (" " * GAP).join(parts)

    def _table(self, widths: Sequence[int]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for i, (column, width) in enumerate(zip(self.columns, widths, strict=True)):
            text = i in self.left
            table.add_column(
                Text(column[0]),
                justify="left" if text else "right",
                no_wrap=not text,
                overflow="fold",
                max_width=self.text_width if text else None,
                # Known here, so that rich need not measure each cell; of text it finds the folds.
                width=None if text else width,
            )
        for cells in zip(*(column[1:] for column in self.columns), strict=True):
            table.add_row(*map(Text, cells))
        return table


def _width(column: Sequence[str]) -> int:
    return max(cell_len(line) for cell in column for line in cell.split("\n"))


def grid(
    columns: Sequence[Sequence[str]],
    left: Sequence[int] = (0,),
    text_width: int | None = LABEL_WIDTH,
) -> Grid:
    """A table of columns, each led by its heading; those in `left` are text, the others numbers.

    Text may be folded, where it is wider than `text_width` or the terminal; a number never.
    """
    return Grid(columns, left, text_width)
