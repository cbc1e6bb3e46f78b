"""Mixture normalization: a Gaussian mixture fitted to each batch by EM."""

from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ltnorm.norms import distributed
from ltnorm.norms.em import (
    MIN_VARIANCE,
    MIN_WEIGHT,
    Mixture,
    centre,
    component_sums,
    keep,
    posterior,
    register_mixture,
    running_mixture,
    stepwise,
)
from ltnorm.norms.functional import (
    ImageMoments,
    accumulation_dtype,
    affine_map,
    image_moments,
    normalize,
    plain_sums,
)
from ltnorm.norms.layer import ChannelNorm
from ltnorm.norms.routing import Momentum


class MixtureNorm(ChannelNorm):
    """y_i = weight * sum_k p_ik / sqrt(lambda_k) (x_i - m_k) / sqrt(v_k + eps) + bias

    Kalayeh & Shah 2019, arXiv 1806.02892. A mixture with diagonal covariances is fitted to the
    batch; p_ik = p(k | x_i) is the exact posterior, lambda_k the share of component k, m_k and v_k
    its moments, by p and differentiated as moments of x (p and lambda are constant).

    The paper starts EM anew on every batch, by k-means++, which leaves components without an
    identity between batches. Here EM starts from a running mixture (first at normal quantiles of
    the batch), makes `iterations` steps on the batch, and the running mixture follows by stepwise
    EM with `momentum`; evaluation uses it.

    What sets it apart from `CompoundBatchNorm`: the batch is fitted rather than compared with
    the running mixture, the posterior is exact, 1 / sqrt(lambda_k) strengthens rare components,
    and one weight and bias serve all.

    Args:
        channels: C.
        components: K.
        iterations: EM steps on each batch.
        assign: one posterior a position, as in the paper, or one an image (of its mean
            log-density), which costs less.
        momentum: weight of a new batch in the running mixture, in (0, 1].
        eps: added to the variance.
        sync: under torch.distributed, sum the batch statistics over all ranks.

    Shapes: input and output [N, C], [N, C, L] or [N, C, H, W].
    """

    reads_state = True

    def __init__(
        self,
        channels: int,
        *,
        components: PositiveInt = 3,
        iterations: PositiveInt = 2,
        assign: Literal["image", "position"] = "position",
        momentum: Momentum = 0.1,
        eps: PositiveFloat = 1e-5,
        sync: bool = True,
    ) -> None:
        super().__init__(channels, sync)
        self.components, self.iterations, self.assign = components, iterations, assign
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.mixing_weight: Tensor
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self.spread: Tensor
        register_mixture(self, components, channels)

    def _train(self, x: Tensor) -> Tensor:
        sync = distributed.synchronized(self.sync)
        with torch.no_grad():
            moments = image_moments(x)
            running = running_mixture(self, moments.shift)
            running = fitted = self._start(running, moments, sync)
            for _ in range(self.iterations):
                r = self._posterior(x, fitted, moments)
                sums = component_sums(x, moments, r)
                if sync:
                    sums = distributed.sums_over_ranks(sums, moments.shift)
                # A trace of what was there, so that nothing is divided by 0.
                size = sums.count[:, None] + 1e-6
                mean = (sums.first + 1e-6 * fitted.mean) / size
                raw = (sums.second + 1e-6 * (fitted.var + fitted.mean.square())) / size
                var = (raw - mean.square()).clamp_min(0)
                weight = (sums.count / sums.count.sum()).clamp_min(MIN_WEIGHT)
                fitted = Mixture(weight, mean, var.clamp_min(MIN_VARIANCE))
            keep(self, stepwise(running, sums, self.momentum), moments.shift)
            self.num_batches_tracked += 1
            share = 1 / (size[:, 0] * x.shape[2])
            strength = torch.rsqrt(fitted.weight)[:, None]
        weight = self.weight.to(strength.dtype) * strength
        rest = (weight, self.bias[None], moments.shift, self.eps, sync)
        return normalize(x, r, share, mean, var, *rest)

    def _start(self, mixture: Mixture, moments: ImageMoments, sync: bool) -> Mixture:
        """Before the first batch the components are spread over it."""
        fresh = self.num_batches_tracked == 0
        if sync and not fresh:
            return mixture
        mean, raw = moments.first.mean(0), moments.second.mean(0)
        if sync:
            sums = distributed.sums_over_ranks(plain_sums(moments), moments.shift)
            mean, raw = sums.first[0] / sums.count, sums.second[0] / sums.count
        var = (raw - mean.square()).clamp_min(MIN_VARIANCE)
        apart = mean + self.spread.to(mean.dtype) * var.sqrt()
        return Mixture(
            mixture.weight,
            torch.where(fresh, apart, mixture.mean),
            torch.where(fresh, var, mixture.var),
        )

    def _posterior(self, x: Tensor, mixture: Mixture, moments: ImageMoments) -> Tensor:
        of_images = moments if self.assign == "image" else None
        return posterior(x, mixture, moments.shift, of_images, sharpness=1.0)

    def _evaluate(self, x: Tensor) -> Tensor:
        dtype = accumulation_dtype(x.dtype)
        buffers = (self.mixing_weight, self.running_mean, self.running_var)
        weight, mean, var = (b.to(dtype) for b in buffers)
        scale = self.weight.to(dtype) * torch.rsqrt(var + self.eps)
        scale = scale * torch.rsqrt(weight)[:, None]
        offset = self.bias.to(dtype) - mean * scale
        return affine_map(x, self.responsibilities(x), scale, offset).to(x.dtype)

    def responsibilities(self, x: Tensor) -> Tensor:
        """r of the running mixture: [N, K, L], or [N, K] where images are assigned whole."""
        with torch.no_grad():
            shift = centre(self, accumulation_dtype(x.dtype))
            moments = image_moments(x, shift) if self.assign == "image" else None
            r = posterior(x, running_mixture(self, shift), shift, moments, sharpness=1.0)
        return r.detach()

    @torch.no_grad()
    def set_affine(self, weight: Tensor, bias: Tensor) -> None:
        """Make `weight` and `bias` [C] those of the whole, while all components are equal."""
        self.weight.copy_(weight * self.mixing_weight.mean().sqrt())
        self.bias.copy_(bias)

    def extra_repr(self) -> str:
        """Channels and the settings that matter."""
        return (
            f"{self.channels}, components={self.components}, iterations={self.iterations}, "
            f"assign={self.assign}, momentum={self.momentum}, eps={self.eps}"
        )
