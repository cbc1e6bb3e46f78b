"""A comparison as a document: thin exporters over sheets, and records with every number."""

import html
import io
import json
import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.text import Text

from ltnorm.console import GAP, LABEL_WIDTH, grid
from ltnorm.reporting import cells
from ltnorm.reporting.compare import Block, Delta, Row
from ltnorm.reporting.sheets import Sheet
from ltnorm.reporting.views import ClassTable
from ltnorm.reporting.wording import facts, footnotes, legend, outcome

# What LaTeX reads as a command, and signs that its fonts have under other names.
LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "–": "--",
    "…": r"\dots{}",
}


def table(sheets: Sequence[Sheet], width: int) -> Group:
    """Tables for a terminal of `width` columns; what does not fit beside goes below."""
    parts: list[Any] = []
    for sheet in sheets:
        parts.append(Text(sheet.title, style="bold"))
        parts += [grid(part, left=range(sheet.lead)) for part in _fit(sheet, width)]
        parts += [Text(note, style="" if i == 0 else "dim") for i, note in enumerate(sheet.notes)]
        parts.append(Text())
    return Group(*parts, *(Text(text, style="dim") for text in _legends(sheets)))


def _legends(sheets: Sequence[Sheet]) -> list[str]:
    """Each legend once."""
    return list(dict.fromkeys(sheet.legend for sheet in sheets if sheet.legend))


def plain(sheets: Sequence[Sheet]) -> str:
    """The same as a text of 160 columns, for a file."""
    console = Console(file=io.StringIO(), width=160, highlight=False, emoji=False, no_color=True)
    console.print(table(sheets, console.width))
    return console.file.getvalue()


def _fit(sheet: Sheet, width: int) -> list[list[list[str]]]:
    """The columns in as few tables as fit, each led by the first ones; the last stay together."""
    columns = [list(column) for column in zip(sheet.headings, *sheet.rows, strict=True)]
    lead = columns[: sheet.lead]
    if _width(columns, sheet.lead) <= width:
        return [columns]
    end = len(columns) - sheet.together
    tables = [[*lead]]
    for part in (columns[sheet.lead : end], columns[end:]):
        if len(tables[-1]) > len(lead):
            tables.append([*lead])
        for column in part:
            here = tables[-1]
            if len(here) > len(lead) and _width([*here, column], sheet.lead) > width:
                tables.append([*lead])
            tables[-1].append(column)
    return [part for part in tables if len(part) > len(lead)]


def _width(columns: Sequence[Sequence[str]], lead: int) -> int:
    widths = [max(map(len, column)) for column in columns]
    widths[:lead] = [min(width, LABEL_WIDTH) for width in widths[:lead]]
    return sum(widths) + GAP * (len(columns) - 1)


def markdown(sheets: Sequence[Sheet]) -> str:
    """GitHub tables."""
    parts = []
    for sheet in sheets:
        numbers = len(sheet.headings) - sheet.lead
        lines = [f"**{_plain_markdown(sheet.title)}**", "", _markdown_row(sheet.headings)]
        lines.append("|" + "|".join([" --- "] * sheet.lead + [" ---: "] * numbers) + "|")
        lines += map(_markdown_row, sheet.rows)
        notes = [part for note in sheet.notes for part in ("", _plain_markdown(note))]
        parts.append("\n".join([*lines, *notes]))
    parts += map(_plain_markdown, _legends(sheets))
    return "\n\n".join(parts) + "\n"


def _markdown_row(row: Sequence[str]) -> str:
    return "| " + " | ".join(map(_plain_markdown, row)) + " |"


def _plain_markdown(text: str) -> str:
    """Text that Markdown, and the HTML in it, leave as it is."""
    # An underscore within a word, and brackets that are no link, are plain already.
    signs = r"([\\`*|]|(?<!\w)_|_(?!\w)|\](?=[(\[:]))"
    text = re.sub(signs, r"\\\1", " ".join(text.split()))
    return html.escape(text, quote=False)


def latex(sheets: Sequence[Sheet]) -> str:
    r"""Tables for a paper, a `table*` each; they need the packages booktabs and graphicx."""
    parts = [r"% needs \usepackage{booktabs,graphicx}", *(_latex_table(sheet) for sheet in sheets)]
    return "\n\n".join(parts) + "\n"


def _latex_table(sheet: Sheet) -> str:
    lead, numbers = sheet.lead, len(sheet.headings) - sheet.lead
    lines = [
        r"\begin{table*}",
        r"\centering\small\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{latex_text(sheet.title)}}}",
        # A table that is too wide is made smaller, others stay as they are.
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{@{{}}{'l' * lead}{'r' * numbers}@{{}}}}",
        r"\toprule",
        _latex_row(sheet.headings),
        r"\midrule",
    ]
    for place, row in enumerate(sheet.rows):
        if place in sheet.apart and place - 1 not in sheet.apart:
            lines.append(r"\midrule")
        lines.append(_latex_row(row))
    lines += [r"\bottomrule", r"\end{tabular}}"]
    notes = latex_text(" ".join([*sheet.notes, sheet.legend]))
    return "\n".join([*lines, rf"\par\smallskip\footnotesize\raggedright {notes}", r"\end{table*}"])


def _latex_row(row: Sequence[str]) -> str:
    # A bracket at the start of a row would be read as an argument of the `\\` before it.
    return " & ".join(re.sub(r"^(\[|\*)", r"{}\1", latex_text(cell)) for cell in row) + r" \\"


def latex_text(text: str) -> str:
    """Text that LaTeX prints as it is; letters that are not Latin need LuaLaTeX or XeLaTeX."""
    text = "".join(LATEX.get(sign, sign if sign.isprintable() else " ") for sign in text)
    return re.sub(r"(?<![\w$-])-(?=\d)", "$-$", text)


def html_tables(sheets: Sequence[Sheet]) -> str:
    """HTML tables, to be put into a page."""
    legends = [f"<p>{html.escape(text)}</p>" for text in _legends(sheets)]
    return "\n".join([*map(html_table, sheets), *legends]) + "\n"


def html_table(sheet: Sheet) -> str:
    """One HTML table with its title as a caption and its notes below."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in sheet.headings)
    lines = ["<figure>", "<table>", f"<caption>{html.escape(sheet.title)}</caption>"]
    lines += [f"<thead><tr>{head}</tr></thead>", "<tbody>"]
    for place, row in enumerate(sheet.rows):
        first, *others = map(html.escape, row)
        kind = ' class="published"' if place in sheet.apart else ""
        rest = "".join(f"<td>{cell}</td>" for cell in others)
        lines.append(f'<tr{kind}><th scope="row">{first}</th>{rest}</tr>')
    lines += ["</tbody>", "</table>"]
    notes = "<br>".join(map(html.escape, sheet.notes))
    return "\n".join([*lines, f"<figcaption>{notes}</figcaption>", "</figure>"])


def records(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """One flat record a row, full precision."""
    return [_record(block, row) for block in blocks for row in block.rows]


def _record(block: Block, row: Row) -> dict[str, Any]:
    first = row.first
    record: dict[str, Any] = {
        "block": block.title,
        "label": row.label,
        "model": first.model,
        "norm": first.norm,
        "loss": first.loss,
        "ratio": first.ratio,
        "fingerprint": first.fingerprint,
        "baseline": block.baseline,
        "eval_split": first.eval_split,
        "group_scheme": first.group_scheme,
        "n": row.n,
        "seeds": row.seeds,
    }
    for metric in block.shown:
        record |= {f"{metric}_mean": row.mean[metric], f"{metric}_std": row.std[metric]}
    for metric in dict.fromkeys([*block.shown, *block.deltas]):
        record |= _difference(metric, row.deltas.get(metric))
    return record | {
        "parameters": row.parameters,
        "epochs": row.epochs,
        "images_processed": row.images_processed,
        "train_seconds": row.train_seconds,
        "relative_time": row.relative_time,
    }


def _difference(metric: str, delta: Delta | None) -> dict[str, Any]:
    """A difference with all that is known of it; None in every field without one."""
    estimate, welch = (delta.estimate, delta.welch) if delta else (None, None)
    low, high = (delta and delta.images) or (None, None)
    found = {
        "delta": estimate and estimate.delta,
        "low": estimate and estimate.low,
        "high": estimate and estimate.high,
        "p": estimate and estimate.p,
        "adjusted_p": delta and delta.adjusted_p,
        "marked": delta and delta.marked,
        "paired": delta and delta.paired,
        "seed_correlation": delta and delta.correlation,
        "welch_low": welch and welch.low,
        "welch_high": welch and welch.high,
        "images_low": low,
        "images_high": high,
        "seeds_needed": delta and delta.seeds_needed,
    }
    return {f"{metric}_{name}": value for name, value in found.items()}


def class_records(tables: Sequence[ClassTable]) -> list[dict[str, Any]]:
    """One flat record a class and row."""
    found = []
    for one in tables:
        for label, values in one.accuracy.items():
            for place, (each, value) in enumerate(zip(one.classes, values, strict=True)):
                compared = one.has_baseline and label != one.block.baseline
                found.append(
                    {
                        "block": one.block.title,
                        "label": label,
                        "class": each.class_,
                        "name": each.name,
                        "train_images": each.train_images,
                        "group": each.group,
                        "accuracy_mean": value.mean,
                        "accuracy_std": value.std,
                        "accuracy_delta": one.delta(label, place) if compared else None,
                    }
                )
    return found


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """One CSV row a record; no cell is a formula to a spreadsheet."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    return cells.text([header, *([_csv_cell(row.get(key)) for key in header] for row in rows)])


def _csv_cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def as_json(blocks: Sequence[Block], tables: Sequence[ClassTable] = ()) -> str:
    """One JSON document: a record a row, and what the blocks say in words."""
    document: dict[str, Any] = {
        "rows": records(blocks),
        "blocks": [
            {
                "title": block.title,
                "by": list(block.by),
                "baseline": block.baseline,
                "outcome": outcome(block),
                "facts": facts(block),
                "footnotes": footnotes(block),
                "published": [
                    {"label": p.label, **p.values, "source": p.source, "note": p.note}
                    for p in block.published
                ],
            }
            for block in blocks
        ],
        "legend": legend(blocks),
    }
    if tables:
        document["classes"] = class_records(tables)
    return json.dumps(document, indent=2) + "\n"
