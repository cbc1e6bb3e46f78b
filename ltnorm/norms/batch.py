"""Batch normalization: torch's own layer, and one taken apart for the norms that change a part."""

from typing import NamedTuple

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from ltnorm.norms import distributed
from ltnorm.norms.functional import (
    as_affine,
    image_moments,
    normalize,
    plain_sums,
)
from ltnorm.norms.layer import ChannelNorm, Versioned, check_input
from ltnorm.norms.routing import Momentum


class BatchNorm(Versioned, nn.BatchNorm2d):
    """y = weight * (x - mean) / sqrt(var + eps) + bias, per channel over the batch.

    Ioffe & Szegedy 2015, arXiv 1502.03167. Input [N, C], [N, C, L] or [N, C, H, W]. This is
    `torch.nn.BatchNorm2d`; evaluation uses moving averages of the batch statistics. Under
    torch.distributed the batch is that of all ranks together, unless `sync` is off.
    """

    def __init__(
        self,
        channels: int,
        *,
        momentum: Momentum = 0.1,
        eps: PositiveFloat = 1e-5,
        sync: bool = True,
    ) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.sync = sync

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x."""
        if not (self.training and distributed.synchronized(self.sync)):
            return super().forward(x)
        self._check_input_dim(x)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.flatten(2) if x.dim() > 2 else x[:, :, None]
            batch = batch_moments(flat, sync=True)
            track(self, batch, self.momentum)
            y = normalize(
                flat,
                None,
                batch.share,
                batch.mean,
                batch.var,
                self.weight[None],
                self.bias[None],
                batch.shift,
                self.eps,
                True,
            )
        return y.reshape(x.shape)

    def _check_input_dim(self, input: Tensor) -> None:
        check_input(self, input, self.num_features)


class Moments(NamedTuple):
    """Of a batch: mean and var [1, C], means relative to shift [C], of count [1] positions.

    share is what a position weighs in them: [1], or [N, 1] where images do not count alike.
    """

    share: Tensor
    mean: Tensor
    var: Tensor
    count: Tensor
    shift: Tensor


@torch.no_grad()
def batch_moments(x: Tensor, *, sync: bool) -> Moments:
    """The moments of x [N, C, L] over images and positions, of all ranks if `sync`."""
    moments = image_moments(x)
    sums = plain_sums(moments)
    if sync:
        sums = distributed.sums_over_ranks(sums, moments.shift)
    mean = sums.first / sums.count
    var = (sums.second / sums.count - mean.square()).clamp_min(0)
    positions = sums.count * x.shape[2]
    return Moments(1 / positions, mean, var, positions, moments.shift)


@torch.no_grad()
def track(layer: nn.Module, batch: Moments, momentum: float) -> None:
    """Move the running mean and (unbiased) variance of a layer towards those of a batch."""
    unbiased = batch.var[0] * (batch.count / (batch.count - 1))
    layer.running_mean.lerp_((batch.mean[0] + batch.shift).to(layer.running_mean.dtype), momentum)
    layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), momentum)
    layer.num_batches_tracked += 1


class BatchStatisticsNorm(ChannelNorm):
    """Batch normalization in parts: a subclass replaces the moments, or what is done with them.

    Parameters and buffers have the names and shapes of torch's layer.
    """

    def __init__(
        self, channels: int, momentum: float = 0.1, eps: float = 1e-5, sync: bool = True
    ) -> None:
        super().__init__(channels, sync)
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def _moments(self, x: Tensor, sync: bool) -> Moments:
        return batch_moments(x, sync=sync)

    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The weight and the bias, [C] each."""
        return self.weight, self.bias

    def _correct(self, weight: Tensor, bias: Tensor, batch: Moments) -> tuple[Tensor, Tensor]:
        """The weight and the bias to train this batch with."""
        return weight, bias

    def _track(self, batch: Moments) -> None:
        track(self, batch, self.momentum)

    def _train(self, x: Tensor) -> Tensor:
        sync = distributed.synchronized(self.sync)
        batch = self._moments(x, sync)
        weight, bias = self._correct(*self._scale_and_shift(), batch)
        self._track(batch)
        moments = (batch.share, batch.mean, batch.var)
        return normalize(x, None, *moments, weight[None], bias[None], batch.shift, self.eps, sync)

    def _running(self) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] for evaluation."""
        return self.running_mean, self.running_var

    def as_affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scale and offset [C] of the evaluation."""
        mean, var = (t.to(dtype) for t in self._running())
        return as_affine(mean, var, *self._scale_and_shift(), self.eps)

    def extra_repr(self) -> str:
        """Channels and the settings that matter."""
        return f"{self.channels}, momentum={self.momentum}, eps={self.eps}"
