"""The plots of the page: plain Vega-Lite specifications, drawn by the reader's browser."""

import math
from collections.abc import Iterable, Sequence

from ltnorm.reporting import labels, marks, statistics
from ltnorm.reporting.compare import DEFAULT_METRICS, Block
from ltnorm.reporting.curves import curves
from ltnorm.reporting.marks import Chart, Data, Spec, Styles
from ltnorm.reporting.views import ClassTable, Pivot
from ltnorm.reporting.wording import heading

# More classes than that are drawn as means of neighbours in rank.
MOST_CLASSES = 150
MOST_EPOCHS = 200
NAMED_CLASSES = 20  # classes with room for a place of each row beside the others
SMALL, LARGE = 20, 45  # areas of points


def of_block(block: Block, styles: Styles, classes: ClassTable | None) -> list[Chart]:
    """All plots that the results of a block have numbers for."""
    found = [_differences(block, styles), _groups(block, styles)]
    # Where rows differ in their images, a class has no one count.
    if classes and len({row.first.index_sha256 for row in block.rows}) == 1:
        data, binned = _class_data(block, styles, classes)
        found.append(_class_accuracy(styles, data, binned))
        if classes.has_baseline and len(classes.accuracy) > 1:
            found.append(_class_differences(block, styles, data, binned))
    found += [_head_against_tail(block, styles), _loss(block, styles)]
    return [chart for chart in found if chart]


def _differences(block: Block, styles: Styles) -> Chart | None:
    rows = [
        [place, metric, delta.estimate.delta, delta.estimate.low, delta.estimate.high]
        for place, row in enumerate(block.rows)
        for metric in DEFAULT_METRICS
        if (delta := row.deltas.get(metric))
    ]
    if not rows:
        return None
    data = marks.table(styles, ["row", "group", "delta", "low", "high"], rows)
    groups = list(dict.fromkeys(row[1] for row in rows))
    tip = marks.tip(["group"], delta="difference", low="from", high="to")
    y = {"field": "group", "type": "nominal", "sort": None, "title": None}
    base = {"y": y, "yOffset": marks.offset(row.label for row in block.others)}
    x = marks.number("delta", f"points against {block.baseline}")
    layers = [
        marks.zero("x"),
        *marks.interval(styles, data, {**base, "x": marks.at("low", x), "x2": {"field": "high"}}),
        marks.points(styles, {**base, "x": x, "tooltip": tip}),
    ]
    height = 40 + len(groups) * (len(block.others) * 11 + 16)
    drawn = marks.has(data, "low")
    spread = "with their 95 % intervals over seeds" if drawn else "without intervals"
    return Chart(
        title=f"Differences to {block.baseline}",
        caption=f"The differences of the table, in points, {spread}.",
        alternative=_told("delta", data, "in points against the baseline"),
        spec=marks.spec(layers, height),
        data=data,
    )


def _groups(block: Block, styles: Styles) -> Chart | None:
    rows = []
    for place, row in enumerate(block.rows):
        for metric in DEFAULT_METRICS:
            values = row.values(metric)
            if values:
                low, high = row.interval(metric) or (None, None)
                seeds = ", ".join(f"{value:.1f}" for value in values)
                rows.append([place, metric, row.mean[metric], low, high, seeds])
    if not rows:
        return None
    data = marks.table(styles, ["row", "group", "mean", "low", "high", "seeds"], rows)
    tip = marks.tip(["group"], mean="mean in %", low="from", high="to", seeds="seeds")
    x = {
        "field": "group",
        "type": "nominal",
        "sort": None,
        "title": None,
        "axis": {"labelAngle": 0},
    }
    base = {"x": x, "xOffset": marks.offset(styles)}
    highest = max(row[4] if row[4] is not None else row[2] for row in rows)
    y = marks.number("mean", "accuracy in %", zero=True, domain=[0, _ten(highest)])
    bar = {"mark": {"type": "bar", "opacity": 0.55}}
    layers = [
        {**bar, "encoding": {**base, "y": y, "color": marks.colour(styles), "tooltip": tip}},
        *marks.interval(styles, data, {**base, "y": marks.at("low", y), "y2": {"field": "high"}}),
        marks.points(styles, {**base, "y": y, "tooltip": tip}),
    ]
    return Chart(
        title="Accuracy by group",
        caption="Mean accuracy over the classes of each group, and over seeds, in %. Lines: 95 % t "
        "interval of the mean over seeds, from 2 seeds on.",
        alternative=_told("mean", data, "accuracy in %"),
        spec=marks.spec(layers),
        data=data,
    )


def _ten(highest: float) -> int:
    """The end of an axis of percentages that shows `highest`."""
    return min(100, max(10, 10 * math.ceil(highest / 10)))


def _class_data(block: Block, styles: Styles, table: ClassTable) -> tuple[Data, bool]:
    """A record a row and class, from the largest class on; whether classes were put together."""
    order = sorted(range(len(table.classes)), key=lambda i: -table.classes[i].train_images)
    size = math.ceil(len(order) / MOST_CLASSES)
    bins = [order[start : start + size] for start in range(0, len(order), size)]
    names = _bin_names(table, bins)
    rows = []
    for place, row in enumerate(block.rows):
        if row.label not in table.accuracy:
            continue
        for rank, (name, members) in enumerate(zip(names, bins, strict=True)):
            accuracy = [table.accuracy[row.label][i] for i in members]
            mean = _average(one.mean for one in accuracy)
            # The spread of a mean over classes is not the mean of their spreads.
            spread = accuracy[0].std if len(members) == 1 else None
            images = _average(float(table.classes[i].train_images) for i in members)
            compared = table.has_baseline and not row.is_baseline
            delta = _average(table.delta(row.label, i) for i in members) if compared else None
            known = mean is not None and spread is not None
            low, high = (mean - spread, mean + spread) if known else (None, None)
            rows.append([place, rank, name, images, mean, low, high, delta])
    columns = ["row", "rank", "class", "images", "mean", "low", "high", "delta"]
    return marks.table(styles, columns, rows), size > 1


def _bin_names(table: ClassTable, bins: Sequence[Sequence[int]]) -> list[str]:
    if len(bins) < len(table.classes):
        starts = [1 + sum(map(len, bins[:i])) for i in range(len(bins))]
        return [f"ranks {s}–{s + len(b) - 1}" for s, b in zip(starts, bins, strict=True)]
    names = [table.classes[place].name for [place] in bins]
    if len(set(names)) == len(names):
        return names
    return [f"{table.classes[place].class_} {table.classes[place].name}" for [place] in bins]


def _average(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _class_accuracy(styles: Styles, data: Data, binned: bool) -> Chart:
    images = [row[3] for row in data.rows]
    x = marks.number("images", "training images of the class")
    x["scale"] |= {"reverse": True, "nice": False, "padding": 10}
    x["axis"] = {"grid": False, "format": ",", "values": _marked(min(images), max(images))}
    if min(images) > 0 and max(images) > 3 * min(images):
        x["title"] += ", logarithmic"
        x["scale"] = {**x["scale"], "type": "log"}
        del x["scale"]["zero"]
    y = marks.number("mean", "accuracy in %", zero=True, domain=[0, 100])
    tip = marks.tip(["class"], images="training images", mean="mean in %", low="from", high="to")
    over = {"x": x, "color": marks.colour(styles)}

    def mean(field: str) -> Spec:
        return {"aggregate": "mean", "field": field, "type": "quantitative", "title": y["title"]}

    layers = []
    caption = "The largest classes at the left, a point a class and setting."
    if binned:
        caption = "The largest classes at the left; neighbours in rank are averaged."
    if marks.has(data, "low"):
        area = {"type": "area", "opacity": 0.15, "clip": True}
        band = {**over, "y": mean("low"), "y2": mean("high")}
        layers.append({"transform": [marks.known("low")], "mark": area, "encoding": band})
        caption += " Band: ± sample standard deviation over seeds."
    line = {**over, "y": mean("mean"), "strokeDash": marks.dash(styles)}
    layers.append({"mark": "line", "encoding": line})
    size = SMALL if binned else LARGE
    layers.append(marks.points(styles, {"x": x, "y": y, "tooltip": tip}, size))
    return Chart(
        title="Accuracy by class and training images",
        caption=caption,
        alternative=f"Accuracy of the classes, from {max(images):,.0f} training images down to "
        f"{min(images):,.0f}, a line a setting: {', '.join(data.labels)}. The numbers are in the "
        "table class by class.",
        spec=marks.spec(layers),
        data=data,
    )


def _marked(low: float, high: float) -> list[int]:
    """1, 2 and 5 times the powers of ten from `low` to `high`, and both ends."""
    steps = [n * 10**e for e in range(len(f"{high:.0f}")) for n in (1, 2, 5)]
    inner = [n for n in steps if 1.5 * low < n < high / 1.2]
    return [round(low), *inner, round(high)]


def _class_differences(block: Block, styles: Styles, data: Data, binned: bool) -> Chart:
    ranks = len({row[1] for row in data.rows})
    x: Spec = {"field": "class", "type": "ordinal", "sort": {"field": "rank", "op": "min"}}
    x |= {"title": "classes, the largest at the left"}
    x["axis"] = {"labelLimit": 90, "labelAngle": -45, "labelOverlap": True, "grid": False}
    y = marks.number("delta", f"points against {block.baseline}")
    tip = marks.tip(["class"], images="training images", delta="difference")
    base: Spec = {"x": x}
    layers = [marks.zero("y")]
    if ranks <= NAMED_CLASSES:
        base["xOffset"] = marks.offset(row.label for row in block.others)
        stem = {**base, "y": y, "y2": {"datum": 0}, "color": marks.colour(styles)}
        layers.append({"transform": [marks.known("delta")], "mark": "rule", "encoding": stem})
    size = LARGE if ranks <= NAMED_CLASSES else SMALL
    points = marks.points(styles, {**base, "y": y, "tooltip": tip}, size)
    layers.append({**points, "transform": [marks.known("delta")]})
    return Chart(
        title=f"Differences to {block.baseline} by class",
        caption="Difference of the mean accuracies over seeds, in points, without intervals."
        + (" Neighbours in rank are averaged." if binned else ""),
        alternative=f"How the classes differ from {block.baseline}, in points. The numbers are in "
        "the table class by class.",
        spec=marks.spec(layers),
        data=data,
        unseen=frozenset([str(block.baseline)]),
    )


def _head_against_tail(block: Block, styles: Styles) -> Chart | None:
    rows = []
    for place, row in enumerate(block.rows):
        head, tail = row.mean["head"], row.mean["tail"]
        if head is not None and tail is not None:
            spreads = [row.std["head"] or 0.0, row.std["tail"] or 0.0]
            ends = [head - spreads[0], head + spreads[0], tail - spreads[1], tail + spreads[1]]
            rows.append([place, head, tail, *(min(100.0, max(0.0, end)) for end in ends)])
    if not rows:
        return None
    columns = ["row", "head", "tail", "head_low", "head_high", "tail_low", "tail_high"]
    data = marks.table(styles, columns, rows)
    x, y = (
        marks.number("head", "head accuracy in %", padding=10, nice=False),
        marks.number("tail", "tail accuracy in %", padding=10, nice=False),
    )
    across = {"x": marks.at("head_low", x), "x2": {"field": "head_high"}, "y": y}
    along = {"x": x, "y": marks.at("tail_low", y), "y2": {"field": "tail_high"}}
    rules = [
        {
            "mark": {"type": "rule", "opacity": 0.6},
            "encoding": {**ends, "color": marks.colour(styles)},
        }
        for ends in (across, along)
    ]
    tip = marks.tip([], head="head in %", tail="tail in %")
    points = marks.points(styles, {"x": x, "y": y, "tooltip": tip}, 110)
    return Chart(
        title="Head against tail",
        caption="Mean accuracies, one point a setting; lines: ± sample standard deviation over "
        "seeds. Up is better for the tail, right for the head.",
        alternative="; ".join(
            f"{data.labels[row[0]]}: head {row[1]:.1f} %, tail {row[2]:.1f} %" for row in rows
        ),
        spec=marks.spec([*rules, points]),
        data=data,
    )


def _loss(block: Block, styles: Styles) -> Chart | None:
    curves = _losses(block)
    last = max((epoch for curve in curves.values() for epoch in curve), default=0)
    step = math.ceil(last / MOST_EPOCHS) or 1
    rows = [
        [place, epoch, loss]
        for place, curve in curves.items()
        for epoch, loss in curve.items()
        if epoch % step == 0 or epoch in (1, max(curve))
    ]
    if last < 2:
        return None
    data = marks.table(styles, ["row", "epoch", "loss"], rows)
    over = {
        "x": {**marks.number("epoch", "epoch"), "axis": {"values": _epochs(last), "format": "d"}},
        "y": marks.number("loss", "training loss", zero=True),
    }
    line = {**over, "color": marks.colour(styles), "strokeDash": marks.dash(styles)}
    # Broad and unseen, so that a line need not be hit exactly.
    tip = {
        **over,
        "detail": {"field": "row"},
        "tooltip": marks.tip(["epoch"], loss="loss:3"),
    }
    unseen = {"type": "point", "size": 60, "opacity": 0, "filled": True}
    return Chart(
        title="Training loss",
        caption="Mean over seeds at each epoch. Losses of different kinds, weights or schedules "
        "are not on one scale.",
        alternative="; ".join(
            f"{row.label}: {curves[place][max(curves[place])]:.3f} after the last epoch"
            for place, row in enumerate(block.rows)
            if curves[place]
        ),
        spec=marks.spec([{"mark": "line", "encoding": line}, {"mark": unseen, "encoding": tip}]),
        data=data,
    )


def _epochs(last: int) -> list[int]:
    """At most ten epochs to write on an axis."""
    step = next(n * 10**e for e in range(9) for n in (1, 2, 5) if last <= n * 10 ** (e + 1))
    return [*range(step, last + 1, step)]


def _losses(block: Block) -> dict[int, dict[int, float]]:
    """The training loss by epoch of each row, averaged over its seeds."""
    found = {place: curves(row).get("loss") for place, row in enumerate(block.rows)}
    return {
        place: dict(zip(curve.epochs, curve.mean, strict=True)) if curve else {}
        for place, curve in found.items()
    }


def of_pivot(pivot: Pivot, styles: Styles, key: str) -> list[Chart]:
    """Each metric against the values of the other key, where these are numbers above 0."""
    values = [labels.value(block.first, key) for block in pivot.blocks]
    if not all(isinstance(value, int | float) and value > 0 for value in values):
        return []
    shown = pivot.blocks[0].shown
    found = [_against_key(pivot, styles, key, values, metric) for metric in shown]
    return [chart for chart in found if chart]


def _against_key(
    pivot: Pivot, styles: Styles, key: str, values: Sequence[float], metric: str
) -> Chart | None:
    rows = []
    for value, part in zip(values, pivot.blocks, strict=True):
        for place, label in enumerate(pivot.labels):
            row = pivot.row(label, part)
            if row and row.mean[metric] is not None:
                ends = row.interval(metric) or (None, None)
                rows.append([place, value, row.mean[metric], *ends])
    if len({row[1] for row in rows}) < 2:
        return None
    data = marks.table(styles, ["row", "value", "mean", "low", "high"], rows)
    short = key.rpartition(".")[2]
    x = marks.number("value", f"{short}, logarithmic")
    x["scale"] = {"type": "log", "padding": 12}
    x["axis"] = {"values": sorted(set(values)), "format": "~g", "grid": False}
    y = marks.number("mean", heading(metric))
    digits = 3 if metric == "nll" else 1
    ends = {"mean": f"mean:{digits}", "low": f"from:{digits}", "high": f"to:{digits}"}
    tip = marks.tip([], value=f"{short}:~g", **ends)
    line = {"x": x, "y": y, "color": marks.colour(styles), "strokeDash": marks.dash(styles)}
    ends = {"x": x, "y": marks.at("low", y), "y2": {"field": "high"}}
    layers = [
        {"mark": "line", "encoding": line},
        *marks.interval(styles, data, ends),
        marks.points(styles, {"x": x, "y": y, "tooltip": tip}),
    ]
    return Chart(
        title=f"{heading(metric)} against {short}",
        caption="Mean over seeds; lines upright: its 95 % t interval, from 2 seeds on.",
        alternative=f"{heading(metric)} at {short} {', '.join(f'{v:g}' for v in values)}, a line a "
        f"setting: {', '.join(pivot.labels)}. The numbers are in the table above.",
        spec=marks.spec(layers),
        data=data,
    )


def _told(field: str, data: Data, unit: str) -> str:
    """All numbers of one column by row and group."""
    form = "+.1f" if field == "delta" else ".1f"
    place = data.columns.index(field)
    parts = []
    for i, label in enumerate(data.labels):
        values = [f"{row[1]} {row[place]:{form}}" for row in data.rows if row[0] == i]
        parts += [f"{label}: {', '.join(values)}"] if values else []
    return f"{unit}; {'; '.join(parts)}"
