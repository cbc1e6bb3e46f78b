"""The tables of the page, as HTML: of a block, of its classes, recipes, cost and seeds.

A cell has its text, and the number that it is sorted by; without one it is sorted by its text.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ltnorm.reporting import labels, sheets
from ltnorm.reporting.compare import Block, Row
from ltnorm.reporting.schema import METRICS, RECIPE
from ltnorm.reporting.sheets import NONE, quantity
from ltnorm.reporting.statistics import MIN_SEEDS, mean
from ltnorm.reporting.views import ClassTable, Pivot
from ltnorm.reporting.wording import heading, listed

STATISTICS = f"""<section aria-labelledby="statistics">
<h2 id="statistics">How the numbers are made</h2>
<ul>
<li>Only seeds are averaged. A row is one setting on the same images; the rows of a table share all
but what its title leaves open. Numbers are of the last epoch: no epoch is chosen.</li>
<li><b>a ± b</b>: mean and sample standard deviation over n seeds. The accuracy of a group is the
unweighted mean of the accuracies of its classes; a group without classes is a dash.</li>
<li><b>Δ</b>: difference to the baseline in points, with its 95 % interval over seeds: paired t
where both rows have the same seeds, otherwise Welch. Intervals are not adjusted for their
number.</li>
<li><b>*</b>: the difference of the tail is below 5 % after Holm over the rows of one table. Nothing
is marked below {MIN_SEEDS} seeds.</li>
<li><b>over images</b>: the 95 % interval of the same difference over test images, for these trained
models: a bootstrap within each class, paired by image. It says nothing of other seeds and is never
mixed with the interval over seeds.</li>
<li><b>seeds needed</b>: with how many a true difference of 1 point would be found in 80 % of cases,
two-sided at 5 %, taking the spread of these seeds for the true one.</li>
<li>Published numbers are shown as their sources report them and enter no statistic.</li>
</ul>
</section>"""


@dataclass(frozen=True)
class Cell:
    """A text, and the number that it is sorted by; NaN is a missing number, last in any order."""

    text: str
    value: float | None = None


Cells = Sequence[Cell]


def table(
    caption: str,
    headings: Sequence[str],
    rows: Iterable[Cells],
    *,
    apart: Iterable[Cells] = (),
    lead: int = 1,
    columns: bool = False,
) -> str:
    """A table that the page's script can sort and filter, in a box that scrolls by itself.

    Args:
        caption: what it shows.
        headings: of the columns.
        rows: as many cells as headings.
        apart: rows that stay last whatever the order.
        lead: how many columns at the left are text.
        columns: whether readers can hide columns.
    """
    kinds = [' class="text"'] * lead + [""] * (len(headings) - lead)
    head = "".join(
        f'<th scope="col"{kind}>{escape(text)}</th>'
        for text, kind in zip(headings, kinds, strict=True)
    )
    set_off = "".join(_row(cells, kinds) for cells in apart)
    bodies = f"<tbody>{''.join(_row(cells, kinds) for cells in rows)}</tbody>"
    bodies += f'<tbody class="published">{set_off}</tbody>' if set_off else ""
    choice = " data-columns" if columns else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f"<table{choice}><caption>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead>{bodies}</table></div>"
    )


def _row(cells: Cells, kinds: Sequence[str]) -> str:
    first, *others = (
        f"{kind}{_sorted_by(cell)}>{escape(cell.text)}"
        for cell, kind in zip(cells, kinds, strict=True)
    )
    return (
        f'<tr><th scope="row"{first}</th>' + "".join(f"<td{cell}</td>" for cell in others) + "</tr>"
    )


def _sorted_by(cell: Cell) -> str:
    if cell.value is None:
        return ""
    return f' data-sort="{cell.value!r}"' if math.isfinite(cell.value) else ' data-sort=""'


def _number(value: float | None, text: str) -> Cell:
    return Cell(NONE, math.nan) if value is None else Cell(text, value)


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>\n{content}\n</details>"


def _notes(notes: Iterable[str]) -> str:
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def comparison(block: Block) -> str:
    """The table of a block, its legend, footnotes and sources."""
    [sheet] = sheets.of_blocks([block])
    rows = [
        _of_sheet(sheet.headings, texts, _values(block, row))
        for texts, row in zip(sheet.rows, block.rows, strict=False)  # the literature comes after
    ]
    apart = [
        [_literature(text) if i > sheet.lead else Cell(text) for i, text in enumerate(cells)]
        for cells in sheet.rows[len(rows) :]
    ]
    caption = f"Comparison: {block.title}"
    made = table(caption, sheet.headings, rows, apart=apart, lead=sheet.lead, columns=True)
    return made + _notes(sheet.notes[1:])


def _values(block: Block, row: Row) -> dict[str, float | None]:
    """What the columns of a block's table are sorted by; an interval by its lower end."""
    found: dict[str, float | None] = {"n": row.n, "params": row.parameters, "epochs": row.epochs}
    found |= {"images": row.images_processed, "time": row.train_seconds}
    found |= {heading(metric): row.mean[metric] for metric in block.shown}
    for metric in block.deltas:
        delta = row.deltas.get(metric)
        found[f"Δ {heading(metric)}"] = delta.estimate.delta if delta else None
        if metric == sheets.imaged(block):
            found[sheets.OVER_IMAGES] = delta.images[0] if delta and delta.images else None
    return found


def _of_sheet(
    headings: Sequence[str], texts: Sequence[str], values: dict[str, float | None]
) -> list[Cell]:
    return [Cell(texts[0])] + [
        _number(values[name], text) if name in values else Cell(text)
        for name, text in zip(headings[1:], texts[1:], strict=True)
    ]


def _literature(text: str) -> Cell:
    try:
        return Cell(text, float(text))
    except ValueError:
        return Cell(text, math.nan)


def crossed(pivot: Pivot) -> list[str]:
    """A table a metric: settings down, the values of the other key across."""
    made = []
    for metric, sheet in zip(pivot.blocks[0].shown, sheets.of_pivots([pivot]), strict=True):
        rows = []
        for label, texts in zip(pivot.labels, sheet.rows, strict=True):
            found = [pivot.row(label, block) for block in pivot.blocks]
            values = [row.mean[metric] if row else None for row in found]
            cells = [_number(v, t) for v, t in zip(values, texts[1:], strict=True)]
            rows.append([Cell(label), *cells])
        made.append(f"<h3>{escape(heading(metric))}</h3>")
        made.append(table(sheet.title, sheet.headings, rows))
    against = list(dict.fromkeys(block.baseline for block in pivot.blocks if block.baseline))
    told = f"In brackets: points against {listed(against)}, * as above over each column."
    return [*made, _notes([told] if against else [])]


def classes(found: ClassTable | None, missing: int) -> str:
    """A block class by class, folded."""
    title = "Class by class"
    lacking = [f"{missing} of the runs have no per-class results that fit."] if missing else []
    if found is None:
        return _folded(title, _notes(lacking))
    sheet = sheets.of_classes(found)
    shown = [row for row in found.block.rows if row.label in found.accuracy]
    others = [row for row in shown if not row.is_baseline] if found.has_baseline else []
    rows = []
    for place, (one, texts) in enumerate(zip(found.classes, sheet.rows, strict=True)):
        values = [found.accuracy[row.label][place].mean for row in shown]
        values += [found.delta(row.label, place) for row in others]
        cells = [_number(v, t) for v, t in zip(values, texts[4:], strict=True)]
        known = [Cell(texts[1]), Cell(texts[0], one.class_), Cell(texts[3])]
        rows.append([*known, Cell(texts[2], one.train_images), *cells])
    headings = ["name", "class", "group", "images", *sheet.headings[4:]]
    made = table(f"Class by class: {found.block.title}", headings, rows, lead=3)
    return _folded(title, made + _notes([*sheet.notes, *lacking]))


def recipes(block: Block) -> str:
    """What differs between the recipes of the rows, and each recipe whole, folded."""
    named = [row.label for row in block.rows]
    own = [labels.settings(row.first) for row in block.rows]
    keys = sorted({key for one in own for key in one})
    rows = []
    for key in keys:
        values = [labels.plain(one.get(key, labels.defaults().get(key, "default"))) for one in own]
        if len(set(values)) > 1:
            rows.append([Cell(key), *map(Cell, values)])
    content = _notes(["The recipes of the rows are the same."])
    if rows:
        caption = f"Settings that differ between the rows: {block.title}"
        content = table(caption, ["setting", *named], rows, lead=len(named) + 1)
    whole = "\n".join(
        _folded(f"Recipe of {row.label}, seed {row.seeds[0]}", f"<pre>{escape(_recipe(row))}</pre>")
        for row in block.rows
    )
    return _folded("Recipes", f"{content}\n{whole}")


def _recipe(row: Row) -> str:
    try:
        return (row.runs[0].directory / RECIPE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"This run has no {RECIPE}."


def cost(block: Block) -> str:
    """What the rows cost, means over seeds, folded."""

    def average(row: Row, column: str) -> float | None:
        values = [getattr(run.result, column) for run in row.runs]
        return None if None in values else mean(values)

    rows = []
    for row in block.rows:
        backward, rate = average(row, "images_backpropagated"), average(row, "images_per_second")
        rows.append(
            [
                Cell(row.label),
                Cell(f"{row.parameters:,}", row.parameters),
                Cell(f"{row.epochs:.4g}", row.epochs),
                Cell(quantity(row.images_processed), row.images_processed),
                _number(backward, quantity(backward or 0)),
                Cell(f"{row.train_seconds:,.1f}", row.train_seconds),
                _number(row.relative_time, f"{row.relative_time or 0:.2f}"),
                _number(rate, f"{rate or 0:,.0f}"),
            ]
        )
    headings = ["setting", "parameters", "epochs", "images through the network"]
    headings += ["images with gradient", "training time in s", "relative time", "images / s"]
    note = (
        f"Means over seeds. Relative time: against {block.baseline}, where the device is the same."
        if block.baseline
        else "Means over seeds."
    )
    return _folded("Cost", table(f"Cost: {block.title}", headings, rows) + _notes([note]))


def environment(block: Block) -> str:
    """What the rows were trained with, folded."""
    rows = []
    for row in block.rows:
        results = [run.result for run in row.runs]
        found = [
            ", ".join(dict.fromkeys(str(getattr(result, what)) for result in results))
            for what in ("device", "torch", "ltnorm", "precision")
        ]
        dates = sorted(result.finished[:10] for result in results)
        when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        rows.append([*map(Cell, [row.label, *found, when])])
    headings = ["setting", "device", "torch", "ltnorm", "precision", "finished"]
    made = table(f"Environment: {block.title}", headings, rows, lead=len(headings))
    return _folded("Environment", made)


def seeds(block: Block) -> str:
    """Every metric of every seed, folded."""
    rows = []
    for row in block.rows:
        for run in row.runs:
            values = [getattr(run.result, metric) for metric in METRICS]
            known = zip(METRICS, values, strict=True)
            cells = [_number(v, _exact(v, metric)) for metric, v in known]
            rows.append([Cell(row.label), Cell(str(run.result.seed), run.result.seed), *cells])
    headings = ["setting", "seed", *map(heading, METRICS)]
    return _folded("Seeds", table(f"Each seed: {block.title}", headings, rows))


def _exact(value: Any, metric: str) -> str:
    return "" if value is None else f"{value:.{4 if metric == 'nll' else 2}f}"
