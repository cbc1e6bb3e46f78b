"""`ltnorm train`."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ltnorm.cli import dryrun, options
from ltnorm.cli import jobs as processes
from ltnorm.cli.signals import Terminated
from ltnorm.cli.start import uncollected
from ltnorm.console import Output
from ltnorm.errors import LtnormError, UsageError, did_you_mean
from ltnorm.launch import RankLost, is_first, place


class Interrupted(LtnormError):
    """The user or the system stopped the command."""

    def __init__(self, exit_code: int, done: int, planned: int, force: bool) -> None:
        again = "type the same command again: finished runs are skipped, the others go on"
        if force:
            again = (
                "with --force the same command repeats all; without it, earlier results are kept"
            )
        super().__init__(f"interrupted, {done} of {planned} runs finished", again)
        self.exit_code = exit_code


# What `--schedule` sets, by its value.
SCHEDULES = {
    "drw": "loss.schedule",
    "step": "train.schedule",
    "multistep": "train.schedule",
    "cosine": "train.schedule",
}


def command(
    context: typer.Context,
    norm: Annotated[
        list[str] | None,
        typer.Option("--norm", help="Norm, may be repeated; see `ltnorm list norms`."),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", help="Seed of init and order, may be repeated.")
    ] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="Several seeds: 0-4 or 1,3.")] = None,
    stack_seeds: Annotated[
        bool | None,
        typer.Option("--stack-seeds", help="Train the seeds together, step by step, on one GPU."),
    ] = None,
    recipe: options.Recipe = None,
    model: options.Model = None,
    pretrained: Annotated[
        Path | None,
        typer.Option("--pretrained", help="A local file of weights that the model starts from."),
    ] = None,
    loss: options.Loss = None,
    sampler: options.Sampler = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            "--schedule",
            help="drw defers the weights of classes; step and cosine are of the learning rate. "
            "May be repeated.",
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Budget in epochs.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Budget in steps.")] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="Budget in seconds of training.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Images a step.")] = None,
    optimizer: Annotated[str | None, typer.Option("--optimizer", help="sgd, adamw or sam.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")] = None,
    precision: options.Precision = None,
    device: options.Device = None,
    workers: options.Workers = None,
    set_: options.Set = None,
    eval_split: Annotated[
        str | None,
        typer.Option("--eval-split", help="test, or val: then the test set is never opened."),
    ] = None,
    tag: options.Tag = None,
    dataset: options.Dataset = None,
    ratio: options.Ratio = None,
    profile: options.Profile = None,
    n_max: options.NMax = None,
    val: options.Val = None,
    class_order: options.ClassOrder = None,
    data_seed: options.DataSeed = None,
    groups: options.Groups = None,
    name: options.Name = None,
    cache_size: options.CacheSize = None,
    root: options.Root = options.ROOT,
    data_dir: options.DataDir = options.DATA_DIR,
    out: options.Out = options.OUT,
    log: options.Log = None,
    checkpoint_steps: options.CheckpointSteps = None,
    jobs: Annotated[
        int,
        typer.Option("--jobs", min=1, help="Runs at a time, each by a process with its cores."),
    ] = 1,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    keep_first: Annotated[
        bool, typer.Option("--keep-first", help="With --force: keep a finished first stage.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train norms and seeds under the same budget.

    Without --dataset it runs on embedded synthetic data. A finished run is skipped, unless
    --force, and one that was interrupted goes on where it was. Each run ends with the evaluation
    of its last epoch.

    `ltnorm train --norm bn --norm compound --ratio 100 --seeds 0-2`
    """
    from ltnorm import resolve as recipes
    from ltnorm.reporting import schema
    from ltnorm.training.log import check as check_log

    check_log(log)
    if jobs > 1 and place():
        raise UsageError(
            "--jobs and torchrun both start processes",
            "torchrun makes one run by several processes, --jobs several runs at a time",
        )
    output = Output(quiet=quiet, json=json, log=log)
    base = recipes.read(recipe or options.default_recipe(dataset, set_ or ()))
    flags = options.recipe_flags(context.params) | _schedules(schedule or ())
    if pretrained is not None:
        from ltnorm.pretrained import pretrained_sha256

        flags["model.pretrained"] = pretrained_sha256(pretrained)
    overrides = recipes.Overrides(
        flags=flags,
        sets=set_ or (),
        norms=norm or (),
        seeds=[*(seed or []), *(options.parse_seeds(seeds) if seeds is not None else [])],
    )
    done: dict[Path, Any] = {}
    planned: list[Any] = []
    with interruptible(done, planned, force):
        planned += recipes.resolve(base, overrides)
        if planned[0].model.pretrained and pretrained is None:
            raise UsageError(
                "model.pretrained: the run starts from a file of weights",
                f"--pretrained FILE, whose sha256 is {planned[0].model.pretrained}",
            )
        if dry_run:
            runs = [(recipe, out) for recipe in planned]
            dryrun.show(runs, root, data_dir, force, output, pretrained)
            return
        schema.check_out(out)
        if jobs > 1 and planned[0].train.stack:
            raise UsageError(
                "--jobs trains seeds apart, in processes, and --stack-seeds together in one",
                "on a CPU take --jobs, on a GPU --stack-seeds",
            )
        if min(jobs, len(planned)) > 1:
            shared = processes.Shared(root, data_dir, out, pretrained, log, checkpoint_steps)
            repeat = ["--force"] * force + ["--keep-first"] * keep_first
            _by_processes(planned, shared, jobs, repeat, output, done)
            return
        with uncollected():
            import ltnorm.training.run  # noqa: F401
            from ltnorm.training.distributed import joined

        keeping = {"steps": checkpoint_steps, "anew": force, "anew_first": not keep_first}
        with joined(planned[0].device):
            made = _jobs(planned, root, data_dir, out, keeping, pretrained, output)
            run_all(made, done, output)


def _schedules(values: Sequence[str]) -> dict[str, str]:
    flags: dict[str, str] = {}
    for value in values:
        if value not in SCHEDULES:
            raise UsageError(f"unknown schedule '{value}'", did_you_mean(value, SCHEDULES))
        key, value = SCHEDULES[value], "step" if value == "multistep" else value
        if flags.setdefault(key, value) != value:
            both = f"{flags[key]} and {value}"
            raise UsageError(f"--schedule {both} contradict each other", "leave one of them out")
    return flags


@contextmanager
def interruptible(done: Mapping[Path, Any], planned: Sequence[Any], force: bool) -> Iterator[None]:
    """Ctrl-C and SIGTERM end what is inside with one error that says how far it came."""
    try:
        yield
    except (KeyboardInterrupt, Terminated, SystemError) as error:
        # (What a handler raises within Ray's compiled code comes out as the cause of another.)
        stop = error.__cause__ if isinstance(error, SystemError) else error
        if not isinstance(stop, KeyboardInterrupt | Terminated):
            raise
        code = 143 if isinstance(stop, Terminated) else 130
        raise Interrupted(code, len(done), len(planned), force) from stop


@dataclasses.dataclass(frozen=True)
class Job:
    """One run to be made: its name, and what makes it, giving its directory and result.

    `steps` is told whether to wait for another process that makes the run. Jobs that follow each
    other and have the same `stack` are made together.
    """

    name: str
    steps: Callable[[bool], Any]
    stack: str | None = None


@dataclasses.dataclass(frozen=True)
class Runner:
    """Makes the runs of one command: what they share."""

    data: Any
    root: Path
    data_dir: Path
    out: Path
    keeping: Any
    output: Output
    pretrained: Path | None = None

    def steps(self, recipe: Any, wait: bool) -> Any:
        """One run, unless it is finished, and before a second stage the first."""
        from ltnorm.reporting import schema
        from ltnorm.training import distributed, twostage
        from ltnorm.training import run as running

        def found() -> tuple[Path, Path | None, Any | None]:
            directory, first, result = schema.run_directory(recipe, self.out), None, None
            if recipe.retrain:
                first = schema.run_directory(twostage.first_stage(recipe), self.out)
            if not self.keeping.anew:
                result = finished(directory, recipe, self.data, self.output, first)
            return directory, first, result

        directory, first, result = distributed.from_first(found)
        if result:
            return directory, result
        how = {"keeping": self.keeping, "wait": wait}
        if not first:
            shared = (self.data, self.out, self.output, self.pretrained)
            return directory, (yield from running.steps(recipe, *shared, **how))
        keeping = dataclasses.replace(
            self.keeping, anew=self.keeping.anew and self.keeping.anew_first
        )
        first_stage = dataclasses.replace(self, keeping=keeping)
        yield from first_stage.steps(twostage.first_stage(recipe), wait)
        with distributed.watched():
            start = twostage.load_first(first, self.root, self.data_dir, recipe.device)
        made = yield from twostage.steps(recipe, start, self.out, self.output, **how)
        return directory, made


def _by_processes(
    planned: Sequence[Any],
    shared: processes.Shared,
    jobs: int,
    repeat: Sequence[str],
    output: Output,
    done: dict[Any, Any],
) -> None:
    """Make runs as `run_all` does, several at a time."""
    made, work = processes.train(planned, shared, jobs, repeat, output, done)
    results = {job.directory: work.finished[job] for job in made if job in work.finished}
    failures = [LtnormError(failure.error, failure.hint) for failure in work.failed]
    _report(results, failures, len(made), output)


def _jobs(
    planned: Sequence[Any],
    root: Path,
    data_dir: Path,
    out: Path,
    keeping: Mapping[str, Any],
    pretrained: Path | None,
    output: Output,
) -> list[Job]:
    """What is to be run, checked as far as it can be before it starts."""
    from ltnorm.data.making import Making
    from ltnorm.data.prepare import prepare
    from ltnorm.training import build, distributed, twostage
    from ltnorm.training.device import resolve_device
    from ltnorm.training.resume import Keeping
    from ltnorm.training.run import label

    resolved = [build.concrete(recipe) for recipe in planned]
    first, reason = resolved[0]
    output.note(f"precision {first.train.precision}: {reason}")
    for warning in build.doubts(first.train):
        output.warn(warning)
    if first.train.stack and not first.train.graph:
        cpu = resolve_device(first.device).type == "cpu"
        faster = "see --jobs" if cpu else "see --set train.graph=true"
        output.note(f"together, seeds make their steps in turn: {faster}")
    making = Making(workers=first.workers or None, tell=output.note, counting=output.counting)
    data = distributed.by_all(lambda: prepare(first.dataset, root, data_dir, making))
    distributed.check_same(data.index_sha256, f"the images of {data.path}")
    recipes = [recipe.model_copy(update={"dataset": data.spec}) for recipe, _ in resolved]
    for recipe in recipes:
        build.check(recipe, data.counts, data.splits, files=not data.decoded)
    for recipe in {recipe.norm.name: recipe for recipe in recipes}.values():
        build.build_model(recipe, data.counts, data.image_size, pretrained)
        twostage.check(recipe)
    runner = Runner(data, root, data_dir, out, Keeping(**keeping), output, pretrained)
    return [
        Job(
            label(recipe),
            partial(runner.steps, recipe),
            recipe.fingerprint() if recipe.train.stack else None,
        )
        for recipe in recipes
    ]


def finished(
    directory: Path, recipe: Any, data: Any, output: Output, first: Path | None = None
) -> Any | None:
    """The result of a run that need not be repeated; says so, or why it is.

    `first` is where the first stage of a second one lies, or its checkpoint.
    """
    from ltnorm.reporting import schema
    from ltnorm.training.trained import finished_result
    from ltnorm.training.twostage import is_stale

    result = finished_result(directory, recipe, data)
    if result and first and is_stale(result, first):
        output.warn(f"{directory} is of another first stage than {first}: repeating it")
        return None
    if result:
        output.note(f"{directory} is finished; --force repeats it")
    elif schema.finished(directory):
        output.warn(f"{directory} holds the result of other images or settings: repeating it")
    return result


def run_all(jobs: Sequence[Job], done: dict[Path, Any], output: Output) -> None:
    """Make runs, go on after a failed one, and print all that is finished.

    Those that other processes are making come last, to wait for them.
    """
    from ltnorm.reporting.state import Busy

    failures: list[LtnormError] = []
    busy: list[Job] = []

    def ended(job: Job, outcome: Any) -> None:
        if isinstance(outcome, RankLost):
            _show(done, output)
            raise outcome
        if isinstance(outcome, Busy):
            busy.append(job)
            output.note(f"{outcome.message}: waiting for it after the others")
        elif isinstance(outcome, LtnormError):
            failures.append(outcome)
            output.warn(f"{job.name} failed: {outcome.message}")
        else:
            directory, result = outcome
            done[directory] = result

    _make(jobs, False, ended)
    _make(list(busy), True, ended)
    _report(done, failures, len(jobs), output)


def _report(
    done: Mapping[Path, Any], failures: Sequence[LtnormError], planned: int, output: Output
) -> None:
    """Print all that is finished, and raise what was wrong with the others."""
    _show(done, output)
    if failures:
        more = f" ({len(failures)} of {planned} runs failed)" if planned > 1 else ""
        raise LtnormError(failures[0].message + more, failures[0].hint)


def _make(jobs: Sequence[Job], wait: bool, ended: Callable[[Job, Any], None]) -> None:
    """Make jobs; each is told to `ended` with its directory and result, or the error why not."""
    from ltnorm.training.together import alone, together

    # Who waits for a run waits for it alone.
    for stack, group in itertools.groupby(jobs, lambda job: None if wait else job.stack):
        made = list(group)
        if stack is not None:
            together([job.steps(wait) for job in made], [partial(ended, job) for job in made])
            continue
        for job in made:
            try:
                outcome = alone(job.steps(wait))
            except LtnormError as error:
                outcome = error
            ended(job, outcome)


def _show(done: Mapping[Path, Any], output: Output) -> None:
    from ltnorm.reporting.compare import compare
    from ltnorm.reporting.export import table
    from ltnorm.reporting.schema import Run
    from ltnorm.reporting.sheets import of_blocks

    if done and is_first() and not output.json:
        blocks = compare([Run(result, directory) for directory, result in done.items()])
        output.product(table(of_blocks(blocks), output.out.width))
        for directory in done:
            output.product(str(directory))
    rows = [{"directory": str(d)} | dataclasses.asdict(result) for d, result in done.items()]
    output.document({"runs": rows})
