"""What a comparison shows, as tables of text that every exporter prints.

A sheet of a block has one row a setting; `pivot` crosses settings with another key of the recipe,
`per_class` has one row a class.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ltnorm.reporting.compare import TESTED, Block, Row
from ltnorm.reporting.views import ClassTable, Pivot
from ltnorm.reporting.wording import facts, footnotes, heading, interval, legend, outcome, points

COST = ("params", "epochs", "images", "time")
NONE = "–"
OVER_IMAGES = "over images"
CLASS_LEGEND = (
    "In %; mean ± sample standard deviation over n seeds; last epoch. images: training images of "
    "the class."
)


@dataclass(frozen=True)
class Sheet:
    """A table of text.

    Attributes:
        title: what all of it is of.
        headings: of the columns.
        rows: cells, as many as there are headings.
        lead: how many columns at the left are text and are repeated where a table is split; the
            others are numbers.
        together: how many columns at the right are never split.
        apart: the indices of rows that are set off: those of the literature.
        notes: below the table: the outcome, what holds for all of it, footnotes.
        legend: what its numbers mean; the same for all sheets of one comparison.
    """

    title: str
    headings: list[str]
    rows: list[list[str]]
    lead: int = 1
    together: int = 0
    apart: frozenset[int] = frozenset()
    notes: list[str] = field(default_factory=list)
    legend: str = ""

    def __post_init__(self) -> None:
        """No control character of a name reaches a terminal or a file."""
        object.__setattr__(self, "title", _printable(self.title))
        self.headings[:] = map(_printable, self.headings)
        self.notes[:] = map(_printable, self.notes)
        for row in self.rows:
            row[:] = map(_printable, row)


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else " " for sign in text)


def of_blocks(blocks: Sequence[Block]) -> list[Sheet]:
    """One sheet a block, one row a setting: accuracies, differences, cost; the literature last."""
    rules = legend(blocks)
    return [_of_block(block, rules) for block in blocks]


def _of_block(block: Block, rules: str) -> Sheet:
    of_images = imaged(block)
    headings = [" × ".join(part.rpartition(".")[2] for part in block.by), "n"]
    headings += [heading(metric) for metric in block.shown]
    for metric in _compared(block):
        headings += [f"Δ {heading(metric)}", *([OVER_IMAGES] if metric == of_images else [])]
    rows = [_cells(block, row, of_images) for row in block.rows]
    blank = [NONE] * (len(headings) - 2 - len(block.shown) + len(COST))
    for one in block.published:
        values = [_published(one.values.get(metric)) for metric in block.shown]
        n = NONE if one.trials is None else str(one.trials)
        rows.append([one.label, n, *values, *blank])
    first = len(block.rows)
    return Sheet(
        title=block.title,
        headings=[*headings, *COST],
        rows=rows,
        together=len(COST),
        apart=frozenset(range(first, first + len(block.published))),
        notes=[outcome(block), facts(block), *footnotes(block), *_sources(block)],
        legend=rules,
    )


def _compared(block: Block) -> tuple[str, ...]:
    """The metrics that have a column of differences."""
    return block.deltas if any(row.deltas for row in block.rows) else ()


def imaged(block: Block) -> str | None:
    """The metric whose interval over test images has a column: the tested one, if it is shown."""
    metrics = sorted(_compared(block), key=lambda metric: metric != TESTED)
    found = [m for m in metrics if any((d := r.deltas.get(m)) and d.images for r in block.rows)]
    return found[0] if found else None


def _published(value: float | None) -> str:
    return NONE if value is None else f"{value:g}"


def _sources(block: Block) -> list[str]:
    told = [(one.paper, ", ".join(filter(None, [one.source, one.note]))) for one in block.published]
    return [f"{paper}: {source}." for paper, source in dict.fromkeys(told) if source]


def _cells(block: Block, row: Row, of_images: str | None) -> list[str]:
    cells = [row.label, str(row.n), *(average(row, metric) for metric in block.shown)]
    for metric in _compared(block):
        cells.append(difference(row, metric))
        if metric == of_images:
            delta = row.deltas.get(metric)
            cells.append(interval(delta.images, metric) if delta and delta.images else NONE)
    time = f"{row.train_seconds:.0f} s"
    if row.relative_time is not None:
        time += f" ({row.relative_time:.2f}x)"
    images = quantity(row.images_processed)
    return [*cells, quantity(row.parameters), f"{row.epochs:.4g}", images, time]


def average(row: Row, metric: str) -> str:
    """A mean with its spread; a dash for an empty group."""
    mean, std = row.mean[metric], row.std[metric]
    if mean is None:
        return NONE
    digits = 3 if metric == "nll" else 1
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def difference(row: Row, metric: str) -> str:
    """A difference with its interval and its mark; a dash for the baseline."""
    delta = row.deltas.get(metric)
    if delta is None:
        return NONE
    estimate = delta.estimate
    bounds = interval((estimate.low, estimate.high), metric)
    mark = "*" if delta.marked else ""
    return " ".join(filter(None, [points(estimate.delta, metric), bounds])) + mark


def quantity(number: float) -> str:
    """A count with three digits."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def of_pivots(pivots: Sequence[Pivot]) -> list[Sheet]:
    """One sheet a pivot and metric: settings down, the values of the other key across."""
    rules = legend([block for pivot in pivots for block in pivot.blocks], crossed=True)
    return [_of_pivot(pivot, metric, rules) for pivot in pivots for metric in pivot.blocks[0].shown]


def _of_pivot(pivot: Pivot, metric: str, rules: str) -> Sheet:
    rows = []
    for label in pivot.labels:
        found = [pivot.row(label, block) for block in pivot.blocks]
        rows.append([label, *(_crossed(row, metric) if row else NONE for row in found)])
    notes = [f"{v}: {outcome(b)}" for v, b in pivot.parts] if metric == TESTED else []
    notes += [f"{value}: {facts(block)}" for value, block in pivot.parts]
    return Sheet(
        title=f"{pivot.title} · {heading(metric)}",
        headings=[pivot.corner, *pivot.values],
        rows=rows,
        notes=notes,
        legend=rules,
    )


def _crossed(row: Row, metric: str) -> str:
    delta = row.deltas.get(metric)
    if delta is None:
        return average(row, metric)
    mark = "*" if delta.marked else ""
    return f"{average(row, metric)} ({points(delta.estimate.delta, metric)}{mark})"


def of_classes(table: ClassTable) -> Sheet:
    """One row a class: images, group, accuracy of each setting, and its differences."""
    block = table.block
    rows = [row for row in block.rows if row.label in table.accuracy]
    others = [row for row in rows if not row.is_baseline] if table.has_baseline else []
    headings = ["class", "name", "images", "group"]
    headings += [f"{row.label} (n={len(table.seeds.get(row.label, row.runs))})" for row in rows]
    headings += [f"Δ {row.label}" for row in others]
    cells = []
    for place, one in enumerate(table.classes):
        values = [table.accuracy[row.label][place] for row in rows]
        changes = [table.delta(row.label, place) for row in others]
        cells.append(
            [
                *(str(one.class_), one.name, *_known(table, place)),
                *(_spread(v.mean, v.std) for v in values),
                *(NONE if change is None else points(change) for change in changes),
            ]
        )
    notes = [
        f"{block.first.eval_split.capitalize()} set"
        + (f"; Δ against {block.baseline}." if others else ".")
    ]
    return Sheet(block.title, headings, cells, lead=2, notes=notes, legend=CLASS_LEGEND)


def _known(table: ClassTable, place: int) -> tuple[str, str]:
    """Training images and group of a class; both ends and a dash where the rows differ in them."""
    others = (rows for seeds in table.seeds.values() for rows in seeds.values())
    ones = [table.classes[place], *(rows[place] for rows in others)]
    ends = sorted({min(one.train_images for one in ones), max(one.train_images for one in ones)})
    groups = {one.group for one in ones}
    return " to ".join(f"{n:,}" for n in ends), groups.pop() if len(groups) == 1 else NONE


def _spread(mean: float | None, std: float | None) -> str:
    if mean is None:
        return NONE
    return f"{mean:.1f}" + ("" if std is None else f" ± {std:.1f}")
