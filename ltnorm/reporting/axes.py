"""What the pictures of a comparison have in common: headings, lines with bands, named points."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ltnorm.reporting import plots, statistics
from ltnorm.reporting.looks import Look

SMALL, MARKER = 8, 4.5  # points
GAP = 14  # points between axes and title where something stands between them
# A mean and its sample standard deviation: None where nothing is known of it.
Spread = tuple[float | None, float | None]


def spread(values: Sequence[float] | None) -> Spread:
    """The mean and the deviation of the values of seeds; there may be none."""
    return (statistics.mean(values), statistics.sample_std(values)) if values else (None, None)


def heading(axis: Any, title: str, across: str, up: str, *, above: bool = False) -> None:
    """Name the axes; with `above`, room is kept for what stands on top of them."""
    axis.set_title(title, fontsize=SMALL + 1.5, pad=GAP if above else 6)
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


def from_zero(axis: Any, values: Sequence[float | None], *, below: float = 0.03) -> None:
    """An axis of percent from 0, with a little room for points at its ends."""
    top = max([value for value in values if value is not None], default=0.0)
    top = 100.0 if top > 70 else max(1.15 * top, 1.0)
    axis.set_ylim(-below * top, 1.03 * top)


def name_points(axis: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Name points (name, x, y), each where it covers nothing; those without such a place are not.

    Sizes must be known: the figure has been laid out.
    """
    to_pixels, frame = axis.transData.transform, axis.get_window_extent()
    reach = 5 * axis.figure.dpi / 72
    taken = [_Box.around(*to_pixels((x, y)), reach) for _, x, y in points]
    for name, x, y in points:
        text = axis.annotate(
            plots.lines(name, 24, 1), (x, y), (0, 0), textcoords="offset points", fontsize=SMALL
        )
        text.set_in_layout(False)
        box = next((b for b in _boxes(text) if b.within(frame) and not b.hits(taken)), None)
        if box:
            taken.append(box)
        else:
            text.remove()


def _boxes(text: Any) -> Any:
    """Where a name can stand, the nearest first; it stands at the one that was taken last."""
    for reach in (6, 10, 16):
        for right, side in ((1, "left"), (-1, "right"), (0, "center")):
            for up, level in ((1, "bottom"), (-1, "top"), (0, "center")):
                if right or up:
                    text.set(ha=side, va=level, position=(right * reach, up * reach))
                    found = text.get_window_extent()
                    yield _Box(found.x0, found.y0, found.x1, found.y1)


@dataclass(frozen=True)
class _Box:
    """A rectangle, in pixels."""

    left: float
    low: float
    right: float
    high: float

    @classmethod
    def around(cls, x: float, y: float, reach: float) -> "_Box":
        return cls(x - reach, y - reach, x + reach, y + reach)

    def hits(self, others: Sequence["_Box"]) -> bool:
        return any(
            self.left < o.right and o.left < self.right and self.low < o.high and o.low < self.high
            for o in others
        )

    def within(self, frame: Any) -> bool:
        across = frame.x0 <= self.left and self.right <= frame.x1
        return across and frame.y0 <= self.low and self.high <= frame.y1
