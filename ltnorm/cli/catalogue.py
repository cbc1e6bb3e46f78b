"""`ltnorm list`."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ltnorm.cli import options
from ltnorm.console import Output

if TYPE_CHECKING:
    from rich.table import Table

    from ltnorm.registry import Entry

STYLES = {
    "name": "bold",
    "summary": "",
    "source": "dim",
    "cost": "",
    "imbalance": "",
    "needs": "",
}
_WIDE = 120


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
        rows = [_row(kind, *item) for item in registry.listed(table_of[kind]).items()]
    output.product(_table(kind, rows, output.out.width))
    if kind is Kind.norms:
        legend = f"cost: {registry.COST_MEASURED}; `ltnorm bench` measures it on this machine"
        output.product(Text(legend, style="dim"))
    if kind is Kind.datasets:
        legend = "natural: the data's own imbalance, kept unless --ratio is given; cut: by --ratio"
        output.product(Text(legend, style="dim"))
    output.document(rows)


def _table(kind: Kind, rows: list[dict[str, str]], width: int) -> "Table":
    from rich.table import Table
    from rich.text import Text

    headed = kind in (Kind.norms, Kind.datasets)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=headed)
    # Of four columns of words none has room on a narrow terminal: the source goes below.
    below = kind is Kind.datasets and width < _WIDE
    for heading in rows[0]:
        if not (below and heading == "source"):
            table.add_column(heading, style=STYLES[heading], header_style="", overflow="fold")
    for row in rows:
        cells = {heading: Text(cell) for heading, cell in row.items()}
        if below:
            cells["summary"].append("\n").append(cells.pop("source").plain, style=STYLES["source"])
        table.add_row(*cells.values())
    return table


def _row(kind: Kind, name: str, entry: "Entry") -> dict[str, str]:
    """What is shown of an entry of the registry."""
    row = {"name": name, "summary": entry.summary}
    if kind is Kind.datasets:
        row |= {"imbalance": "natural" if entry.natural else "cut", "needs": entry.needs}
    row["source"] = entry.source
    if kind is Kind.norms:
        row["cost"] = entry.cost
    return row
