"""`ltnorm diff`."""

from pathlib import Path
from typing import Annotated

import typer

from ltnorm.cli import options
from ltnorm.console import Output


def command(
    run_a: Annotated[
        Path, typer.Argument(metavar="RUN_A", help="A run's directory, or its result.csv.")
    ],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another one.")],
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Tell what differs between two runs: recipes, metrics, cost and environment.

    Of a run that is not finished, recipes alone are compared.

    `ltnorm diff results/cifar10-exp100/resnet32-{bn,gn}-ce/seed0`
    """
    from ltnorm.reporting import diff

    output = Output(quiet=quiet, json=json)
    found = diff.diff(diff.load(run_a), diff.load(run_b))
    output.product(diff.shown(found))
    output.document(diff.document(found))
