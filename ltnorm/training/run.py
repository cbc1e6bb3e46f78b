"""One run from end to end: train, evaluate, write; and what a run has left, loaded again."""

import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ltnorm import __version__
from ltnorm.console import Output
from ltnorm.data.files import workers_watched
from ltnorm.data.prepare import prepare
from ltnorm.data.prepared import PreparedSet
from ltnorm.errors import LtnormError
from ltnorm.evaluation.evaluate import Evaluation, evaluate_split
from ltnorm.norms import norm_layers
from ltnorm.norms.layer import NewerStateError
from ltnorm.recipe import Recipe, Train
from ltnorm.reporting import schema
from ltnorm.reporting.state import under_way
from ltnorm.training import checkpoint, distributed, optim
from ltnorm.training.build import build_loader, build_model, build_objective, compile_training
from ltnorm.training.clock import CLOCK
from ltnorm.training.device import describe, resolve_device, set_computing
from ltnorm.training.log import Log, logged
from ltnorm.training.loop import Steps, fit
from ltnorm.training.position import Epoch
from ltnorm.training.resume import KEEPING, FileKeeper, Keeper, Keeping, forget
from ltnorm.training.together import alone

THEN = ", then "  # between the devices that a run was made on


@dataclass(frozen=True)
class TrainedRun:
    """A finished training: its recipe, the set that it was trained on, the model on a device."""

    recipe: Recipe
    data: PreparedSet
    model: nn.Module
    device: torch.device


@dataclass(frozen=True)
class Cost:
    """What training took; the costs of two stages add up."""

    epochs: float = 0.0
    steps: int = 0
    images_processed: int = 0
    images_backpropagated: int = 0
    train_seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Cost(*(a + b for a, b in zip(mine, theirs, strict=True)))


@dataclass(frozen=True)
class Training:
    """What training has done.

    Attributes:
        model: to evaluate.
        epochs: of the last stage.
        cost: of all stages.
        tau: of a correction, given or tuned.
        first_stage: the sha256 of the checkpoint that it started from.
        machines: that had a part in it, each a device and a version of torch, in words.
    """

    model: nn.Module
    epochs: Sequence[Epoch]
    cost: Cost
    tau: float | None = None
    first_stage: str | None = None
    machines: Sequence[tuple[str, str]] = ()


def load_run(
    path: Path,
    root: Path,
    data_dir: Path,
    device: str | None = None,
    workers: int | None = None,
) -> TrainedRun:
    """Load what a run has trained, by its checkpoint.

    Args:
        path: a run's directory, or a checkpoint.
        root, data_dir: where the raw and the prepared data lie; a set that is missing is prepared.
        device: where the model goes, by name; None is the recipe's.
        workers: processes that decode files; None is the recipe's.

    Raises:
        NothingFound: no checkpoint.
        UsageError: no such device.
        LtnormError: the checkpoint is damaged or does not fit, or the prepared set holds other
            images than those of the run.
    """
    saved = checkpoint.load(path)
    recipe = saved.parsed_recipe()
    if workers is not None:
        recipe = recipe.model_copy(update={"workers": workers})
    data = prepare(recipe.dataset, root, data_dir)
    if data.index_sha256 != saved.index_sha256:
        raise LtnormError(
            f"{data.path} does not hold the images that {path} was trained on",
            "name the prepared set of that run with --data-dir",
        )
    where = resolve_device(device or recipe.device)
    model = load_model(path, saved, recipe, data.image_size)
    return TrainedRun(recipe, data, model.to(where), where)


def load_model(
    path: Path, saved: checkpoint.Checkpoint, recipe: Recipe, image_size: int
) -> nn.Module:
    """The model of a checkpoint, on the CPU. `path` is what errors call it.

    Raises:
        LtnormError: the weights do not fit the recipe, or are of a newer version.
    """
    model = build_model(recipe, saved.counts, image_size)
    try:
        model.load_state_dict(saved.model)
    except NewerStateError as error:
        raise LtnormError(
            f"the checkpoint of {path} cannot be read: {error}",
            "evaluate it with the version of ltnorm that wrote it",
        ) from error
    except RuntimeError as error:
        raise LtnormError(
            f"the checkpoint of {path} does not fit its own recipe", "train the run again (--force)"
        ) from error
    return model


def finished_result(directory: Path, recipe: Recipe, data: PreparedSet) -> schema.Result | None:
    """The result of a run that need not be repeated: of this very recipe, on these images.

    Raises:
        LtnormError: the result is damaged.
    """
    if not schema.finished(directory):
        return None
    result = schema.read_result(directory / schema.RESULT)
    same = result.fingerprint == recipe.fingerprint() and result.index_sha256 == data.index_sha256
    return result if same else None


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


def machine(device: torch.device) -> tuple[str, str]:
    """What a run is made with: the device and the version of torch."""
    return describe(device), str(torch.__version__)


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


def cost_of(
    epochs: Sequence[Epoch], images_per_epoch: int, train: Train, passes: tuple[int, int]
) -> Cost:
    """What epochs took, each image having passed so often forward and backward in a step."""
    images = sum(epoch.images for epoch in epochs)
    forward, backward = passes
    gradients = 2 if train.optimizer == "sam" else 1  # a step
    return Cost(
        epochs=images / (images_per_epoch * train.views),
        steps=sum(epoch.steps for epoch in epochs),
        images_processed=forward * gradients * images,
        images_backpropagated=backward * gradients * images,
        train_seconds=sum(epoch.seconds for epoch in epochs),
    )


def finish(
    directory: Path, recipe: Recipe, data: PreparedSet, done: Training, device: torch.device
) -> schema.Result:
    """Evaluate what a run has trained and write all of it, the result row last."""
    split, groups = recipe.eval.split, recipe.eval.groups
    measured = evaluate_split(done.model, data, split, groups, device, recipe.workers)
    seconds = sum(epoch.seconds for epoch in done.epochs)
    images = sum(epoch.images for epoch in done.epochs)
    devices, versions = zip(*done.machines, machine(device), strict=True)
    result = schema.Result(
        schema=schema.SCHEMA,
        **_recipe_columns(recipe),
        **measured.columns(),
        **dataclasses.asdict(done.cost),
        tau=done.tau,
        first_stage=done.first_stage,
        set_id=data.set_id,
        index_sha256=data.index_sha256,
        train_loss=done.epochs[-1].loss if done.epochs else None,
        parameters=sum(p.numel() for p in done.model.parameters()),
        images_per_second=images / seconds if done.epochs else None,
        device=_in_turn(devices),
        torch=_in_turn(versions),
        ltnorm=__version__,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    with schema.replacing(directory) as aside:
        _save(aside, recipe, data, done, measured)
        schema.write_result(aside, result)
    forget(directory)
    return result


def finish_on_first(
    directory: Path, recipe: Recipe, data: PreparedSet, done: Training, device: torch.device
) -> schema.Result:
    """As `finish`, by rank 0; the others wait for it."""

    def made() -> schema.Result:
        with CLOCK.stopped(), explained(recipe, directory):
            return finish(directory, recipe, data, done, device)

    return distributed.from_first(made)


def _in_turn(names: Sequence[str]) -> str:
    """`a, then b`; a name may be of this form itself."""
    return THEN.join(dict.fromkeys(part for name in names for part in name.split(THEN)))


def _save(
    directory: Path,
    recipe: Recipe,
    data: PreparedSet,
    done: Training,
    measured: Evaluation,
) -> None:
    """Everything of a run but its result row."""
    state = done.model.state_dict()
    for name, value in state.items():  # in place: the dict has the layers' versions besides
        state[name] = value.cpu()
    saved = checkpoint.Checkpoint(
        recipe=recipe.to_yaml(),
        counts=data.counts,
        index_sha256=data.index_sha256,
        epoch=len(done.epochs),
        model=state,
        inputs=dataclasses.asdict(checkpoint.Inputs.of(data)),
    )
    checkpoint.save(directory / checkpoint.NAME, saved)
    header = [f.name for f in dataclasses.fields(Epoch)]
    schema.write_rows(directory / schema.EPOCHS, header, map(dataclasses.astuple, done.epochs))
    metrics = measured.metrics
    classes = zip(
        range(len(data.classes)),
        data.classes,
        data.counts,
        measured.groups,
        metrics.images_per_class,
        metrics.per_class,
        strict=True,
    )
    schema.write_per_class(directory, (schema.ClassRow(*row) for row in classes))
    probability = measured.logits.softmax(1).gather(1, measured.labels[:, None])[:, 0]
    arrays = io.BytesIO()
    np.savez_compressed(
        arrays,
        label=measured.labels.numpy().astype(np.int16),
        prediction=measured.logits.argmax(1).numpy().astype(np.int16),
        true_class_probability=probability.numpy().astype(np.float16),
    )
    schema.write_bytes(directory / schema.PREDICTIONS, arrays.getvalue())


def _recipe_columns(recipe: Recipe) -> dict[str, Any]:
    return {
        "fingerprint": recipe.fingerprint(),
        "dataset": recipe.dataset.title,
        "profile": recipe.dataset.profile,
        "ratio": recipe.dataset.ratio,
        "data_seed": recipe.dataset.data_seed,
        "model": recipe.model.name,
        "norm": recipe.norm.name,
        "norm_options": recipe.norm.changes(),
        "loss": recipe.loss.name,
        "loss_options": recipe.loss.changes(),
        "sampler": recipe.sampler.name,
        "retrain": recipe.retrain.method if recipe.retrain else None,
        "tag": "-".join(filter(None, [recipe.retrain and recipe.retrain.tag, recipe.tag])) or None,
        "seed": recipe.seed,
        "batch_size": recipe.train.batch_size,
        "lr": recipe.train.lr,
        "precision": recipe.train.precision,
        "eval_split": recipe.eval.split,
        "settings": schema.settings_json(recipe),
    }
