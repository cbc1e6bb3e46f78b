"""The figure of a comparison: pictures of each block, and as bars where there is no matplotlib."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ltnorm.console import LABEL_WIDTH
from ltnorm.errors import LtnormError, UsageError, did_you_mean
from ltnorm.reporting import panels, plots, sheets, views
from ltnorm.reporting.axes import SMALL
from ltnorm.reporting.compare import Block
from ltnorm.reporting.curves import curves
from ltnorm.reporting.labels import within
from ltnorm.reporting.looks import Look, looks
from ltnorm.reporting.panels import GROUPS, Plot, Scene
from ltnorm.reporting.views import Pivot

if TYPE_CHECKING:
    from rich.console import RenderableType

RATIO = "dataset.ratio"
# What is drawn of each block, and of blocks that differ in the ratio alone.
OF_BLOCK: dict[str, Callable[[Scene], list[Plot]]] = {
    "per-class": panels.per_class,
    "groups": panels.groups,
    "head-tail": panels.head_tail,
    "delta": panels.delta,
    "curves": panels.curves,
}
OF_PIVOT: dict[str, Callable[[Pivot, Mapping[str, Look]], list[Plot]]] = {"ratio": panels.ratio}
PANELS = {**OF_BLOCK, **OF_PIVOT}
MOST_PARTS = 8  # blocks in a figure, and as many pivots
MOST_ROWS = 16  # that a reader can tell apart

# Inches: a plot, a wide one, the height of a line of plots, of a line of text, of a legend's line.
PLOT, WIDE, HIGH, TEXT, KEY = 4.0, 5.6, 3.1, 0.2, 0.22
COLUMNS = 3
PER_INCH = 11  # bold characters of a title
# Of an entry of a legend: inches without its name, of a character of it, and most characters.
KEY_WIDTH, KEY_CHARACTER, KEY_LETTERS = 1.0, 0.078, 60

BLOCKS = " ▏▎▍▌▋▊▉█"  # eighths of a character
LONGEST, SHORTEST = 50, 10  # columns of a bar of 100 %


def check_panels(names: Sequence[str]) -> None:
    """Raises UsageError where a name is none of `PANELS`."""
    for name in names:
        if name not in PANELS:
            raise UsageError(f"unknown panel '{name}'", did_you_mean(name, PANELS))


def draw(blocks: Sequence[Block], names: Sequence[str], ending: str) -> bytes:
    """The content of a file with pictures of each block, and of all ratios below.

    Args:
        blocks: at least one.
        names: of `PANELS`; none are all that can be drawn.
        ending: of the file, such as ".png".

    Raises:
        UsageError: too many blocks or rows to be read, or a picture that is asked for cannot be
            drawn from any block.
        LtnormError: the files that it would be drawn from are not there.
    """
    parts = _parts(blocks, names)
    _check_rows(parts)
    with plots.any_text():
        return plots.rendered(_figure(parts), ending)


@dataclass(frozen=True)
class _Part:
    """A title, plots, and the legend of its rows: label, name with n, look."""

    title: str
    plots: list[Plot]
    rows: list[tuple[str, Look]]


def _parts(blocks: Sequence[Block], names: Sequence[str]) -> list[_Part]:
    chosen = list(dict.fromkeys(names)) or list(PANELS)
    blocks_drawn = blocks if {*chosen} & {*OF_BLOCK} else ()
    pivots = _pivots(blocks) if {*chosen} & {*OF_PIVOT} else []
    _check_number(blocks_drawn)
    shown = looks(blocks)
    refused: dict[str, LtnormError] = {}
    drawn: set[str] = set()

    def made(name: str, *given: Any) -> list[Plot]:
        try:
            found = PANELS[name](*given)
        except LtnormError as error:
            refused[name] = error
            return []
        drawn.add(name)
        return found

    of_blocks, of_pivots = [], []
    for block in blocks_drawn:
        scene = _scene(block, shown)
        found = [plot for name in OF_BLOCK if name in chosen for plot in made(name, scene)]
        rows = [_named([block], label, shown) for label in scene.looks]
        of_blocks.append(_Part(block.title, found, rows))
    for pivot in pivots:
        found = [plot for name in OF_PIVOT if name in chosen for plot in made(name, pivot, shown)]
        rows = [_named(pivot.blocks, label, shown) for label in pivot.labels]
        of_pivots += [_Part(pivot.title, found, rows)] if found else []
    if missing := [name for name in names if name not in drawn]:
        raise refused.get(missing[0]) or UsageError(
            f"--panel {missing[0]}: the rows differ in the ratio themselves", "leave out --by ratio"
        )
    _check_number(of_pivots)
    return [part for part in of_blocks if part.plots] + of_pivots


def _scene(block: Block, shown: Mapping[str, Look]) -> Scene:
    return Scene(
        block=block,
        looks={row.label: shown[row.label] for row in block.rows},
        classes=views.per_class(block)[0],
        curves={row.label: curves(row) for row in block.rows},
    )


def _pivots(blocks: Sequence[Block]) -> list[Pivot]:
    """Blocks by ratio; none where rows of a block differ in it."""
    if any(within(RATIO, (part,)) for part in blocks[0].by):
        return []
    return views.pivot(blocks, RATIO)


def _named(blocks: Sequence[Block], label: str, shown: Mapping[str, Look]) -> tuple[str, Look]:
    """What the legend says of a row: its label, and how many seeds it has."""
    seeds = sorted({row.n for block in blocks if (row := Pivot.row(label, block))})
    n = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"{label} (n={n})", shown[label]


def _check_number(tables: Sequence[Block | _Part]) -> None:
    if len(tables) > MOST_PARTS:
        raise UsageError(
            f"--plot draws at most {MOST_PARTS} tables, here are {len(tables)}",
            "choose some with --where, or draw them side by side with --panel ratio",
        )


def _check_rows(parts: Sequence[_Part]) -> None:
    for part in parts:
        if len(part.rows) > MOST_ROWS:
            raise UsageError(
                f"--plot draws at most {MOST_ROWS} rows, {part.title} has {len(part.rows)}",
                "choose some with --where, or the best of each norm with --best-only",
            )


def _figure(parts: Sequence[_Part]) -> Any:
    """Parts one below the other, and how to read them at the bottom."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, max(len(part.plots) for part in parts))
    wide = [any(p.wide for part in parts for p in part.plots[c::columns]) for c in range(columns)]
    widths = [WIDE if one else PLOT for one in wide]
    titles = [plots.lines(part.title, int(sum(widths) * PER_INCH), 3) for part in parts]
    keys = [_Key.of(part, sum(widths)) for part in parts]
    heights = [
        sum(_line_heights(part, columns)) + TEXT * (2 + title.count("\n")) + key.height
        for part, title, key in zip(parts, titles, keys, strict=True)
    ]
    notes = dict.fromkeys(note for part in parts for plot in part.plots for note in plot.notes)
    caption = plots.lines(" · ".join(notes), int(1.3 * PER_INCH * sum(widths)), 4)
    high = sum(heights) + TEXT * (1 + caption.count("\n"))
    figure = Figure(figsize=(sum(widths), high), dpi=plots.DPI, layout="constrained")
    FigureCanvasAgg(figure)  # names are measured in pixels, whatever the file will be
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    places = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
    waiting = []
    for place, part, title, key in zip(places, parts, titles, keys, strict=True):
        place.suptitle(title, fontsize=10, fontweight="bold")
        waiting += _draw_plots(place, part, widths)
        _draw_legend(place, part, key)
    if caption:
        figure.supxlabel(caption, fontsize=SMALL, color="0.35")
    figure.draw_without_rendering()
    for finish, axis in waiting:
        finish(axis)
    figure.set_layout_engine("none")  # it has been laid out
    return figure


def _draw_plots(
    place: Any, part: _Part, widths: Sequence[float]
) -> Iterator[tuple[Callable[[Any], None], Any]]:
    """Draw the plots of a part, line by line; gives what waits for their sizes."""
    heights = _line_heights(part, len(widths))
    ratios = {"width_ratios": widths, "height_ratios": heights}
    grid = place.subplots(len(heights), len(widths), squeeze=False, **ratios).ravel()
    for axis, plot in zip(grid, part.plots, strict=False):
        plot.draw(axis)
        if plot.finish:
            yield plot.finish, axis
    for axis in grid[len(part.plots) :]:
        axis.set_axis_off()


def _line_heights(part: _Part, columns: int) -> list[float]:
    """Of the lines of plots, with what stands below their axes."""
    firsts = range(0, len(part.plots), columns)
    return [HIGH + max(plot.below for plot in part.plots[i : i + columns]) for i in firsts]


@dataclass(frozen=True)
class _Key:
    """The names of a legend, in lines, and how many of them stand beside each other."""

    names: list[str]
    columns: int

    @classmethod
    def of(cls, part: _Part, width: float) -> "_Key":
        letters = min(KEY_LETTERS, int((width - KEY_WIDTH) / KEY_CHARACTER))
        names = [plots.lines(name, letters, 3) for name, _ in part.rows]
        longest = max(len(line) for name in names for line in name.split("\n"))
        fitting = int(width / (KEY_WIDTH + KEY_CHARACTER * longest))
        return cls(names, max(1, min(len(names), fitting)))

    @property
    def height(self) -> float:
        lines = [1 + name.count("\n") for name in self.names]
        each = math.ceil(len(lines) / self.columns)
        return KEY * max(sum(lines[i : i + each]) for i in range(0, len(lines), each))


def _draw_legend(place: Any, part: _Part, key: _Key) -> None:
    """Each row as its bar and its line."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        (Patch(**look.bars), Line2D([], [], linestyle=look.line, markersize=5, **look.points))
        for _, look in part.rows
    ]
    place.legend(
        handles,
        key.names,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.4)},
        loc="outside lower center",
        ncols=key.columns,
        fontsize=SMALL + 0.5,
        frameon=False,
        handlelength=5,
        handleheight=1.1,
    )


def bars(blocks: Sequence[Block], width: int) -> "RenderableType":
    """Head, medium and tail of each row as bars of text, for a terminal of `width` columns.

    A full bar is 100 %. A group without classes says so.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = []
    for block in blocks:
        parts += [Text(), Text(block.title, style="bold"), _bar_chart(block, width)]
    return Group(*parts)


def _bar_chart(block: Block, width: int) -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=LABEL_WIDTH)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    labels = min(LABEL_WIDTH, max(len(row.label) for row in block.rows))
    room = width - labels - len("medium") - len("100.0 ± 10.0") - 4 * 2
    full = max(SHORTEST, min(LONGEST, room))
    for group in GROUPS:
        if all(row.mean[group] is None for row in block.rows):
            table.add_row(group, "no class", "", sheets.NONE)
            continue
        for i, row in enumerate(block.rows):
            bar = _bar(row.mean[group] or 0.0, full)
            name = group if i == 0 else ""
            table.add_row(name, Text(row.label), bar, sheets.average(row, group))
    return table


def _bar(percent: float, full: int) -> str:
    """A bar to the next eighth of a column; what is not 0 is seen."""
    eighths = round(8 * full * percent / 100)
    if percent > 0:
        eighths = max(eighths, 1)
    return BLOCKS[8] * (eighths // 8) + BLOCKS[eighths % 8].strip()
