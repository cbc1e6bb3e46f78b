"""What the plots of the page are made of: styles of rows, data, and pieces of Vega-Lite.

A setting is told by colour, dash and shape together, so that it can be told in grey too. Colours
are variables of the page's style sheet: light, dark and print need no other drawing. Text of the
results is in data and in the values of scales, never in an expression.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ltnorm.reporting.compare import Block
from ltnorm.reporting.looks import bases_and_others

Spec = dict[str, Any]
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # a name: nothing is loaded from it

# The others than the baseline take them in turn: no two of 210 rows look alike. The shapes are SVG
# paths in a square of side 2, for the plots and for their keys.
COLOURS = tuple(f"var(--series-{i})" for i in range(1, 7))
DASHES = ((1, 0), (6, 3), (2, 2), (8, 3, 2, 3), (12, 4), (1, 3), (5, 2, 5, 6))
SHAPES = (
    "M0,-1A1,1,0,1,1,0,1A1,1,0,1,1,0,-1Z",
    "M-.85,-.85H.85V.85H-.85Z",
    "M0,-1.1L1,.8H-1Z",
    "M0,-1.2L1,0L0,1.2L-1,0Z",
    "M0,1.1L1,-.8H-1Z",
)
BASELINE = "var(--series-0)"


@dataclass(frozen=True)
class Data:
    """A table of numbers for one plot or several.

    Attributes:
        labels: of the rows of the comparison; the column `row` has the place in them.
        columns, rows: of the table.
    """

    labels: list[str]
    columns: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True)
class Chart:
    """One plot.

    Attributes:
        title: what it shows.
        caption: how to read it.
        alternative: the same for those who do not see it.
        spec: Vega-Lite, without its data.
        data: what it draws; two plots may draw the same.
        unseen: the labels of rows that the data has and the plot does not show.
    """

    title: str
    caption: str
    alternative: str
    spec: Spec
    data: Data
    unseen: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Style:
    """How a row is drawn in every plot."""

    colour: str
    dash: tuple[int, ...]
    shape: str


Styles = Mapping[str, Style]  # by the labels of rows, in their order


def palette(blocks: Sequence[Block]) -> dict[str, Style]:
    """A style for each label, the same in all blocks: baselines are neutral, others in turn."""
    bases, others = bases_and_others(blocks)
    found = {label: _style(BASELINE, turn) for turn, label in enumerate(bases)}
    for turn, label in enumerate(others, start=1):
        found[label] = _style(COLOURS[(turn - 1) % len(COLOURS)], turn)
    return {row.label: found[row.label] for block in blocks for row in block.rows}


def _style(colour: str, turn: int) -> Style:
    return Style(colour, DASHES[turn % len(DASHES)], SHAPES[turn % len(SHAPES)])


def of_rows(block: Block, everywhere: Styles) -> dict[str, Style]:
    """The styles of the rows of a block."""
    return {row.label: everywhere[row.label] for row in block.rows}


def spec(layers: list[Spec], height: int = 280) -> Spec:
    """A plot as wide as its frame."""
    return {"$schema": SCHEMA, "width": "container", "height": height, "layer": layers}


def table(styles: Styles, columns: list[str], rows: list[list[Any]]) -> Data:
    """The data of a plot; rows have their place in the block in the column `row`."""
    return Data([*styles], columns, [[*map(_short, r)] for r in rows])


def _short(value: Any) -> Any:
    """A number as exact as a plot can be; None if it is not finite."""
    if not isinstance(value, float):
        return value
    return round(value, 4) if math.isfinite(value) else None


def number(field: str, title: str, **scale: Any) -> Spec:
    """A column of numbers on an axis; `scale` is Vega-Lite's."""
    found = {"field": field, "type": "quantitative", "title": title}
    return {**found, "scale": {"zero": False, **scale}, "axis": {"tickCount": 6}}


def at(field: str, axis: Spec) -> Spec:
    """Another column on the same axis."""
    return {**axis, "field": field}


def known(field: str) -> Spec:
    """A transform that leaves out what is missing."""
    return {"filter": {"field": field, "valid": True}}


def by_row(styles: Styles, values: Sequence[Any]) -> Spec:
    """A scale from the labels of the rows to `values`."""
    scale = {"domain": [*styles], "range": list(values)}
    return {"field": "row", "type": "nominal", "scale": scale, "legend": None}


def colour(styles: Styles) -> Spec:
    """The colour of each row."""
    return by_row(styles, [style.colour for style in styles.values()])


def dash(styles: Styles) -> Spec:
    """The dash of each row."""
    return by_row(styles, [style.dash for style in styles.values()])


def offset(labels: Iterable[str]) -> Spec:
    """Rows beside each other, in their order."""
    return {"field": "row", "type": "nominal", "scale": {"domain": [*labels]}}


def points(styles: Styles, encoding: Spec, size: int = 45) -> Spec:
    """A point a record, with the shape of its row."""
    shape = by_row(styles, [style.shape for style in styles.values()])
    mark = {"type": "point", "filled": True, "opacity": 1, "size": size}
    return {"mark": mark, "encoding": {**encoding, "color": colour(styles), "shape": shape}}


def interval(styles: Styles, data: Data, encoding: Spec) -> list[Spec]:
    """A line from `low` to `high` a record; no layer at all where no record has them."""
    if not has(data, "low"):
        return []
    mark = {"type": "rule", "strokeWidth": 1.5, "clip": True}
    encoding = {**encoding, "color": colour(styles)}
    return [{"transform": [known("low")], "mark": mark, "encoding": encoding}]


def has(data: Data, column: str) -> bool:
    """Whether any record has a value in a column: a layer of nothing has no scale."""
    place = data.columns.index(column)
    return any(row[place] is not None for row in data.rows)


def zero(axis: str) -> Spec:
    """A line where nothing differs."""
    mark = {"type": "rule", "color": "var(--muted)", "strokeDash": [4, 3]}
    return {"mark": mark, "encoding": {axis: {"datum": 0, "type": "quantitative"}}}


def tip(texts: Sequence[str], **numbers: str) -> list[Spec]:
    """What is shown on hover: the row, texts, and numbers as `title` or `title:format`."""
    fields: list[Spec] = [{"field": "row", "title": "setting"}]
    fields += [{"field": text, "title": text} for text in texts]
    for field, title in numbers.items():
        name, _, form = title.partition(":")
        shown: Spec = {"field": field, "title": name}
        if field != "seeds":
            usual = ",.0f" if field == "images" else "+.1f" if field == "delta" else ".1f"
            shown |= {"type": "quantitative", "format": f".{form}f" if form.isdigit() else usual}
        fields.append(shown | ({"format": form} if form and not form.isdigit() else {}))
    return fields
