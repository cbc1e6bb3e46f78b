"""One run from end to end: train, evaluate, write."""

import dataclasses
import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ltnorm import __version__, losses, models, registry
from ltnorm.console import Output
from ltnorm.data import class_groups
from ltnorm.data.loader import Loader
from ltnorm.data.prepare import PreparedSet, prepare
from ltnorm.errors import LtnormError, UsageError
from ltnorm.evaluation.evaluate import Evaluation, evaluate_split
from ltnorm.norms import RoutedNorm, norm_layer
from ltnorm.norms.layer import NewerStateError
from ltnorm.recipe import Recipe
from ltnorm.reporting import schema
from ltnorm.training import checkpoint
from ltnorm.training.device import describe, memory_format, resolve_device, resolve_precision
from ltnorm.training.loop import Epoch, fit
from ltnorm.training.objective import SinglePath


def concrete(recipe: Recipe) -> tuple[Recipe, str]:
    """The recipe with `auto` precision resolved for this machine, and why it was chosen so."""
    precision, reason = resolve_precision(recipe.train.precision, resolve_device(recipe.device))
    train = recipe.train.model_copy(update={"precision": precision})
    return recipe.model_copy(update={"train": train}), reason


def build_model(recipe: Recipe, num_classes: int, image_size: int) -> nn.Module:
    """The recipe's model, initialised from its seed: the same weights whatever the norm."""
    torch.manual_seed(recipe.seed)
    return models.build(
        recipe.model.name,
        num_classes,
        norm_layer(recipe.norm.name, **recipe.norm.options),
        image_size=image_size,
        **recipe.model.options,
    )


def build_objective(recipe: Recipe, model: nn.Module, counts: list[int]) -> SinglePath:
    """The training objective that the recipe's norm asks for."""
    target = registry.lookup("norm", recipe.norm.name).objective
    layer = next((m for m in model.modules() if isinstance(m, RoutedNorm)), None)
    groups = class_groups(counts, layer.components, layer.groups) if layer else [0] * len(counts)
    return registry.load(target)(
        model,
        losses.build(recipe.loss.name, counts, **recipe.loss.options),
        torch.tensor(groups),
        **registry.own_options(target, recipe.norm.options),
    )


def check(recipe: Recipe, data: PreparedSet) -> None:
    """What can only be checked once the data is known.

    Raises:
        UsageError: a batch larger than the set, more components than classes, no such split.
    """
    images = sum(data.counts)
    if recipe.train.batch_size > images:
        raise UsageError(
            f"batch size {recipe.train.batch_size} is larger than the set of {images} images",
            f"--batch-size can be at most {images} here",
        )
    if {"components", "groups"} <= recipe.norm.options.keys():
        class_groups(data.counts, recipe.norm.options["components"])
    if recipe.eval.split not in data.splits:
        raise UsageError(
            f"{data.set_id} has no {recipe.eval.split} split", "--val N holds out images"
        )


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A finished training: its recipe, the set that it was trained on, the model on a device."""

    recipe: Recipe
    data: PreparedSet
    model: nn.Module
    device: torch.device


def load_run(path: Path, root: Path, data_dir: Path, device: str | None = None) -> TrainedRun:
    """Load what a run has trained, by its checkpoint.

    Args:
        path: a run's directory, or a checkpoint.
        root, data_dir: where the raw and the prepared data lie; a set that is missing is prepared.
        device: where the model goes, by name; None is the recipe's.

    Raises:
        NothingFound: no checkpoint.
        UsageError: no such device.
        LtnormError: the checkpoint is damaged or does not fit, or the prepared set holds other
            images than those of the run.
    """
    saved = checkpoint.load(path)
    recipe = saved.parsed_recipe()
    data = prepare(recipe.dataset, root, data_dir)
    if data.index_sha256 != saved.index_sha256:
        raise LtnormError(
            f"{data.path} does not hold the images that {path} was trained on",
            "name the prepared set of that run with --data-dir",
        )
    where = resolve_device(device or recipe.device)
    model = build_model(recipe, len(data.classes), data.image_size)
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
    return TrainedRun(recipe, data, model.to(where), where)


def run(recipe: Recipe, data: PreparedSet, out: Path, output: Output) -> schema.Result:
    """Train and evaluate one recipe, `concrete` and checked, and write its directory under `out`.

    Raises:
        LtnormError: the run failed: the loss diverged, or its files could not be written.
    """
    try:
        return _run(recipe, data, out, output)
    except OSError as error:
        raise LtnormError(
            f"cannot read or write {error.filename or out}: {error.strerror or error}",
            "finished runs are kept; free what is in the way, or choose another --out",
        ) from error
    except torch.OutOfMemoryError as error:
        raise LtnormError(
            f"out of memory on {recipe.device}", "try a smaller --batch-size or --model"
        ) from error


def _run(recipe: Recipe, data: PreparedSet, out: Path, output: Output) -> schema.Result:
    directory = schema.run_directory(recipe, out)
    directory.mkdir(parents=True, exist_ok=True)
    schema.write_text(directory / schema.RECIPE, recipe.to_yaml())

    device = resolve_device(recipe.device)
    loader = build_loader(recipe, data, *data.load("train"), device)
    model = build_model(recipe, len(data.classes), data.image_size)
    objective = build_objective(recipe, model, data.counts)
    objective.to(device=device, memory_format=loader.memory_format)

    def measure(epoch: int) -> float | None:
        if not recipe.eval.every or epoch % recipe.eval.every:
            return None
        split, groups = recipe.eval.split, recipe.eval.groups
        return evaluate_split(model, data, split, groups, device).metrics.accuracy

    label = f"{recipe.norm.name} seed {recipe.seed}"
    with output.training(label, recipe.train.epochs, len(loader)) as progress:
        epochs = fit(objective, loader, recipe.train, progress, measure)
    seconds = sum(epoch.seconds for epoch in epochs)

    measured = evaluate_split(model, data, recipe.eval.split, recipe.eval.groups, device)
    _save(directory, recipe, data, model, epochs, measured)
    images = loader.images_per_epoch * len(epochs)
    forward, backward = objective.cost
    result = schema.Result(
        schema=schema.SCHEMA,
        **_recipe_columns(recipe),
        **measured.columns(),
        set_id=data.set_id,
        index_sha256=data.index_sha256,
        train_loss=epochs[-1].loss,
        parameters=sum(p.numel() for p in model.parameters()),
        images_processed=forward * images,
        images_backpropagated=backward * images,
        train_seconds=seconds,
        images_per_second=images / seconds,
        device=describe(device),
        torch=torch.__version__,
        ltnorm=__version__,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    schema.write_result(directory, result)
    return result


def build_loader(
    recipe: Recipe,
    data: PreparedSet,
    images: np.ndarray,
    labels: np.ndarray,
    device: torch.device,
) -> Loader:
    """Batches of training images of a prepared set, as the recipe has them."""
    return Loader(
        images,
        labels,
        mean=data.manifest["mean"],
        std=data.manifest["std"],
        train=recipe.train,
        seed=recipe.seed,
        device=device,
        memory_format=memory_format(device, recipe.train.precision),
    )


def _save(
    directory: Path,
    recipe: Recipe,
    data: PreparedSet,
    model: nn.Module,
    epochs: list[Epoch],
    measured: Evaluation,
) -> None:
    """Everything of a run but its result row; an earlier row is void from here on."""
    (directory / schema.RESULT).unlink(missing_ok=True)
    state = model.state_dict()
    for name, value in state.items():  # in place: the dict has the layers' versions besides
        state[name] = value.cpu()
    saved = checkpoint.Checkpoint(
        recipe=recipe.to_yaml(),
        counts=data.counts,
        index_sha256=data.index_sha256,
        epoch=len(epochs),
        model=state,
    )
    checkpoint.save(directory / checkpoint.NAME, saved)
    header = [f.name for f in dataclasses.fields(Epoch)]
    schema.write_rows(directory / "epochs.csv", header, map(dataclasses.astuple, epochs))
    metrics = measured.metrics
    schema.write_rows(
        directory / "per_class.csv",
        ("class", "name", "train_images", "group", "eval_images", "accuracy"),
        zip(
            range(len(data.classes)),
            data.classes,
            data.counts,
            measured.groups,
            metrics.images_per_class,
            metrics.per_class,
            strict=True,
        ),
    )
    probability = measured.logits.softmax(1).gather(1, measured.labels[:, None])[:, 0]
    arrays = io.BytesIO()
    np.savez_compressed(
        arrays,
        label=measured.labels.numpy().astype(np.int16),
        prediction=measured.logits.argmax(1).numpy().astype(np.int16),
        true_class_probability=probability.numpy().astype(np.float16),
    )
    schema.write_bytes(directory / "predictions.npz", arrays.getvalue())


def changed_options(recipe: Recipe) -> str:
    """The options of the norm that are not its defaults: `components=3, dual_path=false`."""
    defaults = registry.options_model("norm", recipe.norm.name)().model_dump()
    changed = {k: v for k, v in recipe.norm.options.items() if v != defaults[k]}
    return ", ".join(
        f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in changed.items()
    )


def _recipe_columns(recipe: Recipe) -> dict[str, Any]:
    return {
        "fingerprint": recipe.fingerprint(),
        "dataset": recipe.dataset.name,
        "profile": recipe.dataset.profile,
        "ratio": recipe.dataset.ratio,
        "data_seed": recipe.dataset.data_seed,
        "model": recipe.model.name,
        "norm": recipe.norm.name,
        "norm_options": changed_options(recipe),
        "loss": recipe.loss.name,
        "tag": recipe.tag,
        "seed": recipe.seed,
        "epochs": recipe.train.epochs,
        "batch_size": recipe.train.batch_size,
        "lr": recipe.train.lr,
        "precision": recipe.train.precision,
        "eval_split": recipe.eval.split,
        "settings": schema.settings_json(recipe),
    }
