"""The end of a run: what training has done is evaluated and written, the result row last."""

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ltnorm import __version__
from ltnorm.data.prepared import PreparedSet
from ltnorm.evaluation.evaluate import Evaluation, evaluate_split
from ltnorm.recipe import Recipe, Train
from ltnorm.reporting import schema
from ltnorm.training import checkpoint
from ltnorm.training.device import describe
from ltnorm.training.position import Epoch
from ltnorm.training.resume import forget

THEN = ", then "  # between the devices that a run was made on


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


def machine(device: torch.device) -> tuple[str, str]:
    """What a run is made with: the device and the version of torch."""
    return describe(device), str(torch.__version__)


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
