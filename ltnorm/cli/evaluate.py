"""`ltnorm eval`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ltnorm.cli import options
from ltnorm.console import Output, grid
from ltnorm.errors import UsageError, did_you_mean

SAMPLINGS = ("natural", "balanced")
OTHER_METRICS = ("macro F1", "G-mean", "worst class", "NLL", "ECE")
TRAINED = "trained"


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
    tau_norm: Annotated[
        bool,
        typer.Option(
            "--tau-norm", help="Also with tau-normalized classifier weights; tau tuned, or --tau."
        ),
    ] = False,
    tau: Annotated[
        float | None,
        typer.Option(
            "--tau", min=0, max=100, help="The tau of --tau-norm (tuned on validation images)."
        ),
    ] = None,
    logit_adjust: Annotated[
        list[str] | None,
        typer.Option(
            "--logit-adjust",
            metavar="TAU",
            help="Also with logits less TAU log prior; auto tunes it on validation images. May be "
            "repeated.",
        ),
    ] = None,
    ncm: Annotated[
        bool, typer.Option("--ncm", help="Also by the nearest class mean of the features.")
    ] = False,
    root: options.Root = options.ROOT,
    data_dir: options.DataDir = options.DATA_DIR,
    device: options.Device = None,
    workers: options.Workers = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Evaluate a trained model by group and by class.

    Prints calibration, macro F1 and G-mean, too. The numbers are those of the run's result.csv;
    corrections after training are shown as rows beside them.

    `ltnorm eval results/synthetic-exp100/resnet8-bn-ce/seed0 --ncm --logit-adjust 1`
    """
    output = Output(quiet=quiet, json=json)
    if split not in (None, "test", "val"):
        raise UsageError(f"unknown split '{split}'", "choose from test, val")
    for sampling in recalibrate or ():
        if sampling not in SAMPLINGS:
            hint = did_you_mean(sampling, SAMPLINGS)
            raise UsageError(f"unknown sampling '{sampling}' of --recalibrate", hint)
    if tau is not None and not tau_norm:
        raise UsageError("--tau is of --tau-norm", "add --tau-norm, or use --logit-adjust TAU")
    taus = [_tau(text) for text in logit_adjust or ()]

    from ltnorm.evaluation.evaluate import evaluate_split
    from ltnorm.evaluation.posthoc import Corrections
    from ltnorm.training.trained import load_run

    trained = load_run(run, root, data_dir, device, workers)
    recipe, data, model, where = trained.recipe, trained.data, trained.model, trained.device
    split, groups = split or recipe.eval.split, recipe.eval.groups
    corrections = Corrections(model, data, split, groups, where, recipe.workers)
    if tau_norm:
        corrections.tau_norm(tau)
    for value in taus:
        corrections.logit_adjust(value)
    if ncm:
        corrections.ncm()
    measured = {TRAINED: evaluate_split(model, data, split, groups, where, recipe.workers)}
    recalibrated = {
        sampling: evaluate_split(m, data, split, groups, where, recipe.workers)
        for sampling, m in _recalibrated(recipe, model, data, recalibrate or (), where).items()
    }
    rows = {f"recalibrated {sampling}": found for sampling, found in recalibrated.items()}
    rows |= {row: found.evaluation for row, found in corrections.measured.items()}
    output.product(_tables(recipe, data, split, measured | rows))
    posthoc = [
        {"method": c.name, "tau": c.tau, "tuned": c.tuned, **_columns(c.evaluation)}
        for c in corrections.measured.values()
    ]
    output.document(
        _document(recipe, split, measured[TRAINED])
        | {"recalibrated": {k: _columns(found) for k, found in recalibrated.items()}}
        | {"posthoc": posthoc}
    )


def _tau(text: str) -> float | None:
    """A number from 0, or None for auto."""
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise UsageError(f"--logit-adjust '{text}' is no number in 0 .. 100", "like 1, or auto")
    return value


def _recalibrated(
    recipe: Any, model: Any, data: Any, samplings: Sequence[str], device: Any
) -> dict[str, Any]:
    """The model with statistics computed anew, by sampling."""
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

    trained = measured[TRAINED]
    parts = [data.set_id, recipe.model.name, recipe.norm.name, recipe.loss.name]
    parts += [f"then {recipe.retrain.method}"] if recipe.retrain else []
    name = " · ".join([*parts, f"seed {recipe.seed}"])
    several = len(measured) > 1
    headings = ["all", *trained.metrics.groups, *OTHER_METRICS]
    cells = [_overall(found.metrics) for found in measured.values()]
    overall = [list(column) for column in zip(headings, *cells, strict=True)]
    if several:
        overall.insert(0, ["model", *measured])
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
    if several:
        legend += "; classes of the model as trained"
    title = Text(f"{name} · {split}", style="bold")
    tables = [
        grid(overall, left=(0,) if several else ()),
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


def _columns(found: Any) -> dict[str, Any]:
    return {**found.columns(), "per_class": found.metrics.per_class}


def _document(recipe: Any, split: str, trained: Any) -> dict[str, Any]:
    return {
        "model": recipe.model.name,
        "norm": recipe.norm.name,
        "loss": recipe.loss.name,
        "sampler": recipe.sampler.name,
        "retrain": recipe.retrain.method if recipe.retrain else None,
        "seed": recipe.seed,
        "split": split,
        **_columns(trained),
        "groups": trained.groups,
    }
