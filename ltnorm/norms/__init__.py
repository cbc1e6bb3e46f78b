"""Normalization layers. The constructor takes channels first, everywhere.

`norm_layer("compound", components=3)` gives the `Callable[[int], nn.Module]` that a model's
`norm` (or torchvision's `norm_layer`) argument takes; `route(model, groups)` tells the layers
that need it the class group of each image while training; `convert_norm(model, "compound")`
replaces the batch normalization of a model that exists already; `fold(model)` is a copy for
inference without norms, where they are affine maps in evaluation; `recalibrate(model, batches)`
computes running statistics anew.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from pydantic import ValidationError
from torch import nn

from ltnorm import registry
from ltnorm.norms.convert import convert_norm
from ltnorm.norms.fold import fold
from ltnorm.norms.recalibrate import recalibrate
from ltnorm.norms.routing import RoutedNorm, route

__all__ = [
    "RoutedNorm",
    "convert_norm",
    "fold",
    "norm_layer",
    "norm_layers",
    "recalibrate",
    "route",
]


def norm_layer(name: str, **options: Any) -> Callable[[int], nn.Module]:
    """A function from channels to a new layer of the norm `name` (see `ltnorm list norms`).

    Raises:
        UsageError: no such norm.
        ValueError: an option that the norm does not have, or a bad value for one.
    """
    entry = registry.lookup("norm", name)
    try:
        values = registry.options_model("norm", name)(**options).model_dump()
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)
        )
        raise ValueError(f"norm '{name}': {problems}") from error
    return partial(registry.load(entry.target), **registry.own_options(entry.target, values))


def norm_layers(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The layers of a model that are of the norm `name`, or the `bn` beside them, by their path."""
    kinds = tuple(registry.load(registry.lookup("norm", n).target) for n in (name, "bn"))
    return {path: m for path, m in model.named_modules() if isinstance(m, kinds)}
