"""What the layers with statistics of their own share: the shapes that they take, and a version."""

from typing import Any

import torch
from torch import Tensor, nn

from ltnorm.norms.functional import accumulation_dtype, affine_map


class NewerStateError(RuntimeError):
    """A state dict holds a layer in a version of its state that is not known here."""


class Versioned(nn.Module):
    """A layer that refuses the state of a newer version of itself.

    Its class has the number (`_version`), which `state_dict` keeps in the metadata; a state dict
    without metadata is of version 1. To change what a layer saves: raise the number, and translate
    what is older in `_load_from_state_dict`. The first is 2, as that of torch's batch
    normalization, whose state can be loaded where names and shapes agree.
    """

    _version = 2

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        version = local_metadata.get("version") or 1
        if version > self._version:
            raise NewerStateError(
                f"layer '{prefix.rstrip('.')}' was saved by a newer release: its state is of "
                f"version {version}, {type(self).__name__} knows versions up to {self._version}"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def check_input(layer: nn.Module, x: Tensor, channels: int) -> None:
    """Raises ValueError unless x is floating point [N, C], [N, C, L] or [N, C, H, W]."""
    name = type(layer).__name__
    if x.dim() not in (2, 3, 4) or x.shape[1] != channels:
        shapes = f"[N, {channels}], [N, {channels}, L] or [N, {channels}, H, W]"
        raise ValueError(f"{name} expects {shapes}, got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} expects floating point numbers, got {x.dtype}")


class ChannelNorm(Versioned):
    """A layer over channels, written once for x [N, C, L], with L positions an image.

    Subclasses give `_train`, [N, C, L] -> [N, C, L], and `as_affine` if evaluation is one affine
    map a channel, `_evaluate` if it is another function. Autocast is off inside: they choose
    their own precision.

    Attributes:
        channels: C.
        sync: sum batch statistics over the ranks of torch.distributed, where there are several.
    """

    # Without a batch statistic one value a channel is enough to train on.
    needs_batch = True
    # Whether a training forward depends on the running state, which it moves: once done, it
    # cannot be done again.
    reads_state = False

    def __init__(self, channels: int, sync: bool = True) -> None:
        super().__init__()
        self.channels, self.sync = channels, sync

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [N, C], [N, C, L] or [N, C, H, W]; memory format and dtype are kept."""
        self._check_input(x)
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._normalize(x)
        return self._normalize(x)

    def _normalize(self, x: Tensor) -> Tensor:
        flat = x.flatten(2) if x.dim() > 2 else x[:, :, None]
        y = self._train(flat) if self.training else self._evaluate(flat)
        return y.reshape(x.shape)

    def _train(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def as_affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The evaluation as one affine map a channel: scale and offset, [C] each, of `dtype`.

        Raises:
            ValueError: it is not one; the message is the reason, of which the layer is subject.
        """
        raise ValueError(f"({type(self).__name__}) is another function of each image in evaluation")

    def responsibilities(self, x: Tensor) -> Tensor | None:
        """How evaluation assigns x [N, C, L] to components.

        Returns:
            r [N, K], a row an image, or [N, K, L], a row a position, which sum to 1 over K; None
            where evaluation assigns nothing.
        """
        return None

    def _evaluate(self, x: Tensor) -> Tensor:
        scale, offset = self.as_affine(accumulation_dtype(x.dtype))
        return affine_map(x, None, scale[None], offset[None]).to(x.dtype)

    def _check_input(self, x: Tensor) -> None:
        check_input(self, x, self.channels)
        if self.training and self.reads_state and _in_backward():
            raise RuntimeError(
                f"{type(self).__name__} cannot be recomputed in backward (gradient checkpointing): "
                "its running state has moved on; keep it outside of the checkpointed segments"
            )
        if self.training and self.needs_batch and x.numel() <= self.channels:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.shape}"
            )
