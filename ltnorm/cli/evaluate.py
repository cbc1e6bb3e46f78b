"""`ltnorm eval`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ltnorm.cli import options
from ltnorm.console import Output, grid


def command(
    run: Annotated[Path, typer.Argument(help="A run's directory, or a checkpoint.")],
    split: Annotated[
        str | None, typer.Option("--split", help="test or val (the one the run was evaluated on).")
    ] = None,
    root: options.Root = options.ROOT,
    data_dir: options.DataDir = options.DATA_DIR,
    device: options.Device = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Evaluate a trained model by group and by class.

    Prints calibration, macro F1 and G-mean, too. The numbers are those of the run's result.csv.

    `ltnorm eval results/synthetic-exp100/resnet8-bn-ce/seed0`
    """
    from ltnorm.errors import LtnormError, UsageError
    from ltnorm.training import checkpoint

    output = Output(quiet=quiet, json=json)
    if split not in (None, "test", "val"):
        raise UsageError(f"unknown split '{split}'", "choose from test, val")
    saved = checkpoint.load(run)
    recipe = saved.parsed_recipe()

    from ltnorm.data.prepare import prepare
    from ltnorm.evaluation.evaluate import evaluate_split
    from ltnorm.norms.layer import NewerStateError
    from ltnorm.training.device import resolve_device
    from ltnorm.training.run import build_model

    data = prepare(recipe.dataset, root, data_dir)
    if data.index_sha256 != saved.index_sha256:
        raise LtnormError(
            f"{data.path} does not hold the images that {run} was trained on",
            "name the prepared set of that run with --data-dir",
        )
    where = resolve_device(device or recipe.device)
    model = build_model(recipe, len(data.classes), data.image_size)
    try:
        model.load_state_dict(saved.model)
    except NewerStateError as error:
        raise LtnormError(
            f"the checkpoint of {run} cannot be read: {error}",
            "evaluate it with the version of ltnorm that wrote it",
        ) from error
    except RuntimeError as error:
        raise LtnormError(
            f"the checkpoint of {run} does not fit its own recipe", "train the run again (--force)"
        ) from error
    measured = evaluate_split(
        model.to(where), data, split or recipe.eval.split, recipe.eval.groups, where
    )
    output.product(_tables(recipe, data, split or recipe.eval.split, measured))
    output.document(_document(recipe, split or recipe.eval.split, measured))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _tables(recipe: Any, data: Any, split: str, measured: Any) -> Any:
    from rich.console import Group
    from rich.text import Text

    metrics = measured.metrics
    name = f"{data.set_id} · {recipe.model.name} · {recipe.norm.name} · seed {recipe.seed}"
    overall = [
        ["all", _percent(metrics.accuracy)],
        *([group, _percent(value)] for group, value in metrics.groups.items()),
        ["macro F1", _percent(metrics.macro_f1)],
        ["G-mean", _percent(metrics.gmean)],
        ["worst class", _percent(metrics.worst_class)],
        ["NLL", f"{metrics.nll:.3f}"],
        ["ECE", _percent(metrics.ece)],
    ]
    classes = [
        ["class", *map(str, range(len(data.classes)))],
        ["name", *data.classes],
        ["train images", *(f"{count:,}" for count in data.counts)],
        ["group", *measured.groups],
        ["accuracy", *map(_percent, metrics.per_class)],
        ["", *("█" * round((accuracy or 0) / 4) for accuracy in metrics.per_class)],
    ]
    legend = f"in %, NLL in nats; groups by {measured.scheme}; ECE over 15 bins"
    title = Text(f"{name} · {split}", style="bold")
    tables = [grid(overall, left=()), Text(), grid(classes, left=(1, 3, 5))]
    return Group(title, *tables, Text(legend, style="dim"))


def _document(recipe: Any, split: str, measured: Any) -> dict[str, Any]:
    return {
        "norm": recipe.norm.name,
        "seed": recipe.seed,
        "split": split,
        **measured.columns(),
        "per_class": measured.metrics.per_class,
        "groups": measured.groups,
    }
