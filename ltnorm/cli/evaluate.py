"""`ltnorm eval`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ltnorm.cli import options
from ltnorm.console import Output, grid

SAMPLINGS = ("natural", "balanced")
OTHER_METRICS = ("macro F1", "G-mean", "worst class", "NLL", "ECE")


def command(
    run: Annotated[Path, typer.Argument(help="A run's directory, or a checkpoint.")],
    split: Annotated[
        str | None, typer.Option("--split", help="test or val (the one the run was evaluated on).")
    ] = None,
    recalibrate: Annotated[
        list[str] | None,
        typer.Option(
            "--recalibrate",
            help="Also with statistics computed anew over the training set, sampled natural or "
            "balanced (every class equally); may be repeated.",
        ),
    ] = None,
    root: options.Root = options.ROOT,
    data_dir: options.DataDir = options.DATA_DIR,
    device: options.Device = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Evaluate a trained model by group and by class.

    Prints calibration, macro F1 and G-mean, too. The numbers are those of the run's result.csv.

    `ltnorm eval results/synthetic-exp100/resnet8-bn-ce/seed0 --recalibrate balanced`
    """
    from ltnorm.errors import UsageError, did_you_mean

    output = Output(quiet=quiet, json=json)
    if split not in (None, "test", "val"):
        raise UsageError(f"unknown split '{split}'", "choose from test, val")
    for sampling in recalibrate or ():
        if sampling not in SAMPLINGS:
            hint = did_you_mean(sampling, SAMPLINGS)
            raise UsageError(f"unknown sampling '{sampling}' of --recalibrate", hint)

    from ltnorm.evaluation.evaluate import evaluate_split
    from ltnorm.training.run import load_run

    trained = load_run(run, root, data_dir, device)
    recipe, data, model, where = trained.recipe, trained.data, trained.model, trained.device
    split = split or recipe.eval.split
    models = {"trained": model} | _recalibrated(recipe, model, data, recalibrate or (), where)
    measured = {
        name: evaluate_split(m, data, split, recipe.eval.groups, where)
        for name, m in models.items()
    }
    output.product(_tables(recipe, data, split, measured))
    output.document(_document(recipe, split, measured))


def _recalibrated(
    recipe: Any, model: Any, data: Any, samplings: Sequence[str], device: Any
) -> dict[str, Any]:
    """The model with statistics computed anew, by sampling."""
    from ltnorm.errors import UsageError
    from ltnorm.training.recalibrate import recalibrated

    try:
        return {s: recalibrated(recipe, model, data, s, device) for s in samplings}
    except ValueError as error:
        raise UsageError(
            f"--recalibrate: {recipe.norm.name} has no running statistics",
            "it is for norms that keep moving averages, as bn and compound do",
        ) from error


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _tables(recipe: Any, data: Any, split: str, measured: Mapping[str, Any]) -> Any:
    from rich.console import Group
    from rich.text import Text

    trained = measured["trained"]
    name = f"{data.set_id} · {recipe.model.name} · {recipe.norm.name} · seed {recipe.seed}"
    overall = [
        *([["statistics", *measured]] if len(measured) > 1 else []),
        *map(list, zip(*(_overall(m.metrics) for m in measured.values()), strict=True)),
    ]
    headings = ["all", *trained.metrics.groups, *OTHER_METRICS]
    for heading, column in zip(headings, overall[-len(headings) :], strict=True):
        column.insert(0, heading)
    metrics = trained.metrics
    classes = [
        ["class", *map(str, range(len(data.classes)))],
        ["name", *data.classes],
        ["train images", *(f"{count:,}" for count in data.counts)],
        ["group", *trained.groups],
        ["accuracy", *map(_percent, metrics.per_class)],
        ["", *("█" * round((accuracy or 0) / 4) for accuracy in metrics.per_class)],
    ]
    legend = f"in %, NLL in nats; groups by {trained.scheme}; ECE over 15 bins"
    if len(measured) > 1:
        legend += "; classes with the statistics as trained"
    title = Text(f"{name} · {split}", style="bold")
    tables = [
        grid(overall, left=(0,) if len(measured) > 1 else ()),
        Text(),
        grid(classes, left=(1, 3, 5)),
    ]
    return Group(title, *tables, Text(legend, style="dim"))


def _overall(metrics: Any) -> list[str]:
    """The cells of a row: all, the groups, and OTHER_METRICS."""
    return [
        _percent(metrics.accuracy),
        *map(_percent, metrics.groups.values()),
        *map(_percent, (metrics.macro_f1, metrics.gmean, metrics.worst_class)),
        f"{metrics.nll:.3f}",
        _percent(metrics.ece),
    ]


def _document(recipe: Any, split: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    trained, *others = (
        {**m.columns(), "per_class": m.metrics.per_class} for m in measured.values()
    )
    return {
        "norm": recipe.norm.name,
        "seed": recipe.seed,
        "split": split,
        **trained,
        "groups": measured["trained"].groups,
        "recalibrated": dict(zip(list(measured)[1:], others, strict=True)),
    }
