"""`ltnorm sweep`."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ltnorm.cli import jobs as processes
from ltnorm.cli import options, sweep_plan, train
from ltnorm.console import Output
from ltnorm.errors import LtnormError, UsageError, did_you_mean

if TYPE_CHECKING:
    from ltnorm.recipe import Recipe
    from ltnorm.sweep.grid import Grid
    from ltnorm.sweep.plan import Job
    from ltnorm.sweep.work import Launcher, Work

AXES = ("dataset", "model", "ratio", "loss", "sampler", "norm")
LAUNCHERS = ("local", "ray")


def _many(flag: str, help_: str) -> Any:
    return typer.Option(flag, help=f"{help_}, may be repeated.")


def command(
    context: typer.Context,
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[SWEEP.yaml]...", help="Files that say it all, a grid each."),
    ] = None,
    norm: Annotated[list[str] | None, _many("--norm", "Norm")] = None,
    loss: Annotated[list[str] | None, _many("--loss", "Loss")] = None,
    ratio: Annotated[list[float] | None, _many("--ratio", "Largest class over smallest")] = None,
    dataset: Annotated[list[str] | None, _many("--dataset", "Data set")] = None,
    model: Annotated[list[str] | None, _many("--model", "Backbone")] = None,
    sampler: Annotated[list[str] | None, _many("--sampler", "Sampler")] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="Seeds: 0-4 or 1,3.")] = None,
    axis: Annotated[
        list[str] | None, _many("--grid", "Values of any key: `--grid train.lr=0.1,0.2`")
    ] = None,
    exclude: Annotated[
        list[str] | None, _many("--exclude", "Runs to leave out: `--exclude norm=gn,ratio=10`")
    ] = None,
    recipe: options.Recipe = None,
    set_: options.Set = None,
    pretrained: Annotated[
        Path | None,
        typer.Option("--pretrained", help="A local file of weights that the models start from."),
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Budget in epochs.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Budget in steps.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Images a step.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")] = None,
    precision: options.Precision = None,
    device: options.Device = None,
    workers: options.Workers = None,
    eval_split: Annotated[
        str | None, typer.Option("--eval-split", help="test, or val: of held-out images.")
    ] = None,
    val: options.Val = None,
    data_seed: options.DataSeed = None,
    tag: options.Tag = None,
    launcher: Annotated[
        str, typer.Option("--launcher", help="local: processes here; ray: a Ray cluster.")
    ] = "local",
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, help="Runs at a time (1, or one a GPU; all that Ray holds)."),
    ] = None,
    gpus_per_run: Annotated[
        float | None,
        typer.Option("--gpus-per-run", min=0, max=1, help="0.5 puts two runs on one GPU (1)."),
    ] = None,
    cpus_per_run: Annotated[
        float, typer.Option("--cpus-per-run", min=0, help="Cores that Ray keeps for a run.")
    ] = 1,
    address: Annotated[
        str | None,
        typer.Option("--address", help="A Ray cluster to join: auto, or HOST:PORT (starts one)."),
    ] = None,
    retries: Annotated[
        int, typer.Option("--retries", min=0, help="How often a lost run is tried again.")
    ] = processes.RETRIES,
    part: Annotated[
        str | None, typer.Option("--part", help="I/N: each N-th run only, for job arrays.")
    ] = None,
    log: options.Log = None,
    checkpoint_steps: options.CheckpointSteps = None,
    root: options.Root = options.ROOT,
    data_dir: options.DataDir = options.DATA_DIR,
    out: options.Out = options.OUT,
    dry_run: options.DryRun = False,
    estimate: Annotated[
        bool, typer.Option(help="With --dry-run: time some steps, to tell how long it takes.")
    ] = True,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a grid of runs: norms, losses, ratios, data sets, seeds, and any key.

    Each run is one of `ltnorm train`, by processes of this machine or of a Ray cluster. A run that
    fails does not end the others; the same command again makes what is missing.

    `ltnorm sweep --norm bn --norm compound --ratio 10 --ratio 100 --seeds 0-4 --jobs 2`
    """
    if launcher not in LAUNCHERS:
        raise UsageError(f"unknown launcher '{launcher}'", did_you_mean(launcher, LAUNCHERS))
    if address and launcher != "ray":
        raise UsageError("--address is of a Ray cluster", "add --launcher ray")
    from ltnorm.reporting import schema
    from ltnorm.sweep import plan as planning
    from ltnorm.sweep.grid import expand_all
    from ltnorm.training.log import check as check_log

    check_log(log)
    output = Output(quiet=quiet, json=json)
    asked = _grids(files or (), context.params)
    done: dict[Any, Any] = {}
    planned: list[Job] = []
    with train.interruptible(done, planned, force):
        cells, warnings = expand_all(asked)
        for warning in warnings:
            output.warn(warning)
        places = (root, data_dir, out)
        if launcher == "ray":  # whose workers live in other folders
            places = tuple(place.absolute() for place in places)
        shared = processes.Shared(*places, pretrained, log, checkpoint_steps)
        if not dry_run:
            schema.check_out(out)
        recipes = [cell.recipe for cell in cells]
        with _launching(
            launcher, recipes, shared.arguments(), jobs, gpus_per_run, cpus_per_run, address
        ) as where:
            all_ = processes.plan(cells, shared, where, output, dry_run=dry_run)
            planned += planning.part(all_, part) if part else all_
            at_a_time = where.places
            if not dry_run:
                work = processes.carry_out(planned, where, retries, force, out, output, done)
        if dry_run:
            sweep_plan.show(planned, at_a_time, estimate, force, output)
        else:
            _show(planned, work, output)


def _grids(files: Sequence[Path], flags: Mapping[str, Any]) -> "list[Grid]":
    """The grids of files, or of flags alone."""
    from ltnorm.sweep.file import read_grids
    from ltnorm.sweep.grid import Grid, path_of

    grids = [grid for file in files for grid in read_grids(file)] or [Grid()]
    grids = [_with_flags(grid, flags) for grid in grids]
    for item in flags["exclude"] or ():
        exclusion = dict(_assignments(item))
        paths = {path_of(key) for key in exclusion}
        # Of several grids those that have these axes; where none has, all say so.
        for grid in [grid for grid in grids if paths <= grid.axes.keys()] or grids:
            grid.exclude(exclusion)
    return grids


def _with_flags(asked: "Grid", flags: Mapping[str, Any]) -> "Grid":
    """A grid with flags, which win over it."""
    from ltnorm import resolve

    asked.recipe = flags["recipe"] or asked.recipe
    for name in AXES:
        if flags[name]:
            asked.vary(name, flags[name])
    if flags["seeds"] is not None:
        asked.vary("seed", options.parse_seeds(flags["seeds"]))
    for item in flags["axis"] or ():
        key, values = _assigned("--grid", item, "train.lr=0.1,0.2")
        asked.vary(key, values)
    fixed = {name: value for name, value in flags.items() if name not in AXES}
    for key, value in options.recipe_flags(fixed).items():
        asked.fix(key, value)
    for item in flags["set_"] or ():
        asked.fix(*resolve.parse_set(item))
    if flags["pretrained"] is not None:
        from ltnorm.pretrained import pretrained_sha256

        asked.fix("model.pretrained", pretrained_sha256(flags["pretrained"]))
    return asked


def _assigned(flag: str, item: str, example: str) -> tuple[str, list[Any]]:
    """The key and the values of `KEY=V1,V2`."""
    import yaml

    key, equals, values = item.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"{flag} {item}: not KEY=VALUES", f"for example {flag} {example}")
    try:
        return key.strip(), yaml.safe_load(f"[{values}]")
    except yaml.YAMLError as error:
        raise UsageError(
            f"{flag} {item}: the values are not YAML", f"for example {flag} {example}"
        ) from error


def _assignments(item: str) -> Iterator[tuple[str, list[Any]]]:
    """The pairs of `KEY=V,KEY=V`; a part without a key is another value of the one before."""
    pairs: list[str] = []
    for part in item.split(","):
        if "=" in part or not pairs:
            pairs.append(part)
        else:
            pairs[-1] += f",{part}"
    for pair in pairs:
        yield _assigned("--exclude", pair, "norm=gn,ratio=10")


@contextmanager
def _launching(
    name: str,
    recipes: Sequence["Recipe"],
    arguments: Sequence[str],
    jobs: int | None,
    gpus_per_run: float | None,
    cpus_per_run: float,
    address: str | None,
) -> Iterator["Launcher"]:
    """What makes the runs; it ends those that are still running."""
    if name == "local":
        with processes.here(recipes, arguments, jobs, gpus_per_run) as local:
            yield local
        return
    from ltnorm.sweep.on_ray import Ray

    ray = Ray(arguments, jobs, gpus_per_run, cpus_per_run, address, processes.on_gpu(recipes))
    try:
        yield ray
    finally:
        ray.stop()


def _show(planned: Sequence["Job"], work: "Work", output: Output) -> None:
    """The table of what is finished, and all failures.

    Raises:
        LtnormError: a run failed.
    """
    from ltnorm.reporting.compare import compare
    from ltnorm.reporting.export import table
    from ltnorm.reporting.schema import Run
    from ltnorm.reporting.sheets import of_blocks

    runs = [Run(work.finished[job], job.directory) for job in planned if job in work.finished]
    if runs:
        output.product(table(of_blocks(compare(runs)), output.out.width))
    failures = {failure.job: failure for failure in work.failed}
    output.document(
        {
            "finished": len(runs),
            "failed": len(failures),
            "runs": [_row(job, work.finished.get(job), failures.get(job)) for job in planned],
        }
    )
    for job, failure in failures.items():
        output.err.print(f"{job.directory}: {failure.error}", markup=False, soft_wrap=True)
        output.err.print(f"  {failure.hint}", markup=False, soft_wrap=True, style="dim")
    if failures:
        logs = "the same command makes what is missing; log.txt in each folder has what was said"
        raise LtnormError(f"{len(failures)} of {len(planned)} runs failed", logs)


def _row(job: "Job", result: Any, failure: Any) -> dict[str, Any]:
    """A run of the JSON document."""
    from ltnorm.sweep.grid import short

    row: dict[str, Any] = {"directory": str(job.directory)}
    row["state"] = "finished" if result else "failed"
    row["cell"] = {short(key): value for key, value in job.values.items()}
    row["error"], row["hint"] = (failure.error, failure.hint) if failure else (None, None)
    return row | {"result": dataclasses.asdict(result) if result else None}
