"""Routing: telling the layers that want it the class group of each image while training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ltnorm.norms.layer import ChannelNorm

Momentum = Annotated[float, Field(gt=0, le=1)]
GroupRule = Literal["rank", "images"]


class RoutedNorm(ChannelNorm):
    """A norm layer with K components to which images can be assigned by class group.

    Attributes:
        components: K, the number of class groups that it takes.
        groups: how training should group the classes (see `ltnorm.data.class_groups`).
        routed: the class group of each image, int64 [N], inside `route`; None outside.
    """

    components: int
    groups: GroupRule
    routed: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy and a pickle have of the layer: not the route, which nobody would clear."""
        return {key: value for key, value in self.__dict__.items() if key != "routed"}

    def one_hot(self, dtype: torch.dtype) -> Tensor:
        """The routed groups as [N, K]; a row of zeros where the group is -1."""
        groups = self.require_route()
        index = torch.arange(self.components, device=groups.device)
        return (groups[:, None] == index).to(dtype)

    def require_route(self) -> Tensor:
        """The routed groups.

        Raises:
            RuntimeError: outside `route`.
        """
        if self.routed is None:
            raise RuntimeError(
                f"{type(self).__name__} needs the class group of each image while training: "
                "wrap the forward in `with ltnorm.norms.route(model, groups):`"
            )
        return self.routed

    def check_route(self, images: int) -> None:
        """Raises ValueError where the route is for another number of images."""
        if self.routed is not None and len(self.routed) != images:
            raise ValueError(f"route has {len(self.routed)} groups for a batch of {images} images")


@contextmanager
def route(model: nn.Module, groups: Tensor) -> Iterator[None]:
    """Set the class group of each image on the model's routed layers, and clear it on exit.

    Only training reads it; evaluation never uses labels. A model without routed layers is left
    as it is, so that a training loop may always route.

    Args:
        model: the model; its `RoutedNorm` layers are found by walking it.
        groups: int64 [N], the class group of each image of the coming batch, 0 .. K - 1;
            -1 means "use the posterior".

    Raises:
        ValueError: groups that are not a vector of integers, or out of range for a layer
            (checked for tensors on the CPU, where looking costs no synchronization).

    Example:
        with route(model, class_group[labels]):
            logits = model(images)
    """
    layers = [m for m in model.modules() if isinstance(m, RoutedNorm)]
    if not isinstance(groups, Tensor):
        raise ValueError(f"groups must be an int64 tensor [N], got {type(groups).__name__}")
    if groups.dim() != 1 or groups.dtype.is_floating_point or groups.dtype == torch.bool:
        raise ValueError(f"groups must be int64 [N], got {groups.dtype} {list(groups.shape)}")
    if layers and groups.numel() and groups.device.type == "cpu":
        low, high = (int(v) for v in torch.aminmax(groups))
        most = min(layer.components for layer in layers)
        if low < -1 or high >= most:
            raise ValueError(f"groups must lie in -1 .. {most - 1}, got {low} .. {high}")
    before = [layer.routed for layer in layers]
    try:
        for layer in layers:
            layer.routed = groups
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.routed = old
