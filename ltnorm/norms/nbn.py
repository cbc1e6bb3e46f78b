"""Normalizing batch normalization: the affine parameters as unit vectors times learned scalars."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from ltnorm.norms.batch import BatchStatisticsNorm
from ltnorm.norms.routing import Momentum


class NormalizedBatchNorm(BatchStatisticsNorm):
    """BN with weight = s_w * w / |w| and bias = s_b * b / |b|, and w, s_w, b, s_b learned.

    Bao et al. 2025, "Normalizing Batch Normalization for Long-Tailed Recognition",
    arXiv 2501.03122: the scalar sets the magnitude of all channels, the unit vector how it is
    shared among them, which evens out the strength of frequent and rare features.

    Here each layer has scalars of its own, and starts as BN does: w = 1 and s_w = sqrt(C), b = 1
    and s_b = 0. (The authors' published code shares one scalar, starting at 1, among the last
    norms of the blocks of the last stage; there w and b are those of BN.)

    Args:
        channels: C.
        parameters: which are unit vectors times a scalar; the other is as in BN.
        min_channels: which layers, by width: a layer with fewer channels is plain BN. The last
            stage, where the paper applies it, is 64 for a CIFAR ResNet, 512 for ResNet-18.
        momentum, eps, sync: as `BatchNorm`.
    """

    def __init__(
        self,
        channels: int,
        *,
        parameters: Literal["both", "weight", "bias"] = "both",
        min_channels: NonNegativeInt = 0,
        momentum: Momentum = 0.1,
        eps: PositiveFloat = 1e-5,
        sync: bool = True,
    ) -> None:
        super().__init__(channels, momentum, eps, sync)
        wide = channels >= min_channels
        self.weight_scale: nn.Parameter | None = None
        self.bias_scale: nn.Parameter | None = None
        if wide and parameters != "bias":
            self.weight_scale = nn.Parameter(torch.tensor(channels**0.5))
        if wide and parameters != "weight":
            self.bias_scale = nn.Parameter(torch.tensor(0.0))
            nn.init.ones_(self.bias)

    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        pairs = ((self.weight, self.weight_scale), (self.bias, self.bias_scale))
        weight, bias = (v if s is None else s * F.normalize(v, dim=0) for v, s in pairs)
        return weight, bias

    @torch.no_grad()
    def set_affine(self, weight: Tensor, bias: Tensor) -> None:
        """Make `weight` and `bias` [C] those that the layer applies."""
        pairs = ((self.weight, self.weight_scale), (self.bias, self.bias_scale))
        for (vector, scale), value in zip(pairs, (weight, bias), strict=True):
            if scale is None:
                vector.copy_(value)
                continue
            scale.copy_(value.norm())
            # A zero vector has no direction.
            vector.copy_(torch.where(value.norm() > 0, value, torch.ones_like(value)))

    def extra_repr(self) -> str:
        """Channels and the settings that matter."""
        scaled = [n for n in ("weight", "bias") if getattr(self, f"{n}_scale") is not None]
        return f"{super().extra_repr()}, unit={'+'.join(scaled) or 'none'}"
