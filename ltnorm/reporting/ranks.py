"""Classes in a row from the largest to the smallest: what is known of each, and the axis for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from rich.cells import cell_len

from ltnorm.reporting import plots
from ltnorm.reporting.axes import SMALL, Spread, spread
from ltnorm.reporting.longtail import by_images, ticks
from ltnorm.reporting.schema import ClassRow
from ltnorm.reporting.views import ClassTable

NAMED = 20  # classes with room for their names
NAME, SLOPED = 18, 0.045  # columns of such a name, and inches that a sloped one is high
NARROW = 0.08  # of the axis: no room for the name of a group
# More classes than that are averaged by neighbours, to that many points: lines stay readable.
MOST_POINTS, POINTS = 40, 25

Seeds = Mapping[int, Sequence[ClassRow]]


@dataclass(frozen=True)
class Ranks:
    """The classes of a block by their training images.

    Attributes:
        classes: sorted, [C].
        points: which classes, as places in a table, each point is the mean of; [P][...].
        same_images: whether all rows were trained on as many images of each class.
    """

    classes: list[ClassRow]
    points: list[list[int]]
    same_images: bool

    @classmethod
    def of(cls, table: ClassTable) -> "Ranks":
        """Few classes have a point each; many are averaged, so that lines can be followed."""
        order = by_images([one.train_images for one in table.classes])
        count = len(order) if len(order) <= MOST_POINTS else POINTS
        edges = [len(order) * i // count for i in range(count + 1)]
        images = {
            tuple(one.train_images for one in classes)
            for seeds in table.seeds.values()
            for classes in seeds.values()
        }
        points = [order[a:b] for a, b in pairwise(edges)]
        return cls([table.classes[place] for place in order], points, len(images) == 1)

    @property
    def places(self) -> list[float]:
        """Where on the axis each point lies: class number i, from 1, lies at i."""
        found, start = [], 0
        for point in self.points:
            found.append(start + (len(point) + 1) / 2)
            start += len(point)
        return found

    @property
    def names(self) -> list[str]:
        """Of the classes, as far as there is room for them."""
        count = len(self.classes)
        return [plots.line(one.name, NAME) for one in self.classes] if count <= NAMED else []

    @property
    def below(self) -> float:
        """The inches that the names take below the axis."""
        return SLOPED * max(map(cell_len, self.names), default=0)

    def values(self, seeds: Seeds) -> list[list[float]]:
        """The accuracy of each seed at each point, [P][n]; an empty list without test images."""
        return [
            [value for classes in seeds.values() if (value := _mean(classes, point)) is not None]
            for point in self.points
        ]

    def accuracy(self, seeds: Seeds) -> list[Spread]:
        """Mean and deviation over seeds at each point."""
        return [spread(values) for values in self.values(seeds)]

    def differences(self, ours: Seeds, theirs: Seeds) -> list[Spread]:
        """Differences at each point, with a deviation only where the seeds are the same."""
        pairs = zip(self.values(ours), self.values(theirs), strict=True)
        if list(ours) == list(theirs):
            return [spread([a - b for a, b in zip(x, y, strict=True)]) for x, y in pairs]
        means = [(spread(x)[0], spread(y)[0]) for x, y in pairs]
        return [(None if None in (a, b) else a - b, None) for a, b in means]

    def draw(self, axis: Any) -> None:
        """The axis: classes by name or by number, and where head, medium and tail end."""
        count = len(self.classes)
        axis.set_xlim(0.5, count + 0.5)
        if count <= NAMED:
            slope = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
            axis.set_xticks(range(1, count + 1), self.names, fontsize=SMALL - 1, **slope)
        else:
            axis.xaxis.set_major_formatter("{x:,.0f}")
        sizes = sorted({len(point) for point in self.points})
        each = " or ".join(map(str, sizes))
        averaged = f"; a point is the mean of {each} neighbours" if sizes != [1] else ""
        axis.set_xlabel(f"class, by its training images{averaged}", fontsize=SMALL)
        if self.same_images:
            self._name_groups(axis)

    def _name_groups(self, axis: Any) -> None:
        start, count = 0, len(self.classes)
        for group, members in groupby(one.group for one in self.classes):
            stop = start + len(list(members))
            if start:
                axis.axvline(start + 0.5, color="0.4", linewidth=0.8, linestyle=":")
            # A narrow group at an end is named towards the middle, between others not at all.
            narrow = (stop - start) / count < NARROW
            side = "center" if not narrow else "left" if start == 0 else "right"
            place = {"center": (start + stop + 1) / 2, "left": 0.5, "right": count + 0.5}[side]
            if not narrow or start == 0 or stop == count:
                axis.annotate(
                    group,
                    (place, 1),
                    (0, 2),
                    xycoords=axis.get_xaxis_transform(),
                    textcoords="offset points",
                    ha=side,
                    fontsize=SMALL - 1,
                    color="0.35",
                )
            start = stop

    def draw_tail(self, axis: Any) -> None:
        """The training images behind everything, on a log axis of their own at the right."""
        if not self.same_images:
            return
        counts = [one.train_images for one in self.classes]
        high, low = max(*counts, 1), max(min(counts), 1)
        behind = axis.twinx()
        behind.set_yscale("log")
        behind.set_ylim(low / 2, high * 1.3)
        edges = [i + 0.5 for i in range(len(counts) + 1)]
        sizes = [max(n, low / 2) for n in counts]  # an empty class has no height
        behind.stairs(sizes, edges, baseline=low / 2, fill=True, color="0.9")
        marks = ticks(high, low)
        behind.set_yticks(marks, [f"{n:,}" for n in marks])
        behind.set_yticks([], minor=True)
        behind.set_ylabel("training images", fontsize=SMALL, color="0.35")
        behind.tick_params(labelsize=SMALL, colors="0.35")
        behind.spines[["top", "left"]].set_visible(False)
        axis.set_zorder(behind.get_zorder() + 1)
        axis.patch.set_visible(False)


def _mean(classes: Sequence[ClassRow], point: Sequence[int]) -> float | None:
    known = [a for place in point if (a := classes[place].accuracy) is not None]
    return spread(known)[0]
