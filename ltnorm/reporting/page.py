"""A comparison as one self-contained page: tables, plots, recipes, cost, environment.

The page is a document that needs nothing from the network and is whole without its scripts: the
tables are HTML. Scripts add sorting, filtering and the plots (Vega-Lite, from vl-convert-python).
All text of results is escaped, and a content security policy lets only the page's own scripts
run, by their hashes. The same results give the same page, byte for byte.
"""

import base64
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from ltnorm.errors import UsageError
from ltnorm.reporting import charts, labels, sections, views
from ltnorm.reporting.compare import Block
from ltnorm.reporting.marks import Chart, Style, Styles, of_rows, palette
from ltnorm.reporting.schema import check_file
from ltnorm.reporting.wording import listed, outcome

ENDINGS = (".html", ".htm")
PIVOT = "dataset.ratio"
FOOTER = """<footer>Made with ltnorm. Plots by Vega, Vega-Lite and Vega-Embed (BSD 3-Clause License,
University of Washington Interactive Data Lab and contributors).</footer>"""
# What a script of type JSON must not hold as it is: it could end the script.
UNSAFE = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def check(path: Path) -> None:
    """Check, before work starts, that a page can be written into a file.

    Raises:
        UsageError: another ending than .html or .htm, no vl-convert-python, or not writable.
    """
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(f"--html {path} is no page", f"end it in {' or '.join(ENDINGS)}")
    if importlib.util.find_spec("vl_convert") is None:
        raise UsageError("--html needs vl-convert-python", 'pip install "ltnorm[plot]"')
    check_file(path, "--html")


def page(blocks: Sequence[Block]) -> str:
    """The page of a comparison.

    Args:
        blocks: at least one; the files of their runs are read where they are there.
    """
    figures = Figures(palette(blocks))
    parts = [section(f"table-{i}", block, figures) for i, block in enumerate(blocks)]
    parts += _crossed(blocks, figures)
    body = "\n".join([figures.swatches(), _head(blocks), *parts, sections.STATISTICS, FOOTER])
    scripts = [library(), _asset("report.js")] if figures.charts else [_asset("report.js")]
    return _document(_title(blocks), body, figures.json(), scripts)


@functools.cache
def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script; making it takes seconds."""
    import vl_convert

    script = vl_convert.javascript_bundle().replace("\r\n", "\n")
    return re.sub(r"<(/script|!--)", r"<\\\1", script, flags=re.IGNORECASE)


class Figures:
    """The plots of a page; what several of them share is kept once."""

    def __init__(self, styles: Styles) -> None:
        self.looks = styles  # of all labels; `styles` are those that keys refer to
        self.charts: list[dict[str, Any]] = []
        self.data: dict[str, int] = {}
        self.specs: dict[str, int] = {}
        self.styles: dict[Style, int] = {}

    def figure(self, chart: Chart) -> str:
        """A place for a plot, with its title, its key and its text alternative."""
        name = f"plot-{len(self.charts)}"
        data, spec = (_safe_json(part) for part in (vars(chart.data), chart.spec))
        places = {"data": _place(self.data, data), "spec": _place(self.specs, spec)}
        self.charts.append({"id": name, **places})
        alternative = escape(f"{chart.title}: {chart.alternative}")
        return (
            f'<figure class="plot"><h4>{escape(chart.title)}</h4>{self._key(chart)}'
            f'<div class="chart" id="{name}" role="img" aria-label="{alternative}">'
            f'<p class="absent">This plot needs JavaScript. {alternative}</p></div>'
            f"<figcaption>{escape(chart.caption)}</figcaption></figure>"
        )

    def _key(self, chart: Chart) -> str:
        """What colour, dash and shape mean, for the rows that a plot draws."""
        column = chart.data.columns.index("row")
        drawn = {chart.data.labels[row[column]] for row in chart.data.rows} - chart.unseen
        items = []
        for label in chart.data.labels:
            if label in drawn:
                place = _place(self.styles, self.looks[label])
                swatch = f'<svg><use href="#style-{place}"/></svg>'
                items.append(f"<li>{swatch}{escape(label)}</li>")
        return f'<ul class="key">{"".join(items)}</ul>'

    def swatches(self) -> str:
        """What the keys refer to."""
        made = "".join(
            f'<g id="style-{place}"><path d="M-15,0H15" stroke="{style.colour}" stroke-width="2" '
            f'stroke-dasharray="{" ".join(map(str, style.dash))}"/>'
            f'<path d="{style.shape}" transform="scale(4)" fill="{style.colour}"/></g>'
            for style, place in self.styles.items()
        )
        return f'<svg class="swatches" aria-hidden="true"><defs>{made}</defs></svg>'

    def json(self) -> str:
        """All plots as JSON that no text in it can end."""
        parts = [f'"{name}":[{",".join(getattr(self, name))}]' for name in ("data", "specs")]
        return f'{{"charts":{_safe_json(self.charts)},{",".join(parts)}}}'


def _place(kept: dict[Any, int], value: Any) -> int:
    """The place of a value among those that are kept."""
    return kept.setdefault(value, len(kept))


def _safe_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(UNSAFE)


def section(name: str, block: Block, figures: Figures) -> str:
    """All that is known of a block, from the comparison to the seeds."""
    table, warnings = views.per_class(block)
    plots = charts.of_block(block, of_rows(block, figures.looks), table)
    parts = [
        f'<section id="{name}" aria-labelledby="{name}-title">',
        f'<h2 id="{name}-title">{escape(block.title)}</h2>',
        sections.comparison(block),
        _plots(plots, figures),
        "<h3>Details</h3>",
        sections.classes(table, len(warnings)),
        sections.recipes(block),
        sections.cost(block),
        sections.environment(block),
        sections.seeds(block),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _plots(plots: Sequence[Chart], figures: Figures) -> str:
    """The plots of a block, each with its key."""
    if not plots:
        return ""
    made = "\n".join(figures.figure(chart) for chart in plots)
    return f'<h3>Plots</h3>\n<div class="plots">\n{made}\n</div>'


def _crossed(blocks: Sequence[Block], figures: Figures) -> list[str]:
    """The same settings over the ratios, where blocks differ in it."""
    by = blocks[0].by
    if any(labels.within(PIVOT, (part,)) or labels.within(part, (PIVOT,)) for part in by):
        return []
    found = []
    pivots = [one for one in views.pivot(blocks, PIVOT) if len(one.blocks) > 1]
    for i, pivot in enumerate(pivots):
        name = f"ratios-{i}"
        styles = {label: figures.looks[label] for label in pivot.labels}
        found += [
            f'<section id="{name}" aria-labelledby="{name}-title">',
            f'<h2 id="{name}-title">Across ratios: {escape(pivot.title)}</h2>',
            *sections.crossed(pivot),
            _plots(charts.of_pivot(pivot, styles, PIVOT), figures),
            "</section>",
        ]
    return found


def _title(blocks: Sequence[Block]) -> str:
    by = [part.rpartition(".")[2] for part in blocks[0].by]
    return "Normalization layers compared" if by == ["norm"] else f"Runs compared by {listed(by)}"


def _head(blocks: Sequence[Block]) -> str:
    """Title, what was compared, and the outcome of each block in a sentence."""
    runs = [run.result for block in blocks for row in block.rows for run in row.runs]
    sets = listed(list(dict.fromkeys(run.dataset for run in runs)))
    newest = max(run.finished for run in runs)[:16].replace("T", " ")
    what = f"{_count(len(runs), 'finished run')} on {sets}, in {_count(len(blocks), 'table')}"
    items = [
        f'<li><a href="#table-{i}">{escape(block.title)}</a><br>{escape(outcome(block))}</li>'
        for i, block in enumerate(blocks)
    ]
    return "\n".join(
        [
            f"<h1>{escape(_title(blocks))}</h1>",
            f'<p class="what">{escape(what)}. The newest run finished {escape(newest)}.</p>',
            '<section aria-labelledby="outcome"><h2 id="outcome">Outcome</h2>',
            f'<ul class="outcome">{"".join(items)}</ul></section>',
        ]
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _document(title: str, body: str, data: str, scripts: Sequence[str]) -> str:
    style = _asset("report.css")
    policy = [
        "default-src 'none'",
        f"script-src {' '.join(map(_hash, scripts))}",
        f"style-src {_hash(style)}",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    made = "\n".join(f"<script>{script}</script>" for script in scripts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{"; ".join(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="ltnorm">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<main id="main" tabindex="-1">
{body}
</main>
<p class="status" role="status" id="status"></p>
<script type="application/json" id="plots">{data}</script>
{made}
</body>
</html>
"""


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _asset(name: str) -> str:
    folder = resources.files("ltnorm.reporting") / "assets"
    return (folder / name).read_text(encoding="utf-8")
