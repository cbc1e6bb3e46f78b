"""One run from end to end: train, evaluate, write."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ltnorm.console import Output
from ltnorm.data.files import workers_watched
from ltnorm.data.prepared import PreparedSet
from ltnorm.errors import LtnormError
from ltnorm.evaluation.evaluate import evaluate_split
from ltnorm.norms import norm_layers
from ltnorm.recipe import Recipe, Train
from ltnorm.reporting import schema
from ltnorm.reporting.state import under_way
from ltnorm.training import distributed, optim
from ltnorm.training.build import build_loader, build_model, build_objective, compile_training
from ltnorm.training.clock import CLOCK
from ltnorm.training.device import resolve_device, set_computing
from ltnorm.training.finish import Training, cost_of, finish, machine
from ltnorm.training.log import Log, logged
from ltnorm.training.loop import Steps, fit
from ltnorm.training.resume import KEEPING, FileKeeper, Keeper, Keeping
from ltnorm.training.together import alone
from ltnorm.training.trained import finished_result


def run(
    recipe: Recipe,
    data: PreparedSet,
    out: Path,
    output: Output,
    pretrained: Path | None = None,
    *,
    keeping: Keeping = KEEPING,
    wait: bool = False,
) -> schema.Result:
    """Train and evaluate one recipe, `concrete` and checked, and write its directory under `out`.

    A training that was interrupted goes on where it was. A second stage is not taken: see
    `training.twostage`.

    Args:
        recipe, data: what is run.
        out, output: where results are written, and what is told meanwhile.
        pretrained: the file of weights to start from.
        keeping: how the state of the training is kept.
        wait: for another process that makes the run, and has its result then.

    Raises:
        Busy: another process is making the run.
        LtnormError: the run failed: the loss diverged, or its files could not be written.
    """
    return alone(steps(recipe, data, out, output, pretrained, keeping=keeping, wait=wait))


def steps(
    recipe: Recipe,
    data: PreparedSet,
    out: Path,
    output: Output,
    pretrained: Path | None = None,
    *,
    keeping: Keeping = KEEPING,
    wait: bool = False,
) -> Steps[schema.Result]:
    """As `run`, for the steps of its training to be made elsewhere (see `training.together`)."""
    with first_making(recipe, out, output, wait) as (directory, output):
        if made := made_since(directory, recipe, data, keeping):
            return made
        device = resolve_device(recipe.device)
        set_computing(recipe.train, device)
        keeper = keeper_of(directory, recipe, data, device, keeping, output)
        with logged(directory, output) as log:
            done = yield from _train(recipe, data, device, output, pretrained, keeper, log)
            result = finish_on_first(directory, recipe, data, done, device)
            log.result(result, len(done.epochs))
        return result


@contextmanager
def first_making(
    recipe: Recipe, out: Path, output: Output, wait: bool
) -> Iterator[tuple[Path, Output]]:
    """As `making`, which is rank 0's alone; the others get `out`, and are silent."""
    made = making(recipe, out, output, wait)
    with (
        distributed.by_first(made) as entered,
        distributed.watched(),
        explained(recipe, out),
    ):
        yield entered or (out, dataclasses.replace(output, log=None))


def made_since(
    directory: Path,
    recipe: Recipe,
    data: PreparedSet,
    keeping: Keeping,
    first_stage: str | None = None,
) -> schema.Result | None:
    """The result that another process has made while this one waited to make it."""

    def found() -> schema.Result | None:
        result = None if keeping.anew else finished_result(directory, recipe, data)
        return result if result and result.first_stage == first_stage else None

    return distributed.from_first(found)


@contextmanager
def making(
    recipe: Recipe, out: Path, output: Output, wait: bool = False
) -> Iterator[tuple[Path, Output]]:
    """A run while it is made: no other process makes it, and its directory tells how far it is.

    Gives the directory, with the recipe in it, and an output that training tells its progress.

    Raises:
        Busy: another process makes the run, unless this is to `wait` for its end.
        LtnormError: it failed; see `explained`.
    """
    with explained(recipe, out):
        directory = schema.run_directory(recipe, out)
        directory.mkdir(parents=True, exist_ok=True)
    with under_way(directory, wait) as status, explained(recipe, out):
        schema.remove_unwritten(directory)
        schema.write_text(directory / schema.RECIPE, recipe.to_yaml())
        yield directory, dataclasses.replace(output, tell=status.tell)


def keeper_of(
    directory: Path,
    recipe: Recipe,
    data: PreparedSet,
    device: torch.device,
    keeping: Keeping,
    output: Output,
    first_stage: str | None = None,
) -> FileKeeper:
    """What keeps the state of a run's training."""
    run = {
        "recipe": recipe.fingerprint(),
        "seed": recipe.seed,
        "images": data.index_sha256,
        "first stage": first_stage,
    }
    return FileKeeper(directory, run, machine(device), keeping, output)


@contextmanager
def explained(recipe: Recipe, out: Path) -> Iterator[None]:
    """What a run meets in the world as an expected failure."""
    try:
        with workers_watched():
            yield
    except OSError as error:
        raise LtnormError(
            f"cannot read or write {error.filename or out}: {error.strerror or error}",
            "finished runs are kept; free what is in the way, or choose another --out",
        ) from error
    except torch.OutOfMemoryError as error:
        raise LtnormError(
            f"out of memory on {recipe.device}", "try a smaller --batch-size or --model"
        ) from error
    except RuntimeError as error:
        if not (recipe.train.compile and _is_of_the_compiler(error)):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise LtnormError(
            f"torch.compile failed: {reason}",
            "leave out train.compile; it needs a C++ compiler on the CPU, Triton on a GPU",
        ) from error


def _is_of_the_compiler(error: RuntimeError) -> bool:
    parts = ("torch._dynamo.", "torch._inductor.", "torch._functorch.")
    return type(error).__module__.startswith(parts)


def _train(
    recipe: Recipe,
    data: PreparedSet,
    device: torch.device,
    output: Output,
    pretrained: Path | None,
    keeper: Keeper,
    log: Log,
) -> Steps[Training]:
    train = recipe.train
    loader = build_loader(recipe, data, data.open("train"), device)
    model = build_model(recipe, data.counts, data.image_size, pretrained, output.note)
    objective = build_objective(recipe, model, data.counts)
    objective.to(device=device, memory_format=loader.memory_format)
    average = optim.Average(model, train.ema) if train.ema else None
    if train.compile:
        compile_training(model, train.images_per_step)
    measured = average.model if average else model
    with output.training(label(recipe), expected_epochs(train, len(loader))) as progress:
        epochs = yield from fit(
            objective,
            loader,
            train,
            progress,
            undecayed=norm_parameters(model, recipe.norm.name),
            average=average,
            measure=measuring(recipe, measured, data, device),
            keeper=keeper,
            on_epoch=log.epoch,
        )
    cost = cost_of(epochs, loader.images_per_epoch, train, objective.cost)
    return Training(measured, epochs, cost, machines=keeper.machines)


def measuring(
    recipe: Recipe, model: nn.Module, data: PreparedSet, device: torch.device
) -> Callable[[int], float | None]:
    """What measures a model after an epoch, where the recipe wants it."""

    def measure(epoch: int) -> float | None:
        if not recipe.eval.every or epoch % recipe.eval.every:
            return None
        split, groups = recipe.eval.split, recipe.eval.groups
        found = evaluate_split(model, data, split, groups, device, recipe.workers)
        return found.metrics.accuracy

    return measure


def label(recipe: Recipe) -> str:
    """A run in a few words, for its progress."""
    stage = f" {recipe.retrain.method}" if recipe.retrain else ""
    return f"{recipe.norm.name}{stage} seed {recipe.seed}"


def norm_parameters(model: nn.Module, norm: str) -> list[nn.Parameter]:
    """The parameters of a model's norm layers."""
    return [p for layer in norm_layers(model, norm).values() for p in layer.parameters()]


def expected_epochs(train: Train, batches: int) -> int | None:
    """How many epochs there will be; None if only the clock knows."""
    if train.steps:
        return math.ceil(train.steps / batches)
    return train.epochs


def finish_on_first(
    directory: Path, recipe: Recipe, data: PreparedSet, done: Training, device: torch.device
) -> schema.Result:
    """As `finish`, by rank 0; the others wait for it."""

    def made() -> schema.Result:
        with CLOCK.stopped(), explained(recipe, directory):
            return finish(directory, recipe, data, done, device)

    return distributed.from_first(made)
