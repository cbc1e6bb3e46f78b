"""What the pictures of a comparison have in common: headings, lines with bands, named points."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ltnorm.reporting import statistics
from ltnorm.reporting.looks import Look

SMALL, MARKER = 8, 4.5  # points
GAP = 14  # points between axes and title: groups may be named there
# A mean and its sample standard deviation: None where nothing is known of it.
Spread = tuple[float | None, float | None]


def spread(values: Sequence[float] | None) -> Spread:
    """The mean and the deviation of the values of seeds; there may be none."""
    return (statistics.mean(values), statistics.sample_std(values)) if values else (None, None)


def heading(axis: Any, title: str, across: str, up: str) -> None:
    """Name the axes."""
    axis.set_title(title, fontsize=SMALL + 1.5, pad=GAP)
    axis.set_xlabel(across, fontsize=SMALL)
    axis.set_ylabel(up, fontsize=SMALL)
    axis.tick_params(labelsize=SMALL)
    axis.spines[["top", "right"]].set_visible(False)


def line(
    axis: Any,
    places: Sequence[float],
    over: Sequence[Spread],
    look: Look,
    *,
    band: bool,
    marks: int,
) -> None:
    """Means as a line, a gap where one is missing, with a band of ± one deviation.

    About `marks` of the points have a marker.
    """
    means = [math.nan if mean is None else mean for mean, _ in over]
    every = max(1, math.ceil(len(places) / marks))
    axis.plot(
        places,
        means,
        linestyle=look.line,
        linewidth=1.4,
        markersize=MARKER,
        markevery=every,
        **look.points,
    )
    if band and any(std is not None for _, std in over):
        stds = [std or 0.0 for _, std in over]
        low, high = ([m + sign * s for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
        axis.fill_between(places, low, high, color=look.colour, alpha=0.15, linewidth=0)


def from_zero(axis: Any, over: Iterable[Spread], *, below: float = 0.03) -> None:
    """An axis of percent from 0 to the highest mean with its deviation, and room for its mark."""
    top = max((mean + (std or 0.0) for mean, std in over if mean is not None), default=0.0)
    top = 100.0 if top > 70 else max(1.1 * top, 1.0)
    axis.set_ylim(-below * top, 1.03 * top)


def no_less_than_nothing(axis: Any) -> None:
    """Both axes as they are, without what no percentage can be."""
    for limits, change in ((axis.get_xlim(), axis.set_xlim), (axis.get_ylim(), axis.set_ylim)):
        margin = 0.04 * (min(limits[1], 100.0) - max(limits[0], 0.0))
        change(max(limits[0], -margin), min(limits[1], 100.0 + margin))


def name_points(axis: Any, points: Sequence[tuple[str, Spread, Spread]]) -> None:
    """Name points (name, x, y), each where it covers neither name nor point, and the fewest arms.

    It stands nearer to its own point than to any other; without such a place there is no name.
    Sizes must be known: the figure has been laid out, on a canvas of pixels.
    """
    frame, reach = axis.get_window_extent(), 5 * axis.figure.dpi / 72
    marks = [_Box.of(axis, (x, x), (y, y), reach) for _, (x, _), (y, _) in points]
    taken, arms = [*marks], []
    for _, (x, wide), (y, high) in points:
        arms.append(_Box.of(axis, (x - (wide or 0.0), x + (wide or 0.0)), (y, y)))
        arms.append(_Box.of(axis, (x, x), (y - (high or 0.0), y + (high or 0.0))))
    for (name, (x, _), (y, _)), own in zip(points, marks, strict=True):
        text = axis.annotate(name, (x, y), (0, 0), textcoords="offset points", fontsize=SMALL)
        text.set_in_layout(False)
        free = [
            (place, box)
            for place in PLACES
            if (box := _stand(text, *place)).within(frame)
            and not box.hits(taken)
            and min(marks, key=box.gap) is own
        ]
        if free:
            best, box = min(free, key=lambda found: found[1].hits(arms))
            _stand(text, *best)
            taken.append(box)
        else:
            text.remove()


# Where a name can stand: how far from its point, and on which side; the nearest come first.
PLACES = [(r, x, y) for r in (6, 10, 16) for x in (1, -1, 0) for y in (1, -1, 0) if x or y]
SIDES = {1: ("left", "bottom"), -1: ("right", "top"), 0: ("center", "center")}


def _stand(text: Any, reach: int, right: int, up: int) -> "_Box":
    """Put a name at one of its places."""
    text.set(ha=SIDES[right][0], va=SIDES[up][1], position=(right * reach, up * reach))
    found = text.get_window_extent(text.figure.canvas.get_renderer())
    return _Box(found.x0, found.y0, found.x1, found.y1)


@dataclass(frozen=True)
class _Box:
    """A rectangle, in pixels."""

    left: float
    low: float
    right: float
    high: float

    @classmethod
    def of(
        cls, axis: Any, x: tuple[float, float], y: tuple[float, float], reach: float = 0
    ) -> "_Box":
        """What an axis shows from and to values, and `reach` around it."""
        (left, low), (right, high) = axis.transData.transform(list(zip(x, y, strict=True)))
        return cls(left - reach, low - reach, right + reach, high + reach)

    def hits(self, others: Sequence["_Box"]) -> int:
        """How many of the others it covers a part of."""
        return sum(
            self.left < o.right and o.left < self.right and self.low < o.high and o.low < self.high
            for o in others
        )

    def gap(self, other: "_Box") -> float:
        """How far it is from another one."""
        across = max(self.left - other.right, other.left - self.right, 0.0)
        return math.hypot(across, max(self.low - other.high, other.low - self.high, 0.0))

    def within(self, frame: Any) -> bool:
        """Whether all of it lies in a frame."""
        across = frame.x0 <= self.left and self.right <= frame.x1
        return across and frame.y0 <= self.low and self.high <= frame.y1
