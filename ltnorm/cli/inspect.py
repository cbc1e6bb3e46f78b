"""`ltnorm inspect`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ltnorm.cli import options
from ltnorm.console import Output
from ltnorm.errors import UsageError, did_you_mean

SPLITS = ("train", "val", "test")


def command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Directories of runs, or checkpoints.")
    ],
    split: Annotated[
        str | None,
        typer.Option("--split", help="test, val or train (the one the run was evaluated on)."),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Write all numbers to this file, one a row.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw them into this .png, .pdf or .svg file.")
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option("--layer", help="The layer whose density --plot draws (the last)."),
    ] = None,
    channel: Annotated[
        int | None,
        typer.Option("--channel", help="Its channel (where head and tail lie furthest apart)."),
    ] = None,
    root: options.Root = options.ROOT,
    data_dir: options.DataDir = options.DATA_DIR,
    device: options.Device = None,
    workers: options.Workers = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Look into the norm layers of trained models, by class group.

    Prints, for each layer, how far the normalized features of head, medium and tail lie from mean
    0 and variance 1, and how the components of a mixture are shared among them. Several runs are
    also put side by side.

    `ltnorm inspect results/synthetic-exp100/resnet8-compound-ce/seed0`
    """
    from ltnorm.reporting import inspection as reporting
    from ltnorm.reporting import plots, schema

    output = Output(quiet=quiet, json=json)
    if split is not None and split not in SPLITS:
        raise UsageError(f"unknown split '{split}'", did_you_mean(split, SPLITS))
    if plot is None and (layer is not None or channel is not None):
        raise UsageError("--layer and --channel choose what --plot draws", "add --plot FILE")
    if csv is not None:
        schema.check_file(csv, "--csv")
    if plot is not None:
        plots.check(plot)

    from ltnorm.evaluation.inspection import choose
    from ltnorm.training.trained import load_run

    seen, densities = [], []
    for run in runs:
        trained = load_run(run, root, data_dir, device, workers)
        inspector = _inspector(trained, split)
        inspector.check_layer(layer)
        found = inspector.inspect()
        seen.append(_inspected(run, trained, found))
        if plot is not None:
            densities.append(inspector.density(*choose(found, layer, channel)))
    if csv is not None:
        schema.write_rows(csv, reporting.CSV_COLUMNS, reporting.csv_rows(seen))
        output.note(f"numbers written to {csv}")
    if plot is not None:
        schema.write_bytes(plot, plots.inspection(seen, densities, plot.suffix))
        output.note(f"figure written to {plot}")
    output.product(reporting.tables(seen, output.out.width))
    output.document(reporting.document(seen))


def _inspector(trained: Any, split: Any) -> Any:
    from ltnorm.evaluation.inspection import Inspector

    recipe = trained.recipe
    split = split or recipe.eval.split
    return Inspector(
        trained.model,
        recipe.norm.name,
        trained.data,
        split,
        recipe.eval.groups,
        trained.device,
        recipe.workers,
    )


def _inspected(run: Path, trained: Any, found: Any) -> Any:
    from ltnorm.reporting.inspection import Inspected

    recipe = trained.recipe
    return Inspected(
        run=str(run),
        set_id=trained.data.set_id,
        model=recipe.model.name,
        norm=recipe.norm.name,
        norm_options=recipe.norm.changes(),
        tag=recipe.tag,
        seed=recipe.seed,
        inspection=found,
    )
