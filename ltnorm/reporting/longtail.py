"""The long tail of a data set, as `prepare` shows it: numbers, a chart for a terminal, a figure.

Counts are training images a class, [C], and groups the name of each class's group, [C]: head,
medium or tail, in that order when classes are sorted by their images, as `report_groups` gives
them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltnorm.reporting import plots, schema

if TYPE_CHECKING:
    import numpy as np
    from rich.text import Text

SHOWN = 5  # classes at each end of the contact sheet
EACH = 6  # images of each of them
# Beyond this ratio the tail of a linear scale is a flat line.
LOG_FROM = 10
BLOCKS = " ▁▂▃▄▅▆▇█"
WIDEST = 12  # columns of a bar
STYLES = {"head": "blue", "medium": "yellow", "tail": "green"}
NARROWEST = 30

# Of the figure, in inches, parts of an image, pixels and characters.
ROW, GAP, PIXELS, NAME, TITLE = 0.72, 0.03, 160, 22, 80


@dataclass(frozen=True)
class Statistics:
    """How imbalanced a set is.

    Attributes:
        classes: C.
        images: of all classes together.
        n_max, n_min: images of the largest and of the smallest class.
        ratio: n_max / n_min; None where a class is empty.
        gini: the Gini coefficient of the counts, 0 for balanced classes, at most 1 - 1 / C.
    """

    classes: int
    images: int
    n_max: int
    n_min: int
    ratio: float | None
    gini: float

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f"ratio {self.ratio:,.4g}, "
        return (
            f"{self.images:,} images, {self.classes:,} classes, n_max {self.n_max:,}, "
            f"n_min {self.n_min:,}, {ratio}Gini {self.gini:.2f}"
        )


def statistics(counts: Sequence[int]) -> Statistics:
    """The numbers of a set from its counts, [C] with C >= 1.

    The Gini coefficient is half the mean absolute difference between two classes over the mean,
    G = sum_ij |n_i - n_j| / (2 C sum_i n_i), computed from the counts in ascending order as
    G = sum_i (2 i - C - 1) n_i / (C sum_i n_i), i = 1 .. C.
    """
    ascending = sorted(int(n) for n in counts)
    size, total = len(ascending), sum(ascending)
    spread = sum((2 * i - size - 1) * n for i, n in enumerate(ascending, start=1))
    low, high = ascending[0], ascending[-1]
    ratio = high / low if low else None
    return Statistics(size, total, high, low, ratio, spread / (size * total) if total else 0.0)


def by_images(counts: Sequence[int]) -> list[int]:
    """Classes from the largest to the smallest; equal ones in the order of their labels."""
    return sorted(range(len(counts)), key=lambda label: -counts[label])


def chart(counts: Sequence[int], groups: Sequence[str], width: int, height: int = 8) -> "Text":
    """A bar chart of the sorted counts, `width` columns wide and `height` rows high with its axes.

    Few classes have bars of several columns; where there are more classes than columns, a column
    is the mean of its classes. The scale is logarithmic from a ratio of `LOG_FROM` on.
    """
    from rich.text import Text

    order = by_images(counts)
    scale = _Scale.of(counts, 8 * height)
    labels = scale.labels(height)
    margin = max(map(len, labels.values())) + 2
    columns = _columns(order, max(width, NARROWEST) - margin)
    text = Text(no_wrap=True, overflow="ignore")
    for row in range(height - 1, -1, -1):
        text.append(f"{labels.get(row, ''):>{margin - 2}} {'┤' if row in labels else '│'}")
        for members in columns:
            level = scale.level([counts[label] for label in members]) - 8 * row
            group = groups[members[len(members) // 2]] if members else ""
            text.append(BLOCKS[min(max(level, 0), 8)] if members else " ", STYLES.get(group))
        text.append("\n")
    text.append(f"{'0' if not scale.log else '':>{margin - 2}} └{'─' * len(columns)}\n")
    text.append(" " * margin).append(_spans(columns, groups)).append("\n")
    text.append(" " * margin + _legend(len(order), columns, scale))
    return text


@dataclass(frozen=True)
class _Scale:
    """From images to eighths of a row."""

    low: float  # what has no height
    high: int
    least: int
    steps: int
    log: bool

    @classmethod
    def of(cls, counts: Sequence[int], steps: int) -> "_Scale":
        high, least = max(*counts, 1), max(min(counts), 0)
        log = high >= LOG_FROM * max(least, 1)
        # The decade below the smallest class, so that its bar has some height.
        low = 10.0 ** (math.ceil(math.log10(max(least, 1))) - 1) if log else 0.0
        return cls(low, high, least, steps, log)

    def level(self, counts: Sequence[int]) -> int:
        """The height of a bar for the mean of `counts`: at least one eighth, if it is not 0."""
        mean = sum(counts) / max(len(counts), 1)
        if not mean:
            return 0
        part = mean / self.high
        if self.log:
            part = math.log(max(mean, self.low) / self.low) / math.log(self.high / self.low)
        return max(1, round(self.steps * part))

    def labels(self, rows: int) -> dict[int, str]:
        """The axis, by row from below: the largest, the smallest, and powers of ten between."""
        row = {n: min((self.level([n]) - 1) // 8, rows - 1) for n in (self.high, self.least) if n}
        marks = {place: f"{n:,}" for n, place in reversed(row.items())}
        decade = 10 ** int(math.log10(self.high)) if self.log else 1
        while decade > self.least:
            place = (self.level([decade]) - 1) // 8
            if not marks.keys() & {place - 1, place, place + 1}:
                marks[place] = f"{decade:,}"
            decade //= 10
        return marks


def _columns(order: Sequence[int], room: int) -> list[Sequence[int]]:
    """The classes of each column; none in the gap between wide bars."""
    wide = min(room // len(order), WIDEST)
    if wide == 0:
        edges = [len(order) * j // room for j in range(room + 1)]
        return [order[a:b] for a, b in pairwise(edges)]
    columns: list[Sequence[int]] = []
    for label in order:
        columns += [[label]] * max(wide - 1, 1) + [[]] * (wide > 1)
    return columns[:-1] if wide > 1 else columns


def _spans(columns: Sequence[Sequence[int]], groups: Sequence[str]) -> "Text":
    """A line that says which columns are head, medium and tail."""
    from rich.text import Text

    of = [groups[members[len(members) // 2]] if members else "" for members in columns]
    of = [group or of[i - 1] for i, group in enumerate(of)]
    line = Text()
    for group, span in groupby(of):
        room, size = len(list(span)), groups.count(group)
        named = (f" {group} {size} ", f" {group} ", f"{group}", group[:1])
        name = next((n for n in named if len(n) + 2 <= room), "")
        if room == 1:
            line.append(group[:1], STYLES.get(group))
        else:
            line.append(f"├{name:─^{room - 2}}┤", STYLES.get(group))
    return line


def _legend(classes: int, columns: Sequence[Sequence[int]], scale: _Scale) -> str:
    each = classes / len(columns)
    binned = f", {each:,.1f} a column" if each > 1 else ""
    return f"{classes:,} classes by images, {'log' if scale.log else 'linear'} scale{binned}"


def ends(counts: Sequence[int], most: int = SHOWN) -> tuple[list[int], list[int]]:
    """The `most` largest classes and the `most` smallest, each from the largest; none is in both.

    Empty classes are left out: they have nothing to show.
    """
    order = [label for label in by_images(counts) if counts[label]]
    largest = order[: min(most, (len(order) + 1) // 2)]
    return largest, order[len(largest) :][-most:]


def choose(labels: "np.ndarray", counts: Sequence[int], seed: int = 0) -> dict[int, list[int]]:
    """Which images `plot` wants: indices of up to `EACH` of each class at the `ends`.

    Args:
        labels: of the training images, int [N].
        counts: images a class, [C].
        seed: of the choice.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    largest, smallest = ends(counts)
    chosen = {}
    for label in largest + smallest:
        indices = np.flatnonzero(labels == label)
        chosen[label] = sorted(rng.choice(indices, min(EACH, len(indices)), replace=False).tolist())
    return chosen


def plot(
    path: Path,
    title: str,
    classes: Sequence[str],
    counts: Sequence[int],
    groups: Sequence[str],
    samples: Mapping[int, Sequence["np.ndarray"]],
    seed: int = 0,
) -> None:
    """Draw the sorted counts above a contact sheet of the largest and the smallest classes.

    Args:
        path: a file that `plots.check` has passed.
        title: of the figure.
        classes, counts, groups: names, training images and groups of the classes, [C] each.
        samples: some images of the classes at the `ends`, uint8 [H, W, 3] of any size, by class.
        seed: with which they were chosen, to be stated.
    """
    from matplotlib.figure import Figure

    with plots.any_text():
        parts = [part for part in ends(counts) if part]
        rows = max(map(len, parts))
        figure = Figure(figsize=(11, 3.9 + ROW * rows), layout="constrained")
        top, below = figure.subfigures(2, 1, height_ratios=(3.3, 0.6 + ROW * rows))
        top.suptitle(plots.lines(title, TITLE), fontsize=12, fontweight="bold")
        _tail(top.subplots(), counts, groups)
        axes = below.subplots(1, len(parts), squeeze=False)[0]
        for axis, labels, which in zip(axes, parts, ("largest", "smallest"), strict=False):
            heading = (
                f"the {len(labels)} {which} classes" if len(labels) > 1 else f"the {which} class"
            )
            axis.text(GAP, -0.1, heading, ha="left", va="bottom", fontsize=10)
            _sheet(axis, labels, classes, counts, groups, samples, rows)
        below.supxlabel(f"training images drawn with seed {seed}", fontsize=8, color="0.35")
        content = plots.rendered(figure, path.suffix)
    schema.write_bytes(path, content)


def _tail(axis: Any, counts: Sequence[int], groups: Sequence[str]) -> None:
    """Sorted counts on a log scale, the groups as shades with their names."""
    order = by_images(counts)
    sizes = [max(counts[label], 0.5) for label in order]  # an empty class lies below the axis
    start = 0
    for group, members in groupby(groups[label] for label in order):
        stop = start + len(list(members))
        edges = [i + 0.5 for i in range(start, stop + 1)]
        colour = plots.LINES[group][0]
        axis.axvspan(edges[0], edges[-1], color=colour, alpha=0.07, linewidth=0)
        axis.stairs(sizes[start:stop], edges, fill=True, color=colour, alpha=0.75)
        if start:
            axis.axvline(edges[0], color="0.4", linewidth=0.8, linestyle=":")
        axis.annotate(
            f"{group}\n{stop - start:,} class{'es' if stop - start > 1 else ''}",
            ((edges[0] + edges[-1]) / 2, 1),
            (0, 3),
            xycoords=axis.get_xaxis_transform(),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
        start = stop
    found = statistics(counts)
    marks = ticks(found.n_max, max(found.n_min, 1))
    axis.set_yscale("log")
    axis.set_yticks(marks, [f"{n:,}" for n in marks])
    axis.set_yticks([], minor=True)
    axis.set_xlim(0.5, len(order) + 0.5)
    axis.set_ylim(max(found.n_min, 1) / 2, found.n_max * 1.3)
    axis.set_ylabel("training images (log scale)", fontsize=9)
    axis.set_xlabel(f"class, by its images\n{found}", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    if len(order) <= 20:
        axis.set_xticks(range(1, len(order) + 1))


def ticks(high: int, low: int) -> list[int]:
    """The smallest and the largest count, and the powers of ten that are not too near to them."""
    apart = max((high / low) ** 0.08, 1.2)
    decades = [10**k for k in range(len(str(high)))]
    return sorted({low, high, *(n for n in decades if low * apart < n < high / apart)})


def _sheet(
    axis: Any,
    labels: Sequence[int],
    classes: Sequence[str],
    counts: Sequence[int],
    groups: Sequence[str],
    samples: Mapping[int, Sequence["np.ndarray"]],
    rows: int,
) -> None:
    """A row of images a class, led by its name, its count and its group."""
    for row, label in enumerate(labels):
        beside = f"{plots.lines(classes[label], NAME)}\n{counts[label]:,} · {groups[label]}"
        axis.text(-0.1, row + 0.5, beside, ha="right", va="center", fontsize=8)
        for column, image in enumerate(samples.get(label, ())[:EACH]):
            extent = (column + GAP, column + 1 - GAP, row + 1 - GAP, row + GAP)
            axis.imshow(_square(image), extent=extent)
    axis.set_xlim(-2.3, EACH)
    axis.set_ylim(rows, -0.4)
    axis.set_aspect("equal")
    axis.set_axis_off()


def _square(image: "np.ndarray") -> "np.ndarray":
    """The centre square of an image, no larger than it is drawn."""
    import numpy as np
    from PIL import Image

    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    if side <= PIXELS:
        return square
    return np.asarray(Image.fromarray(square).resize((PIXELS, PIXELS), Image.Resampling.LANCZOS))
