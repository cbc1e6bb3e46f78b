"""`ltnorm list`."""

from enum import StrEnum
from typing import Annotated

import typer

from ltnorm.cli import options
from ltnorm.console import Output

STYLES = {"name": "bold", "summary": "", "source": "dim", "cost": ""}


class Kind(StrEnum):
    """What can be listed."""

    norms = "norms"
    losses = "losses"
    models = "models"
    datasets = "datasets"
    samplers = "samplers"
    recipes = "recipes"


def command(
    what: Annotated[
        str, typer.Argument(metavar="|".join(Kind), help="What to list.", show_default=False)
    ],
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """List norms, losses, models, datasets, samplers or recipes."""
    from rich.table import Table
    from rich.text import Text

    from ltnorm import registry
    from ltnorm.errors import UsageError, did_you_mean

    output = Output(quiet=quiet, json=json)
    if what not in list(Kind):
        raise UsageError(f"nothing to list as '{what}'", did_you_mean(what, list(Kind)))
    kind = Kind(what)
    if kind is Kind.recipes:
        from ltnorm import resolve as recipes

        rows = [
            {"name": name, "summary": recipes.summary(path)}
            for name, path in recipes.shipped_recipes().items()
        ]
    else:
        table_of = {
            Kind.norms: "norm",
            Kind.losses: "loss",
            Kind.models: "model",
            Kind.datasets: "dataset",
            Kind.samplers: "sampler",
        }
        rows = [
            {"name": name, "summary": entry.summary, "source": entry.source}
            | ({"cost": entry.cost} if kind is Kind.norms else {})
            for name, entry in registry.listed(table_of[kind]).items()
        ]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=kind is Kind.norms)
    for heading in rows[0]:
        table.add_column(heading, style=STYLES[heading], header_style="", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row.values()))
    output.product(table)
    if kind is Kind.norms:
        legend = f"cost: {registry.COST_MEASURED}; `ltnorm bench` measures it on this machine"
        output.product(Text(legend, style="dim"))
    output.document(rows)
