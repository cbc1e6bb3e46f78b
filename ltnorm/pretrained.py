"""Weights from a local file, for a model that was trained elsewhere."""

import argparse
import hashlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ltnorm import pickled
from ltnorm.errors import UsageError


def load_pretrained(model: nn.Module, path: Path) -> list[str]:
    """Load weights from a file into a model whose batch normalization is not replaced yet.

    Args:
        model: changed in place, unless the weights do not fit.
        path: weights by name in a file of torch's or in a .safetensors, by themselves or, in this
            order, under "state_dict_ema", "state_dict" or "model", as in ltnorm's checkpoints.

    Returns:
        The names of the classifier's weights that are left as they were, the file having none, or
        for another number of classes.

    Raises:
        UsageError: no such file, it cannot be read, or it does not fit the model.
    """
    from ltnorm.models import heads

    own, saved = model.state_dict(), _read_weights(path)
    # A layer with an activation is two after it was converted (see convert_norm).
    short = {name: re.sub(r"\.norm(\.\w+)$", r"\1", name) for name in saved}
    saved = {name if name in own else short[name]: value for name, value in saved.items()}

    layers = heads(model)
    inside = tuple(f"{name}." for name, module in model.named_modules() if module in layers)
    head = [name for name, _ in model.named_parameters() if name.startswith(inside)]
    left_out = [name for name in head if _rows(own, name) != _rows(saved, name)]
    saved |= {name: own[name] for name in left_out}
    if problems := _misfits(own, saved):
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        stems = [
            state["conv1.weight"].shape[2:] for state in (saved, own) if "conv1.weight" in state
        ]
        raise UsageError(
            f"the weights in {path} do not fit: {', '.join(problems[:3])}{more}",
            "`--set model.stem=imagenet` keeps the first convolution as it was trained"
            if stems == [(7, 7), (3, 3)]
            else "they must be those of this very model, with batch normalization",
        )
    model.load_state_dict(saved, strict=False)  # num_batches_tracked may be missing
    return left_out


def _rows(state: Mapping[str, Tensor], name: str) -> int | None:
    return state[name].shape[0] if name in state else None


def _misfits(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with saved weights, each as a few words."""
    missing = [f"{k} is missing" for k in own if k not in saved and "num_batches" not in k]
    unknown = [f"{k} is unknown" for k in saved if k not in own]
    shapes = [
        f"{k} is {list(saved[k].shape)} instead of {list(value.shape)}"
        for k, value in own.items()
        if k in saved and saved[k].shape != value.shape
    ]
    return [*shapes, *missing, *unknown]


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, without what DataParallel and torch.compile put before it."""
    _check_file(path)
    safetensors = path.suffix == ".safetensors"
    if safetensors and importlib.util.find_spec("safetensors") is None:
        raise UsageError(f"reading {path} needs safetensors", 'pip install "ltnorm[export]"')
    try:
        if safetensors:
            content = _read_safetensors(path)
        else:
            content = pickled.read(path, allowed=[argparse.Namespace])  # timm's, of its flags
    except pickled.Refused as refused:
        trust = "nothing was run; of a model that you trust, " if refused.code else ""
        raise UsageError(
            f"{path} is no file of weights: it {refused}",
            f"{trust}save the weights alone, by torch.save(model.state_dict(), FILE)",
        ) from refused
    content = content if isinstance(content, dict) else {}
    nested = (content.get(key) for key in ("state_dict_ema", "state_dict", "model"))
    content = next((state for state in nested if isinstance(state, dict)), content)
    state = {
        re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): value
        for name, value in content.items()
        if isinstance(value, Tensor)
    }
    if not state:
        raise UsageError(
            f"{path} holds no weights by name",
            "save them by torch.save(model.state_dict(), FILE)",
        )
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # its own kinds, and the system's
        raise pickled.Refused(f"is damaged ({type(error).__name__})", None) from error


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UsageError(
            f"no file of weights at {path}",
            "download it first: a state dict of torch's (.pth, .pt), or a .safetensors",
        )


def pretrained_sha256(path: Path) -> str:
    """The SHA-256 of a file of weights, in hex: what a recipe has in place of the path.

    Raises:
        UsageError: no such file, or it cannot be read.
    """
    _check_file(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror or error}", "check its permissions"
        ) from error
