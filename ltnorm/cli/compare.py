"""`ltnorm compare`."""

import dataclasses
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ltnorm.cli import options
from ltnorm.console import Output
from ltnorm.errors import NothingFound, UsageError, did_you_mean

MOST_WARNINGS = 20


class Format(StrEnum):
    """How a comparison is printed."""

    table = "table"
    markdown = "markdown"
    latex = "latex"
    csv = "csv"
    json = "json"
    html = "html"


def command(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Folders of results, or result.csv files (results).")
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by",
            help="What the rows of a table differ in: norm, loss, ratio, model, or any key of the "
            "recipe. May be repeated (norm).",
        ),
    ] = None,
    pivot: Annotated[
        str | None, typer.Option("--pivot", help="Columns by another key: ratio, say.")
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="A row a class.")] = False,
    where: Annotated[
        str | None,
        typer.Option("--where", help="Only some runs: 'ratio==100 and loss==\"ce\"'."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="The norm, or row label, that deltas refer to (bn)."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="Column to show, may be repeated (all head medium tail)."),
    ] = None,
    sort: Annotated[
        str | None, typer.Option("--sort", help="Sort rows by a metric, the best first.")
    ] = None,
    best_only: Annotated[
        bool,
        typer.Option("--best-only", help="Of several rows of a norm the best by --sort (all)."),
    ] = False,
    published: Annotated[
        bool, typer.Option("--published", help="Show numbers of the literature beside.")
    ] = False,
    over_images: Annotated[
        bool,
        typer.Option(
            "--images/--no-images", help="Intervals over test images, where predictions are there."
        ),
    ] = True,
    format: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.table,
    out: Annotated[
        Path | None, typer.Option("--output", help="Write to this file instead of stdout.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw into this .png, .pdf or .svg file.")
    ] = None,
    panel: Annotated[
        list[str] | None,
        typer.Option("--panel", help="A picture of --plot, may be repeated (all that apply)."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write one self-contained page to this file.")
    ] = None,
    fail_below: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-below",
            help="tail=-1.0: exit 4 if the interval of a delta lies wholly below -1.0.",
        ),
    ] = None,
    fail_unless: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-unless", help="tail=+0.5: exit 4 unless it lies wholly at +0.5 or above."
        ),
    ] = None,
    norm: Annotated[
        list[str] | None,
        typer.Option("--norm", help="Gate only the rows of this norm, may be repeated."),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare finished runs: accuracy by group, differences with intervals, and cost.

    A row is one setting, a table all settings that differ only in the norm, or in what --by says.
    Only seeds are averaged. The rules of the statistics stand below each table.

    `ltnorm compare results/ --where 'ratio==100' --format latex`
    """
    from ltnorm.reporting import compare as comparing
    from ltnorm.reporting import gates, labels, load, schema, views
    from ltnorm.reporting import published as literature
    from ltnorm.reporting import where as selecting
    from ltnorm.reporting.condition import Condition
    from ltnorm.reporting.wording import missing_seeds

    output = Output(quiet=quiet, json=json)
    if json and format not in (Format.table, Format.json):
        raise UsageError(f"--json and --format {format} contradict", "leave one of them out")
    format = Format.json if json else format
    asked = [gates.Gate.parse(text, unless=False) for text in fail_below or ()]
    asked += [gates.Gate.parse(text, unless=True) for text in fail_unless or ()]
    if norm and not asked:
        raise UsageError(
            "--norm chooses the rows of a gate", "to show some: --where 'norm==\"gn\"'"
        )
    # What is not shown is not computed: over the images of many runs that takes seconds.
    whole = format in (Format.json, Format.csv) or html is not None
    condition = Condition.parse(where) if where is not None else None
    question = comparing.Question(
        by=tuple(dict.fromkeys(map(labels.key_of, by or comparing.BY))),
        baseline=baseline,
        metrics=tuple(metric) if metric else None,
        sort=sort,
        best_only=best_only,
        over_images=_imaged(metric, whole) if over_images else (),
        gated=tuple(gate.metric for gate in asked),
        selected_by=tuple(m for m in schema.METRICS if condition and m in condition.names),
    )
    across = labels.key_of(pivot) if pivot else None
    _check_views(across, question.by, per_class)
    drawable = _check_plot(plot, panel, format, output)
    _check_files({"--output": out, "--html": html, "--plot": plot})
    places = paths or [options.OUT]
    found, warnings = load.load(places)
    runs = selecting.select(found, condition) if condition else found
    beside = literature.read_beside(places) if published else []
    blocks = comparing.compare(runs, question, beside)
    _warn([*warnings, *missing_seeds(blocks, found)], output)
    _check_baseline(blocks, baseline, output)
    if published and not any(block.published for block in blocks):
        output.warn("no published number was found with the settings of any table here")
    view = _view(blocks, across, per_class, output)
    if (plot and drawable) or html:
        _warn([one for block in blocks for one in views.per_class(block)[1]], output)
    if plot and drawable:
        from ltnorm.reporting import figures

        schema.write_bytes(plot, figures.draw(blocks, panel or (), plot.suffix))
        output.note(f"figure written to {plot}")
    if html:
        from ltnorm.reporting import page

        schema.write_text(html, page.page(blocks))
        output.note(f"page written to {html}")
    _print(view, format, out, output)
    if plot and not drawable and format is Format.table:
        from ltnorm.reporting import figures

        output.product(figures.bars(blocks, output.out.width))
    if asked:
        gates.check(asked, blocks, norm or ())


def _warn(warnings: Sequence[str], output: Output) -> None:
    """The first warnings; of a sweep that is under way there may be hundreds."""
    for warning in warnings[:MOST_WARNINGS]:
        output.warn(warning)
    if (more := len(warnings) - MOST_WARNINGS) > 0:
        output.warn(f"{more} more of the like; `ltnorm runs --failed` lists unfinished runs")


def _imaged(metrics: Sequence[str] | None, whole: bool) -> tuple[str, ...]:
    """The metrics that need an interval over test images: all, or the one that a table shows."""
    from ltnorm.reporting.compare import DELTAS, TESTED
    from ltnorm.reporting.images import METRICS

    shown = [metric for metric in metrics or DELTAS if metric in METRICS]
    return METRICS if whole else (TESTED,) if TESTED in shown else tuple(shown[:1])


@dataclasses.dataclass(frozen=True)
class View:
    """What is printed: sheets for people, records for programs."""

    blocks: Sequence[Any]
    sheets: Sequence[Any]
    classes: Sequence[Any] = ()


def _view(blocks: Sequence[Any], across: str | None, per_class: bool, output: Output) -> View:
    from ltnorm.reporting import sheets, views

    if across:
        crossed = views.pivot(blocks, across)
        return View(blocks, sheets.of_pivots(crossed))
    if not per_class:
        return View(blocks, sheets.of_blocks(blocks))
    tables = []
    for block in blocks:
        table, warnings = views.per_class(block)
        for warning in warnings:
            output.warn(warning)
        tables += [table] if table else []
    if not tables:
        raise NothingFound(
            "no run has its per_class.csv", "`ltnorm train --force` makes the runs anew"
        )
    return View(blocks, [sheets.of_classes(table) for table in tables], tables)


def _print(view: View, format: Format, out: Path | None, output: Output) -> None:
    from ltnorm.reporting import export, schema

    if format is Format.table and out is None:
        output.product(export.table(view.sheets, output.out.width))
        return
    if format is Format.table:
        text = export.plain(view.sheets)
    elif format is Format.json:
        text = export.as_json(view.blocks, view.classes)
    elif format is Format.csv:
        rows = export.class_records(view.classes) if view.classes else export.records(view.blocks)
        text = export.as_csv(rows)
    else:
        printed = {
            Format.markdown: export.markdown,
            Format.latex: export.latex,
            Format.html: export.html_tables,
        }
        text = printed[format](view.sheets)
    if out is None:
        output.raw(text)
    else:
        schema.write_text(out, text)
        output.note(f"comparison written to {out}")


def _check_views(across: str | None, by: Sequence[str], per_class: bool) -> None:
    if not across:
        return
    if per_class:
        raise UsageError("--pivot and --per-class are two views", "leave one of them out")
    from ltnorm.reporting.labels import within

    if any(within(across, (part,)) or within(part, (across,)) for part in by):
        raise UsageError(
            f"--pivot {across} is what the rows differ in already", "--by names the rows"
        )


def _check_files(files: Mapping[str, Path | None]) -> None:
    """Raises UsageError before work starts where a file cannot be written, or would be twice."""
    from ltnorm.reporting import schema

    named: dict[Path, str] = {}
    for flag, file in files.items():
        if file is not None and (other := named.setdefault(file.absolute(), flag)) != flag:
            raise UsageError(f"{other} and {flag} name one file, {file}", "name two files")
    if (out := files["--output"]) is not None:
        schema.check_file(out, "--output")
    if (html := files["--html"]) is not None:
        from ltnorm.reporting import page

        page.check(html)


def _check_plot(
    plot: Path | None, panel: Sequence[str] | None, format: Format, output: Output
) -> bool:
    """Whether --plot can be drawn; without matplotlib there are bars instead, and a hint."""
    if plot is None:
        if panel:
            raise UsageError("--panel chooses what --plot draws", "add --plot FILE")
        return False
    from ltnorm.reporting import figures, plots

    figures.check_panels(panel or ())
    try:
        plots.check(plot)
    except plots.NoMatplotlib as error:
        instead = ": bars instead of a figure" if format is Format.table else ""
        output.warn(f"{error.message}{instead}; {error.hint}")
        return False
    return True


def _check_baseline(blocks: Sequence[Any], asked: str | None, output: Output) -> None:
    """Tell where deltas are missing; a baseline that was asked for must be somewhere."""
    without = [block for block in blocks if block.baseline is None]
    if not without:
        return
    labels = list(dict.fromkeys(row.label for block in without for row in block.rows))
    if asked and len(without) == len(blocks):
        raise UsageError(f"no single row is '{asked}'", did_you_mean(asked, labels))
    from ltnorm.reporting.wording import listed

    where = listed([block.title for block in without])
    name = f"single row '{asked}'" if asked else "baseline"
    output.warn(f"no {name} in {where}; --baseline takes {listed(labels)}")
