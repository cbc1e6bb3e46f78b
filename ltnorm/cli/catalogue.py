"""`ltnorm list`."""

from enum import StrEnum
from typing import Annotated

import typer

from ltnorm.cli import options
from ltnorm.console import Output


class Kind(StrEnum):
    """What can be listed."""

    norms = "norms"
    losses = "losses"
    models = "models"
    datasets = "datasets"
    recipes = "recipes"


def command(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """List norms, losses, models, datasets or recipes."""
    from rich.table import Table
    from rich.text import Text

    from ltnorm import registry

    output = Output(quiet=quiet, json=json)
    if kind is Kind.recipes:
        from ltnorm import recipe as recipes

        rows = [
            (name, recipes.summary(path), "") for name, path in recipes.shipped_recipes().items()
        ]
    else:
        tables = {
            Kind.norms: registry.NORMS,
            Kind.losses: registry.LOSSES,
            Kind.models: registry.MODELS,
            Kind.datasets: registry.DATASETS,
        }
        rows = [(name, entry.summary, entry.source) for name, entry in tables[kind].items()]
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name, summary, source in rows:
        cells = [Text(name, style="bold"), Text(summary), Text(source, style="dim")]
        table.add_row(*cells[: 3 if any(r[2] for r in rows) else 2])
    output.product(table)
    output.document([dict(zip(("name", "summary", "source"), row, strict=True)) for row in rows])
