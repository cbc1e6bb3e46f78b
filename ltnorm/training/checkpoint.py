"""Checkpoints: what is needed to evaluate a trained model, and nothing that can run code."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ltnorm import pickled
from ltnorm.data.prepared import PreparedSet
from ltnorm.errors import LtnormError, NothingFound
from ltnorm.recipe import Recipe
from ltnorm.reporting.schema import RESULT, write_bytes
from ltnorm.validation import validate

FORMAT = 1
NAME = "checkpoint.pt"


@dataclass(frozen=True)
class Inputs:
    """What a model takes and gives, so that it can be used without its data.

    Attributes:
        image_size: height and width of the images, in pixels.
        resize: the shorter side that an image is resized to before the centre crop.
        mean, std: of the channels, in 0 .. 1: the model takes (x / 255 - mean) / std.
        classes: their names, in the order of the logits.
    """

    image_size: int
    resize: int
    mean: list[float]
    std: list[float]
    classes: list[str]

    @classmethod
    def of(cls, data: PreparedSet) -> "Inputs":
        """Those of a prepared set."""
        resize = data.image_size if data.decoded else data.manifest["resize"]
        return cls(data.image_size, resize, list(data.mean), list(data.std), list(data.classes))


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with its recipe and the class counts that it was trained with.

    `model` is what `state_dict` gives, whose metadata has the version of each layer's state.
    `inputs` has the fields of `Inputs`; None in a checkpoint from before there were any.
    """

    recipe: str  # YAML
    counts: list[int]
    index_sha256: str
    epoch: int
    model: dict[str, torch.Tensor]
    inputs: dict[str, Any] | None = None
    format: int = FORMAT

    def parsed_recipe(self) -> Recipe:
        """The recipe of the run.

        Raises:
            LtnormError: it is not a recipe of this version.
        """
        try:
            content = yaml.safe_load(self.recipe)
        except (yaml.YAMLError, AttributeError) as error:
            raise _foreign("its recipe is not readable") from error
        if not isinstance(content, dict):
            raise _foreign("its recipe is not readable")
        return validate(content)


def _foreign(why: str) -> LtnormError:
    return LtnormError(
        f"the checkpoint cannot be used: {why}", "train the run again: `ltnorm train --force`"
    )


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint whole or not at all.

    Raises:
        OSError: it cannot be written (torch's own writer would say so in other ways).
    """
    content = io.BytesIO()
    torch.save(vars(checkpoint), content)
    write_bytes(path, content.getbuffer())


def file_of(path: Path) -> Path:
    """The file of a checkpoint that is named by itself or by its run's directory."""
    return path / NAME if path.is_dir() else path


def sha256(file: Path) -> str:
    """The hash of a checkpoint, in hex."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def load(path: Path) -> Checkpoint:
    """Read a checkpoint: a file, or a run's directory.

    Raises:
        NothingFound: there is none.
        LtnormError: it is truncated, damaged, holds more than tensors and plain values, or is
            of another format.
    """
    path = file_of(path)
    if not path.is_file():
        hint = "name a run's directory, as `ltnorm train` prints it"
        below = sorted(path.parent.glob(f"**/{NAME}")) if path.name == NAME else []
        if below:
            hint = f"name a run's directory, as {below[0].parent}"
        if (path.parent / RESULT).is_file():
            hint = "this run is kept without its checkpoint; `ltnorm train --force` makes it anew"
        raise NothingFound(f"no checkpoint at {path}", hint)
    try:
        content: Any = pickled.read(path)
    except pickled.Refused as refused:
        hint = f"name a run's directory or its {NAME}; if that is damaged, `ltnorm train --force`"
        if refused.code:
            hint = "nothing was run; ltnorm wrote no such file, so do not trust where it is from"
        raise LtnormError(f"{path} is not a checkpoint: it {refused}", hint) from refused
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise LtnormError(
            f"{path} is not a checkpoint of format {FORMAT} (found: {found})",
            "evaluate it with the version of ltnorm that wrote it",
        )
    kinds = {"recipe": str, "counts": list, "index_sha256": str, "epoch": int, "model": dict}
    if any(not isinstance(content.get(name), kind) for name, kind in kinds.items()):
        raise _foreign("it lacks parts")
    return Checkpoint(**{name: content[name] for name in kinds}, inputs=content.get("inputs"))
