"""A comparison as text: thin exporters over the blocks of `compare`."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

from ltnorm.console import LABEL_WIDTH, grid
from ltnorm.reporting.compare import DELTAS, Block, Row

GAP = 2  # between two columns of a table
COST = ["params", "epochs", "images", "time"]
HEADINGS = {
    "gmean": "G-mean",
    "macro_f1": "macro F1",
    "worst_class": "worst class",
    "nll": "NLL",
    "ece": "ECE",
}


def _value(row: Row, metric: str) -> str:
    mean, std = row.mean[metric], row.std[metric]
    if mean is None:
        return "–"
    digits = 3 if metric == "nll" else 1
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def _delta(row: Row, metric: str) -> str:
    delta = row.delta.get(metric)
    return "–" if delta is None or row.is_baseline else f"{delta:+.1f}"


def _count(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _cells(block: Block) -> tuple[list[str], list[list[str]]]:
    """Headings, and one list of cells a row."""
    headings = ["norm", "n", *(HEADINGS.get(m, m) for m in block.metrics)]
    headings += [f"Δ {m}" for m in DELTAS]
    headings += COST
    rows = []
    for row in block.rows:
        cells = [row.label, str(row.n), *(_value(row, m) for m in block.metrics)]
        cells += [_delta(row, m) for m in DELTAS]
        time = f"{row.train_seconds:.0f} s"
        if row.relative_time is not None:
            time += f" ({row.relative_time:.2f}x)"
        epochs = f"{row.epochs:.4g}"
        cost = [_count(row.parameters), epochs, _count(row.images_processed), time]
        rows.append(cells + cost)
    return headings, rows


def legend(block: Block) -> str:
    """What the numbers of a block's table mean."""
    head, medium, tail = block.group_classes
    spread = "mean ± sample standard deviation over n seeds"
    if any(row.n == 1 for row in block.rows):
        spread += " (1 seed: no spread)"
    against = "no baseline row, so no Δ"
    if block.baseline:
        against = f"Δ in points and time against {block.baseline}"
    if not block.paired:
        against += "; the rows have different seeds"
    if len(block.devices) > 1:
        against += f"; trained on {', '.join(block.devices)}"
    unit = "in %, NLL in nats" if "nll" in block.metrics else "in %"
    return (
        f"{block.eval_split} set, {unit}, {spread}, last epoch. head / medium / tail: mean over "
        f"{head} / {medium} / {tail} classes ({block.group_scheme}). {against}. "
        "images: training images through the network; time: training of one run."
    )


def table(blocks: Sequence[Block], width: int) -> Group:
    """Tables for a terminal of `width` columns; what does not fit beside goes below."""
    parts: list[Any] = []
    for block in blocks:
        headings, rows = _cells(block)
        columns = [list(column) for column in zip(headings, *rows, strict=True)]
        parts.append(Text(block.title, style="bold"))
        parts += [grid(part) for part in _fit(columns, width)]
        parts += [Text(legend(block), style="dim"), Text()]
    return Group(*parts[:-1])


def _fit(columns: list[list[str]], width: int) -> list[list[list[str]]]:
    """The columns in as few tables as fit, each led by the first column; the cost stays whole."""
    label, accuracy, cost = columns[0], columns[1 : -len(COST)], columns[-len(COST) :]
    if _width(columns) <= width:
        return [columns]
    tables = [[label]]
    for part in (accuracy, cost):
        if len(tables[-1]) > 1:
            tables.append([label])
        for column in part:
            if len(tables[-1]) > 1 and _width([*tables[-1], column]) > width:
                tables.append([label])
            tables[-1].append(column)
    return tables


def _width(columns: Sequence[Sequence[str]]) -> int:
    label, *numbers = (max(map(len, column)) for column in columns)
    return min(label, LABEL_WIDTH) + sum(numbers) + GAP * (len(columns) - 1)


def markdown(blocks: Sequence[Block]) -> str:
    """GitHub tables."""
    parts = []
    for block in blocks:
        headings, rows = _cells(block)
        lines = [f"**{block.title}**", "", _markdown_row(headings)]
        lines.append("|" + "|".join([" --- ", *[" ---: "] * (len(headings) - 1)]) + "|")
        lines += [_markdown_row(cells) for cells in rows]
        parts.append("\n".join([*lines, "", legend(block)]))
    return "\n\n".join(parts) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def records(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """One flat record a row, full precision."""
    return [
        {
            "block": block.title,
            "label": row.label,
            "norm": row.norm,
            "fingerprint": row.fingerprint,
            "baseline": block.baseline,
            "eval_split": block.eval_split,
            "group_scheme": block.group_scheme,
            "n": row.n,
            "seeds": row.seeds,
            **{f"{m}_mean": row.mean[m] for m in block.metrics},
            **{f"{m}_std": row.std[m] for m in block.metrics},
            **{f"{m}_delta": row.delta.get(m) for m in DELTAS},
            "parameters": row.parameters,
            "epochs": row.epochs,
            "images_processed": row.images_processed,
            "train_seconds": row.train_seconds,
            "relative_time": row.relative_time,
        }
        for block in blocks
        for row in block.rows
    ]


def as_csv(blocks: Sequence[Block]) -> str:
    """One CSV row a row of the tables."""
    rows = records(blocks)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "seeds": " ".join(map(str, row["seeds"]))} for row in rows)
    return buffer.getvalue()


def as_json(blocks: Sequence[Block]) -> str:
    """One JSON document."""
    return json.dumps({"rows": records(blocks)}, indent=2) + "\n"
