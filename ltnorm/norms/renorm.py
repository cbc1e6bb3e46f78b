"""Batch renormalization: training normalizes, but for the gradient, as evaluation does."""

from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor

from ltnorm.norms.batch import BatchStatisticsNorm, Moments
from ltnorm.norms.functional import hold
from ltnorm.norms.routing import Momentum


class BatchRenorm(BatchStatisticsNorm):
    """y = weight * (r * (x - m) / sqrt(v + eps) + d) + bias, with m, v of the batch and

        r = clip(sqrt(v + eps) / sqrt(var + eps), 1 / r_max, r_max)
        d = clip((m - mean) / sqrt(var + eps), -d_max, d_max)

    constant for the gradient, where mean and var are the running moments before this batch.
    Unclipped it is normalization by the running moments. Evaluation is that of BN.

    Ioffe 2017, arXiv 1702.03275. The limits open linearly, from r = 1 and d = 0, which is BN,
    between `warmup` and `warmup + ramp` batches (the paper, for ImageNet: 5,000 and up to
    35,000). The running variance is a moving average of variances, as in torch's BN; the paper's
    is one of standard deviations.

    Args:
        channels: C.
        r_max, d_max: the limits in the end; 1 and 0 make it BN.
        warmup, ramp: batches of plain BN, and batches over which the limits open.
        momentum, eps, sync: as `BatchNorm`.
    """

    reads_state = True
    corrects = True

    def __init__(
        self,
        channels: int,
        *,
        r_max: Annotated[float, Field(ge=1)] = 3.0,
        d_max: NonNegativeFloat = 5.0,
        warmup: NonNegativeInt = 500,
        ramp: NonNegativeInt = 2000,
        momentum: Momentum = 0.1,
        eps: PositiveFloat = 1e-5,
        sync: bool = True,
    ) -> None:
        super().__init__(channels, momentum, eps, sync)
        self.r_max, self.d_max, self.warmup, self.ramp = r_max, d_max, warmup, ramp

    def _correct(self, weight: Tensor, bias: Tensor, batch: Moments) -> tuple[Tensor, Tensor]:
        if not self.corrects:
            return weight, bias
        with torch.no_grad():
            # A tensor, not a Python number, so that a compiled graph or a CUDA graph stays one.
            batches = self.num_batches_tracked.to(batch.var.dtype)
            opened = ((batches - self.warmup) / max(1, self.ramp)).clamp(0, 1)
            r_max, d_max = 1 + (self.r_max - 1) * opened, self.d_max * opened
            deviation = torch.sqrt(self.running_var.to(batch.var.dtype) + self.eps)
            r = torch.sqrt(batch.var[0] + self.eps) / deviation
            d = (batch.mean[0] + batch.shift - self.running_mean) / deviation
            r = torch.minimum(torch.maximum(r, 1 / r_max), r_max)
            d = torch.minimum(torch.maximum(d, -d_max), d_max)
        if torch.compiler.is_compiling():
            r, d = hold(r), hold(d)
        return weight * r, bias + weight * d

    def extra_repr(self) -> str:
        """Channels and the settings that matter."""
        return (
            f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}, "
            f"warmup={self.warmup}, ramp={self.ramp}"
        )
