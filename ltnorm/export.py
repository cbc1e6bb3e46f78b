"""Final weights of a run in the formats of others: safetensors and ONNX.

Both hold the model as it was trained, with metadata, all of it text, that says how it is used:

    ltnorm             the version that wrote the file
    recipe             YAML; with it and the counts the model is built anew
    fingerprint        of the recipe
    seed               of the run
    checkpoint_sha256  of the checkpoint that the weights are from
    index_sha256       which images it was trained on
    epoch              that the weights are from
    counts             training images a class, JSON
    classes            their names in the order of the logits, JSON
    image_size, resize, mean, std    see `Inputs`; JSON
    images             what the model takes, in words
    versions           that of each layer's state, JSON (safetensors alone)
"""

import contextlib
import dataclasses
import io
import json
import logging
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ltnorm import __version__
from ltnorm.data.prepared import find
from ltnorm.errors import LtnormError, NothingFound
from ltnorm.recipe import Recipe
from ltnorm.training import checkpoint
from ltnorm.training.checkpoint import Checkpoint, Inputs
from ltnorm.training.trained import load_model
from ltnorm.training.twostage import check_finished


@dataclass(frozen=True)
class Export:
    """A finished run, to be written in another format.

    Attributes:
        path: as it was named.
        recipe, saved: of its checkpoint.
        inputs: what the model takes and gives.
        sha256: of the checkpoint.
    """

    path: Path
    recipe: Recipe
    saved: Checkpoint
    inputs: Inputs
    sha256: str

    @property
    def takes(self) -> str:
        """What the model takes, in words."""
        size = self.inputs.image_size
        return f"float32 [N, 3, {size}, {size}], RGB, (x / 255 - mean) / std of x in 0..255"

    @property
    def metadata(self) -> dict[str, Any]:
        """What is said of the model, as values; see the head of this module."""
        return {
            "ltnorm": __version__,
            "recipe": self.saved.recipe,
            "fingerprint": self.recipe.fingerprint(),
            "seed": self.recipe.seed,
            "checkpoint_sha256": self.sha256,
            "index_sha256": self.saved.index_sha256,
            "epoch": self.saved.epoch,
            "counts": self.saved.counts,
            **dataclasses.asdict(self.inputs),
            "images": self.takes,
        }

    def safetensors(self) -> bytes:
        """The state dict of the checkpoint by the same keys, as the content of a safetensors file.

        The versions of the layers' states are in the metadata, as there is no other place.
        """
        from safetensors.torch import save

        state = {key: value.contiguous().clone() for key, value in self.saved.model.items()}
        versions = {
            layer: about["version"]
            for layer, about in getattr(self.saved.model, "_metadata", {}).items()
            if "version" in about
        }
        return save(state, {"format": "pt"} | _text(self.metadata | {"versions": versions}))

    def onnx(self) -> bytes:
        """The model in evaluation mode, as the content of an ONNX file: images -> logits.

        Raises:
            LtnormError: the model cannot be exported.
        """
        size = self.inputs.image_size
        model = load_model(self.path, self.saved, self.recipe, size)
        return onnx(model, size, self.metadata)


def read(path: Path, data_dir: Path) -> Export:
    """A finished run, by its directory or checkpoint; of the data nothing is needed.

    Args:
        path: the run.
        data_dir: where prepared sets lie, for a checkpoint that does not say what it takes.

    Raises:
        NothingFound: no checkpoint.
        LtnormError: it is damaged, the run is not finished, or its images are unknown.
    """
    file = checkpoint.file_of(path)
    saved = checkpoint.load(path)
    check_finished(file.parent)
    recipe = saved.parsed_recipe()
    inputs = _inputs(path, saved, recipe, data_dir)
    return Export(path, recipe, saved, inputs, checkpoint.sha256(file))


def _inputs(path: Path, saved: Checkpoint, recipe: Recipe, data_dir: Path) -> Inputs:
    if saved.inputs is not None:
        try:
            return Inputs(**saved.inputs)
        except TypeError as error:
            raise LtnormError(
                f"the checkpoint of {path} cannot be used: it does not say what the model takes",
                "train the run again: `ltnorm train --force`",
            ) from error
    data = find(recipe.dataset, data_dir)
    if data is None or data.index_sha256 != saved.index_sha256:
        raise LtnormError(
            f"the checkpoint of {path} is from an earlier version and does not say what it takes",
            "name where its prepared set lies with --data-dir",
        )
    return Inputs.of(data)


def onnx(model: nn.Module, image_size: int, metadata: dict[str, Any]) -> bytes:
    """A model in evaluation mode as the content of an ONNX file.

    Input `images` float32 [N, 3, image_size, image_size], output `logits` [N, classes]; N is any
    number.

    Raises:
        LtnormError: the model cannot be exported.
    """
    images = torch.zeros(2, 3, image_size, image_size)  # of one image N could be taken for fixed
    try:
        with _silent():
            program = torch.onnx.export(
                model.eval(),
                (images,),
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("N")},),
            )
    except Exception as error:  # the exporter raises many kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise LtnormError(
            f"the model cannot be exported to ONNX: {reason}",
            "--format safetensors keeps its weights",
        ) from error
    made = program.model
    for part in (made.graph, *made.functions.values()):
        for node in part:  # where each was made in the source: of no use elsewhere
            node.metadata_props.clear()
    made.metadata_props.update(_text(metadata))
    return program.model_proto.SerializeToString()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing of what the exporter tells of its steps; what fails is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _text(metadata: dict[str, Any]) -> dict[str, str]:
    """Text as it is, all else as JSON."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}


def load(file: Path) -> nn.Module:
    """The model of a safetensors file that `ltnorm export` has written, in evaluation mode.

    Raises:
        NothingFound: no such file.
        LtnormError: it is damaged, or was not written by `ltnorm export`.
    """
    from safetensors import safe_open

    if not file.is_file():
        raise NothingFound(f"no file at {file}", "`ltnorm export RUN` writes one, and prints where")
    try:
        with safe_open(file, "pt") as content:
            about, names = content.metadata(), content.keys()
            state = OrderedDict((key, content.get_tensor(key)) for key in names)
        versions = json.loads(about["versions"])
        state._metadata = {layer: {"version": version} for layer, version in versions.items()}
        counts, epoch, size = (json.loads(about[k]) for k in ("counts", "epoch", "image_size"))
        saved = Checkpoint(about["recipe"], counts, about["index_sha256"], epoch, state)
    except Exception as error:  # safetensors' kinds, and those of missing metadata
        raise LtnormError(
            f"{file} is damaged, or not written by `ltnorm export` ({type(error).__name__})",
            "export the run again, with --force",
        ) from error
    return load_model(file, saved, saved.parsed_recipe(), size).eval()
