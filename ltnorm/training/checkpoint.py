"""Checkpoints: what is needed to evaluate a trained model, and nothing that can run code."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ltnorm.errors import LtnormError, NothingFound
from ltnorm.recipe import Recipe, validate

FORMAT = 1
NAME = "checkpoint.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with its recipe and the class counts that it was trained with."""

    recipe: str  # YAML
    counts: list[int]
    index_sha256: str
    epoch: int
    model: dict[str, torch.Tensor]
    format: int = FORMAT

    def parsed_recipe(self) -> Recipe:
        """The recipe of the run."""
        return validate(yaml.safe_load(self.recipe))


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(asdict(checkpoint), temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint: a file, or a run's directory.

    Raises:
        NothingFound: there is none.
        LtnormError: it is truncated, damaged, holds more than tensors and plain values, or is
            of another format.
    """
    if path.is_dir():
        path = path / NAME
    if not path.is_file():
        raise NothingFound(
            f"no checkpoint at {path}", "name a run's directory, as `ltnorm train` prints it"
        )
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LtnormError(
            f"{path} is damaged or not a checkpoint: {first[:120]}",
            "train the run again: `ltnorm train --force` with the same flags",
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise LtnormError(
            f"{path} is not a checkpoint of format {FORMAT} (found: {found})",
            "evaluate it with the version of ltnorm that wrote it",
        )
    try:
        return Checkpoint(**content)
    except TypeError as error:
        raise LtnormError(
            f"{path} lacks parts of a checkpoint", "train the run again with --force"
        ) from error
