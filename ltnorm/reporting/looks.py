"""How the rows of a comparison look: the same in every picture of a figure.

Colours are those of Okabe & Ito (2008), which the colour-blind can tell apart, in an order in which
neighbours differ in lightness as well. Nothing is in colour alone: a row has a marker, a line style
and a hatch of its own, too. Yellow is left out: a line of it vanishes on white.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ltnorm.reporting.compare import Block

BASELINE = "#000000"
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#56B4E9", "#009E73", "#CC79A7")
LINES = ("--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (8, 2)))
# With whether they are hollow; the full circle is the baseline's.
MARKERS = (*((m, False) for m in "s^DvPX<>"), *((m, True) for m in "os^Dv<>"))
HATCHES = ("//", "..", "\\\\", "xx", "--", "++", "oo", "||", "**", "//..", "\\\\..", "xx..", "OO")


@dataclass(frozen=True)
class Look:
    """What a row is recognised by.

    Attributes:
        colour: of its lines, points and bars.
        line: a line style of matplotlib.
        marker: of its points; hollow ones are white inside.
        hollow: whether they are.
        hatch: of its bars.
    """

    colour: str
    line: Any
    marker: str
    hollow: bool
    hatch: str

    @property
    def points(self) -> dict[str, Any]:
        """As matplotlib takes it for points."""
        inside = "white" if self.hollow else self.colour
        return {"marker": self.marker, "color": self.colour, "markerfacecolor": inside}

    @property
    def bars(self) -> dict[str, Any]:
        """As matplotlib takes it for bars."""
        return {"facecolor": self.colour, "hatch": self.hatch, "edgecolor": "white", "linewidth": 0}


def looks(blocks: Sequence[Block]) -> dict[str, Look]:
    """A look for each label: baselines are black, the others follow in their order.

    A label looks the same in all blocks. Sequences of different lengths are cycled side by side,
    so that no two of 30 rows share colour and line style, and none of 15 a marker.
    """
    bases, others = bases_and_others(blocks)
    found = {label: _baseline(i) for i, label in enumerate(bases)}
    return found | {label: _look(i) for i, label in enumerate(others)}


def bases_and_others(blocks: Sequence[Block]) -> tuple[list[str], list[str]]:
    """The labels of all blocks, each once and in order: those of baselines, and the others."""
    bases = list(dict.fromkeys(b.baseline for b in blocks if b.baseline is not None))
    labels = dict.fromkeys(row.label for block in blocks for row in block.rows)
    return bases, [label for label in labels if label not in bases]


def _baseline(i: int) -> Look:
    """Black; further baselines, of other blocks, by their lines, markers and hatches."""
    if i == 0:
        return Look(BASELINE, "-", "o", False, "")
    return replace(_look(i - 1), colour=BASELINE)


def _look(i: int) -> Look:
    colour, line, (marker, hollow), hatch = (
        them[i % len(them)] for them in (COLOURS, LINES, MARKERS, HATCHES)
    )
    return Look(colour, line, marker, hollow, hatch)
