"""What a run has left, loaded again."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ltnorm.data.prepare import prepare
from ltnorm.data.prepared import PreparedSet
from ltnorm.errors import LtnormError
from ltnorm.norms.layer import NewerStateError
from ltnorm.recipe import Recipe
from ltnorm.reporting import schema
from ltnorm.training import checkpoint
from ltnorm.training.build import build_model
from ltnorm.training.device import resolve_device


@dataclass(frozen=True)
class TrainedRun:
    """A finished training: its recipe, the set that it was trained on, the model on a device."""

    recipe: Recipe
    data: PreparedSet
    model: nn.Module
    device: torch.device


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
