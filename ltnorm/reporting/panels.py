"""The pictures of a comparison, each drawn into axes of matplotlib.

A picture is a function from a `Scene` (a block and what its runs wrote), or from a `Pivot`, to the
plots that it consists of; it raises LtnormError where there is nothing to draw it from, and says
why. Accuracies are in percent, spreads are over seeds.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ltnorm.errors import LtnormError, UsageError
from ltnorm.reporting import axes, plots
from ltnorm.reporting.axes import SMALL, Spread
from ltnorm.reporting.compare import GROUPS, Block, Row
from ltnorm.reporting.curves import EPOCHS, Curve
from ltnorm.reporting.looks import Look
from ltnorm.reporting.ranks import Ranks
from ltnorm.reporting.views import ClassTable, Pivot

MOST_BANDS = 6  # rows whose bands do not cover each other
# Points that are named, and characters of a name; the legend has them all.
MOST_NAMES, NAME = 8, 28
MARKS = 40  # markers on a line
BAND = "bands: ± sample standard deviation over seeds"
WHISKERS = "whiskers: 95 % t interval of the mean over seeds"
CROSSES = "crosses: ± sample standard deviation over seeds"
AREA = "grey area: training images (log scale)"


@dataclass(frozen=True)
class Scene:
    """What the pictures of a block are drawn from.

    Attributes:
        block: at least one row.
        looks: by the label of a row.
        classes: the block class by class; None without any per_class.csv.
        curves: by the label of a row and the quantity.
    """

    block: Block
    looks: Mapping[str, Look]
    classes: ClassTable | None
    curves: Mapping[str, Mapping[str, Curve]]

    @property
    def accuracy(self) -> str:
        """What the axis of an accuracy is called."""
        return f"{self.block.first.eval_split} accuracy in %"

    def part(self, rows: Collection[str]) -> str:
        """What a title says where not all rows have what is drawn."""
        whole = len(self.block.rows)
        return "" if len(rows) == whole else f" ({len(rows)} of {whole} rows)"


@dataclass(frozen=True)
class Plot:
    """One pair of axes.

    Attributes:
        draw: into the axes.
        notes: how to read it, for the line below the figure.
        wide: whether it has many things side by side.
        below: inches that names below the axes take.
        finish: what waits for the sizes of the axes: called with them when all is drawn.
    """

    draw: Callable[[Any], None]
    notes: tuple[str, ...] = ()
    wide: bool = False
    below: float = 0.0
    finish: Callable[[Any], None] | None = None


def per_class(scene: Scene) -> list[Plot]:
    """Accuracy by class, from the largest to the smallest, over the long tail of their images."""
    table = _classes(scene)
    ranks = Ranks.of(table)
    over = {label: ranks.accuracy(seeds) for label, seeds in table.seeds.items()}
    notes = _banded(over) + ((AREA,) if ranks.same_images else ())

    def draw(axis: Any) -> None:
        axes.heading(axis, f"accuracy by class{scene.part(over)}", "", scene.accuracy)
        ranks.draw_tail(axis)
        _lines(axis, dict.fromkeys(over, ranks.places), over, scene.looks)
        ranks.draw(axis)
        axes.from_zero(axis, chain.from_iterable(over.values()))

    return [Plot(draw, notes, wide=True, below=ranks.below)]


def delta(scene: Scene) -> list[Plot]:
    """The difference to the baseline by class; its spread is that of differences by seed."""
    name = scene.block.baseline
    if name is None:
        raise UsageError(
            f"--panel delta: no row of {scene.block.title} is the baseline",
            "name one with --baseline",
        )
    table = _classes(scene)
    others = [row.label for row in scene.block.others if row.label in table.seeds]
    if not others or not table.has_baseline:
        raise LtnormError(
            f"--panel delta: no classes of {name} and another row of {scene.block.title}",
            "it needs the per_class.csv of both",
        )
    ranks = Ranks.of(table)
    over = {label: ranks.differences(table.seeds[label], table.seeds[name]) for label in others}

    def draw(axis: Any) -> None:
        title = f"difference to {plots.line(name, 40)} by class"
        axes.heading(axis, title, "", "difference in points")
        axis.axhline(0, color="black", linewidth=1)
        _lines(axis, dict.fromkeys(over, ranks.places), over, scene.looks)
        ranks.draw(axis)

    return [Plot(draw, _banded(over), wide=True, below=ranks.below)]


def groups(scene: Scene) -> list[Plot]:
    """Bars of head, medium and tail with the 95 % t interval of the mean over seeds."""
    rows = scene.block.rows
    limits = {row.label: {g: row.interval(g) for g in GROUPS} for row in rows}
    several = any(one for of_row in limits.values() for one in of_row.values())

    def draw(axis: Any) -> None:
        axes.heading(axis, "accuracy by group", "", scene.accuracy)
        width = 0.84 / len(rows)
        for i, row in enumerate(rows):
            shift = (i - (len(rows) - 1) / 2) * width
            _bars(axis, row, limits[row.label], shift, width, scene.looks[row.label])
        empty = [g for g in GROUPS if all(row.mean[g] is None for row in rows)]
        names = [f"{g}\n(no class)" if g in empty else g for g in GROUPS]
        axis.set_xticks(range(len(GROUPS)), names, fontsize=SMALL + 1)
        axis.set_xlim(-0.5, len(GROUPS) - 0.5)
        axis.tick_params(axis="x", length=0)
        ends = [(end[1], None) for of_row in limits.values() for end in of_row.values() if end]
        means = [(row.mean[g], None) for row in rows for g in GROUPS]
        axes.from_zero(axis, [*means, *ends], below=0)

    return [Plot(draw, (WHISKERS,) if several else (), wide=len(rows) > MOST_NAMES)]


def _bars(
    axis: Any,
    row: Row,
    limits: Mapping[str, tuple[float, float] | None],
    shift: float,
    width: float,
    look: Look,
) -> None:
    for place, group in enumerate(GROUPS):
        mean, ends = row.mean[group], limits[group]
        if mean is None:
            continue
        axis.bar(place + shift, mean, 0.92 * width, **look.bars)
        if ends:
            arms, cap = [[mean - ends[0]], [ends[1] - mean]], min(2.5, 10 * width)
            # White below black, so that it is seen on any bar.
            for colour, size in (("white", min(2.6, 22 * width)), ("black", min(0.9, 9 * width))):
                axis.errorbar(place + shift, mean, arms, color=colour, elinewidth=size, capsize=cap)


def head_tail(scene: Scene) -> list[Plot]:
    """One point a row, head against tail, with the sample deviation of each."""
    rows = [r for r in scene.block.rows if None not in (r.mean["head"], r.mean["tail"])]
    if not rows:
        raise UsageError(
            f"--panel head-tail: {scene.block.title} has no class in the head or in the tail",
            "leave the panel out",
        )
    points = [
        (r.label, (r.mean["head"], r.std["head"]), (r.mean["tail"], r.std["tail"])) for r in rows
    ]

    def draw(axis: Any) -> None:
        faint = 1.0 if len(rows) <= MOST_BANDS else 0.5
        axes.heading(axis, "tail against head", "head accuracy in %", "tail accuracy in %")
        for label, (head, across), (tail, up) in points:
            shown = scene.looks[label].points | {"linestyle": "", "markersize": 6.5}
            arms = {"elinewidth": 1.1, "ecolor": (scene.looks[label].colour, faint), "capsize": 2}
            axis.errorbar(head, tail, up, across, **shown, **arms)
        axis.margins(0.16)
        axes.no_less_than_nothing(axis)
        axis.grid(color="0.92", linewidth=0.8)
        axis.set_axisbelow(True)

    several = any(row.n > 1 for row in rows)
    named = len(points) <= MOST_NAMES and max(len(label) for label, *_ in points) <= NAME
    return [
        Plot(
            draw,
            (CROSSES,) if several else (),
            finish=(lambda axis: axes.name_points(axis, points)) if named else None,
        )
    ]


def curves(scene: Scene) -> list[Plot]:
    """The loss of training by epoch, and the accuracy where it was measured on the way."""
    if not any(scene.curves.values()):
        raise LtnormError(
            f"--panel curves: no run of {scene.block.title} has its {EPOCHS}",
            "`ltnorm train --force` makes the runs anew",
        )
    losses = {row.first.loss for row in scene.block.rows}
    unlike = " (rows differ in the loss)" if len(losses) > 1 else ""
    titles = {
        "loss": (f"training loss{unlike}", "loss"),
        "accuracy": ("accuracy while training", scene.accuracy),
    }
    return [
        _curve(scene, quantity, *named)
        for quantity, named in titles.items()
        if any(quantity in one for one in scene.curves.values())
    ]


def _curve(scene: Scene, quantity: str, title: str, unit: str) -> Plot:
    found = {label: one[quantity] for label, one in scene.curves.items() if quantity in one}
    places = {label: curve.epochs for label, curve in found.items()}
    over = {label: curve.spreads for label, curve in found.items()}

    def draw(axis: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        axes.heading(axis, f"{title}{scene.part(found)}", "epoch", unit)
        _lines(axis, places, over, scene.looks, marks=8)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    return Plot(draw, _banded(over))


def ratio(pivot: Pivot, looks: Mapping[str, Look]) -> list[Plot]:
    """Accuracy, of all and of the tail, against the imbalance ratio of the training images."""
    if len({block.first.ratio for block in pivot.blocks} - {None}) < 2:
        raise UsageError(
            f"--panel ratio: {pivot.title} has runs of one ratio alone",
            "train with another --ratio",
        )
    blocks = [block for block in pivot.blocks if block.first.ratio is not None]
    schemes = {(block.first.group_scheme, block.first.tail_classes) for block in blocks}
    of_each = "\n(not the same classes at each ratio)" if len(schemes) > 1 else ""
    titles = {"all": "accuracy by ratio", "tail": f"tail accuracy by ratio{of_each}"}
    return [_by_ratio(blocks, looks, metric, title) for metric, title in titles.items()]


def _by_ratio(blocks: Sequence[Block], looks: Mapping[str, Look], metric: str, title: str) -> Plot:
    ratios = [block.first.ratio for block in blocks]
    places: dict[str, list[float]] = {}
    over: dict[str, list[Spread]] = {}
    for block in blocks:
        for row in block.rows:
            places.setdefault(row.label, []).append(block.first.ratio)
            over.setdefault(row.label, []).append((row.mean[metric], row.std[metric]))

    def draw(axis: Any) -> None:
        up = f"{blocks[0].first.eval_split} accuracy in %"
        axes.heading(axis, title, "imbalance ratio (log scale)", up)
        _lines(axis, places, over, looks)
        axis.set_xscale("log")
        axis.set_xticks(ratios, [f"{one:,.12g}" for one in ratios])
        axis.set_xticks([], minor=True)
        axis.set_xlim(min(ratios) / 1.25, max(ratios) * 1.25)
        axes.from_zero(axis, chain.from_iterable(over.values()))

    return Plot(draw, _banded(over))


def _lines(
    axis: Any,
    places: Mapping[str, Sequence[float]],
    over: Mapping[str, Sequence[Spread]],
    looks: Mapping[str, Look],
    marks: int = MARKS,
) -> None:
    band = bool(_banded(over))
    for label, spreads in over.items():
        axes.line(axis, places[label], spreads, looks[label], band=band, marks=marks)


def _banded(over: Mapping[str, Sequence[Spread]]) -> tuple[str, ...]:
    """The note on bands where they are drawn: where there is a spread, and room for it."""
    several = any(std is not None for spreads in over.values() for _, std in spreads)
    return (BAND,) if several and len(over) <= MOST_BANDS else ()


def _classes(scene: Scene) -> ClassTable:
    if scene.classes is None:
        raise LtnormError(
            f"no run of {scene.block.title} has its per_class.csv",
            "`ltnorm train --force` makes the runs anew",
        )
    return scene.classes
