"""`ltnorm retrain`."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ltnorm.cli import dryrun, options, train
from ltnorm.console import Output
from ltnorm.errors import UsageError

# A command's parameter -> the key of the recipe that it sets.
FLAGS = {
    "method": "retrain.method",
    "norm_mode": "retrain.norm",
    "loss": "retrain.loss.name",
    "sampler": "retrain.sampler.name",
    "epochs": "retrain.epochs",
    "lr": "retrain.lr",
    "tau": "retrain.tau",
    "tag": "retrain.tag",
    "device": "device",
    "workers": "workers",
}


def command(
    context: typer.Context,
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Directories of finished runs.")
    ],
    method: Annotated[
        str,
        typer.Option(
            "--method", help="crt, lws, tau-norm, logit-adjust or ncm.", show_default=False
        ),
    ],
    norm_mode: Annotated[
        str | None,
        typer.Option(
            "--norm-mode",
            help="Norm layers meanwhile: frozen, shifted (statistics go on), or adapting (weight "
            "and bias are trained besides).",
        ),
    ] = None,
    loss: options.Loss = None,
    sampler: Annotated[
        str | None, typer.Option("--sampler", help="Sampler of crt and lws (balanced).")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Epochs of crt and lws.")] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Their learning rate, cosine to zero.")
    ] = None,
    tau: Annotated[
        str | None,
        typer.Option("--tau", help="Of tau-norm and logit-adjust (tuned on validation images)."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any key of the second stage: `--set retrain.loss.gamma=1`."),
    ] = None,
    tag: options.Tag = None,
    device: options.Device = None,
    workers: options.Workers = None,
    root: options.Root = options.ROOT,
    data_dir: options.DataDir = options.DATA_DIR,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where results are written (beside RUN's).")
    ] = None,
    log: options.Log = None,
    checkpoint_steps: options.CheckpointSteps = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train the classifier of finished runs anew: the second stage.

    The features stay. The result is a run of its own, whose cost includes the first stage.

    `ltnorm retrain results/synthetic-exp100/resnet8-bn-ce/seed0 --method crt`
    """
    from ltnorm.reporting import schema
    from ltnorm.training.log import check as check_log

    check_log(log)
    output = Output(quiet=quiet, json=json, log=log)
    flags = {FLAGS[k]: v for k, v in context.params.items() if k in FLAGS and v is not None}
    done: dict[Path, Any] = {}
    planned: list[train.Job] = []
    with train.interruptible(done, planned, force):
        runs = list(dict.fromkeys(runs))
        recipes = [_recipe(run, flags, set_ or ()) for run in runs]
        places = [out or _tree(run) for run in runs]
        if dry_run:
            planned_runs = list(zip(recipes, places, strict=True))
            dryrun.show(planned_runs, root, data_dir, force, output, firsts=runs)
            return
        for place in dict.fromkeys(places):
            schema.check_out(place)
        for run, recipe, place in zip(runs, recipes, places, strict=True):
            keeping = {"steps": checkpoint_steps, "anew": force}
            steps = partial(_steps, run, recipe, root, data_dir, place, keeping, output)
            planned.append(train.Job(str(run), steps))
        train.run_all(planned, done, output)


def _recipe(run: Path, flags: dict[str, Any], sets: Sequence[str]) -> Any:
    """The recipe of both stages: that of a finished run, and the flags; checked."""
    from ltnorm.resolve import Overrides, resolve
    from ltnorm.training import checkpoint, twostage
    from ltnorm.training.device import resolve_device

    for item in sets:
        if not item.startswith("retrain."):
            raise UsageError(
                f"--set {item} changes the first stage, which is finished",
                "here only keys of the second stage can be set: retrain.KEY=...",
            )
    first = checkpoint.load(run).parsed_recipe()
    if first.retrain:
        raise UsageError(
            f"{run} is a second stage itself ({first.retrain.method})",
            "name the run that it started from",
        )
    overrides = Overrides(flags, sets, [first.norm.name], [first.seed])
    [recipe] = resolve(first.model_dump(), overrides)
    twostage.check_finished(checkpoint.file_of(run).parent)
    resolve_device(recipe.device)
    twostage.check(recipe)
    return recipe


def _steps(
    run: Path,
    recipe: Any,
    root: Path,
    data_dir: Path,
    out: Path,
    keeping: Mapping[str, Any],
    output: Output,
    wait: bool,
) -> Any:
    from ltnorm.reporting import schema
    from ltnorm.training import twostage
    from ltnorm.training.resume import Keeping

    first = twostage.load_first(run, root, data_dir, recipe.device)
    directory = schema.run_directory(recipe, out)
    how, data = Keeping(**keeping), first.trained.data
    if not how.anew and (result := train.finished(directory, recipe, data, output, run)):
        return directory, result
    made = yield from twostage.steps(recipe, first, out, output, keeping=how, wait=wait)
    return directory, made


def _tree(run: Path) -> Path:
    """The results tree that a run lies in: <tree>/<dataset>/<setting>/<seed>."""
    from ltnorm.reporting.schema import OWNER

    directory = (run.parent if run.is_file() else run).resolve()
    marked = (directory.parent / OWNER).is_file() or directory.name.startswith("seed")
    if not marked or len(directory.parents) < 3:
        return options.OUT
    return Path(os.path.relpath(directory.parents[2]))
