"""`ltnorm compare`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ltnorm.cli import options
from ltnorm.console import Output


class Format(StrEnum):
    """How a comparison is printed."""

    table = "table"
    markdown = "markdown"
    csv = "csv"
    json = "json"


def command(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Folders of results, or result.csv files (results).")
    ] = None,
    baseline: Annotated[
        str, typer.Option("--baseline", help="The norm, or row label, that deltas refer to.")
    ] = "bn",
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="Column to show, may be repeated (all head medium tail)."),
    ] = None,
    sort: Annotated[
        str | None, typer.Option("--sort", help="Sort rows by a metric, the best first.")
    ] = None,
    format: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.table,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare finished runs: mean and spread over seeds, head, medium and tail, and the cost.

    A row is one setting, a block all settings that differ only in the norm. Only seeds are
    averaged.

    `ltnorm compare results/`
    """
    from ltnorm.reporting import compare as comparing
    from ltnorm.reporting import tables

    output = Output(quiet=quiet, json=json)
    results, problems = comparing.load(paths or [options.OUT])
    for problem in problems:
        output.warn(f"left out: {problem}")
    blocks = comparing.compare(
        results, baseline=baseline, metrics=metric or comparing.DEFAULT_METRICS, sort=sort
    )
    if not any(block.baseline for block in blocks):
        labels = sorted({row.label for block in blocks for row in block.rows})
        output.warn(f"no row '{baseline}' to compare with; --baseline takes: {', '.join(labels)}")
    if json:
        format = Format.json
    if format is Format.table:
        output.product(tables.table(blocks, output.out.width))
    else:
        exporters = {
            Format.markdown: tables.markdown,
            Format.csv: tables.as_csv,
            Format.json: tables.as_json,
        }
        output.raw(exporters[format](blocks))
