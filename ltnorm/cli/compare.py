"""`ltnorm compare`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ltnorm.cli import options
from ltnorm.console import Output
from ltnorm.errors import UsageError, did_you_mean

DEFAULT_BASELINE = "bn"


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
    format: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.table,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare finished runs: accuracy by group, and cost.

    Prints mean and spread over seeds. A row is one setting, a block all settings that differ only
    in the norm. Only seeds are averaged.

    `ltnorm compare results/`
    """
    from ltnorm.reporting import compare as comparing
    from ltnorm.reporting import tables

    output = Output(quiet=quiet, json=json)
    results, warnings = comparing.load(paths or [options.OUT])
    for warning in warnings:
        output.warn(warning)
    blocks = comparing.compare(
        results,
        baseline=baseline or DEFAULT_BASELINE,
        metrics=metric or comparing.DEFAULT_METRICS,
        sort=sort,
    )
    _check_baseline(blocks, baseline, output)
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


def _check_baseline(blocks: list[Any], asked: str | None, output: Output) -> None:
    """Tell where deltas are missing; a baseline that was asked for must be somewhere."""
    without = [block for block in blocks if block.baseline is None]
    if not without:
        return
    labels = list(dict.fromkeys(row.label for block in without for row in block.rows))
    if asked and len(without) == len(blocks):
        raise UsageError(f"no single row is '{asked}'", did_you_mean(asked, labels))
    where = "; ".join(block.title for block in without)
    name = asked or DEFAULT_BASELINE
    output.warn(f"no single row '{name}' in {where}; --baseline takes: {', '.join(labels)}")
