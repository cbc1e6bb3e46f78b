"""Compound batch normalization: normalization by a Gaussian mixture, fitted by EM.

Cheng, Fang, Zhang, Li, Huang, "Compound Batch Normalization for Long-tailed Image
Classification", ACM MM 2022, arXiv 2212.01007. No code of the authors is public: this is a
reimplementation from the published abstract, and the equations below are ours. Moving-average
EM is the stepwise EM of Cappe & Moulines 2009, arXiv 0712.4273.

Notation: input x [N, C, L]; a position is one of the M = N * L vectors in R^C; K components with
diagonal covariances; responsibilities r, [N, K] a row an image or [N, K, L] a row a position,
constant for the gradient.
"""

from statistics import NormalDist
from typing import Literal, NamedTuple

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ltnorm.norms import distributed
from ltnorm.norms.functional import (
    Sums,
    accumulation_dtype,
    affine_map,
    by_parts,
    image_moments,
    matmul,
    normalize,
    plain_sums,
)
from ltnorm.norms.routing import GroupRule, Momentum, RoutedNorm

MIN_WEIGHT, MIN_VARIANCE = 1e-4, 1e-5


class Mixture(NamedTuple):
    """Parameters of the mixture: weights [K], means [K, C] and variances [K, C]."""

    weight: Tensor
    mean: Tensor
    var: Tensor


class CompoundBatchNorm(RoutedNorm):
    """y_i = sum_k r_ik (weight_k * (x_i - m_k) / sqrt(v_k + eps) + bias_k)

    E-step, from the running mixture, without gradient:
        r = softmax_k(log tau_k + ll_ik / (temperature * sqrt(C)))
    with ll the diagonal Gaussian log-density; temperature 1 / sqrt(C) is the exact posterior, 1
    is softer (the exact one is nearly one-hot in C dimensions).
    M-step, on the batch, with gradient:
        m_k = (sum_i r_ik x_i + n0 mu_k) / (n_k + n0)
        v_k = (sum_i r_ik (x_i - m_k)^2 + n0 (var_k + (mu_k - m_k)^2)) / (n_k + n0)
    The running mixture (tau, mu, var) then takes a stepwise-EM step of size `momentum`.
    Evaluation: the same E-step, the running moments, no labels, each image by itself.
    With components = 1 all of it is batch normalization.

    Args:
        channels: C.
        components: K.
        assign: one responsibility an image ("image": ll is the mean over its positions) or one
            a position ("position").
        momentum: weight of a new batch in the moving averages, in (0, 1].
        temperature: softness of the responsibilities, above 0.
        affine: a weight and bias for each component ("component") or one for all ("shared").
        pseudo_count: weight of the running moments in the M-step, in images (n0 is this times
            L); None is 1, or 0 for one component. An empty component uses its running moments.
        groups: how training groups the classes when it routes images.
        eps: added to the variance.
        sync: under torch.distributed, sum the batch statistics over all ranks.

    Shapes: input and output [N, C], [N, C, L] or [N, C, H, W], any float dtype; statistics in
    float32 (float64 for float64 input).

    Raises:
        ValueError: input of another shape, or one value a channel while training.

    Source: arXiv 2212.01007 (reimplemented from its abstract).
    """

    def __init__(
        self,
        channels: int,
        *,
        components: PositiveInt = 2,
        assign: Literal["image", "position"] = "image",
        momentum: Momentum = 0.1,
        temperature: PositiveFloat = 1.0,
        affine: Literal["component", "shared"] = "component",
        pseudo_count: NonNegativeFloat | None = None,
        groups: GroupRule = "rank",
        eps: PositiveFloat = 1e-5,
        sync: bool = True,
    ) -> None:
        super().__init__(channels, sync)
        if components < 1:
            raise ValueError(f"components must be at least 1, got {components}")
        self.components, self.assign = components, assign
        self.momentum, self.temperature, self.eps = momentum, temperature, eps
        self.pseudo_count, self.groups = pseudo_count, groups
        rows = components if affine == "component" else 1
        self.weight = nn.Parameter(torch.ones(rows, channels))
        self.bias = nn.Parameter(torch.zeros(rows, channels))
        self.mixing_weight: Tensor
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self.spread: Tensor
        self.register_buffer("mixing_weight", torch.full((components,), 1 / components))
        self.register_buffer("running_mean", torch.zeros(components, channels))
        self.register_buffer("running_var", torch.ones(components, channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        # Where components start without a route: normal quantiles, so that no two are equal.
        quantiles = [NormalDist().inv_cdf((k + 0.5) / components) for k in range(components)]
        self.register_buffer("spread", torch.tensor(quantiles)[:, None], persistent=False)

    def _train(self, x: Tensor) -> Tensor:
        self.check_route(len(x))
        sync = distributed.synchronized(self.sync)
        with torch.no_grad():
            shift = self._shift(x)
            mixture = self._running(shift)
            if self.components == 1:
                r, sums = None, plain_sums(x, shift)
            else:
                moments = image_moments(x, shift)
                mixture = self._start(mixture, moments, shift, sync)
                r = self._apply_route(self._posterior(x, moments, mixture, shift))
                sums = self._sums(x, r, moments, shift)
            if sync:
                sums = Sums(*distributed.sums_over_ranks(*sums, shift))
            share, mean, var = self._m_step(sums, mixture, positions=x.shape[2])
            self._update(sums, mixture, mean, var, shift)
        return normalize(x, r, share, mean, var, self.weight, self.bias, shift, self.eps, sync)

    def _evaluate(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            # Each image by itself: the point near the data is that of the running mixture.
            dtype = accumulation_dtype(x.dtype)
            shift = (self.mixing_weight.to(dtype)[:, None] * self.running_mean.to(dtype)).sum(0)
            mixture = self._running(shift)
            r = None
            if self.components > 1:
                moments = image_moments(x, shift) if self.assign == "image" else None
                r = self._posterior(x, moments, mixture, shift)
        scale = self.weight.to(dtype) * torch.rsqrt(mixture.var + self.eps)
        offset = self.bias.to(dtype) - (mixture.mean + shift) * scale
        return affine_map(x, r, scale, offset).to(x.dtype)

    def _shift(self, x: Tensor) -> Tensor:
        """A point near the data, [C]: the mean of the first image.

        D away from the mean of N images, one image makes their variance at least D^2 / N, so
        that what cancels when squares are expanded around it stays bounded.
        """
        return x[0].mean(1, dtype=accumulation_dtype(x.dtype))

    def _running(self, shift: Tensor) -> Mixture:
        """The running mixture, with means relative to `shift`."""
        weight, mean, var = (
            b.to(shift.dtype) for b in (self.mixing_weight, self.running_mean, self.running_var)
        )
        return Mixture(weight, mean - shift, var)

    def _start(
        self, mixture: Mixture, moments: tuple[Tensor, Tensor], shift: Tensor, sync: bool
    ) -> Mixture:
        """Before the first batch the components start at the class groups, or spread out.

        With a route, component k starts at the moments of class group k in this batch (at the
        batch's own if the group is empty); without one at mean + spread_k * std.
        """
        if sync and not self._fresh():
            return mixture
        first, second = moments
        member = first.new_ones(len(first), 1)
        if self.routed is not None:
            member = torch.cat([self.one_hot(first.dtype), member], dim=1)
        sums = member.sum(0), matmul(member.T, first), matmul(member.T, second)
        if sync:
            sums = distributed.sums_over_ranks(*sums, shift)
        size = sums[0][:, None]
        means = sums[1] / size.clamp_min(1)
        variances = sums[2] / size.clamp_min(1) - means.square()
        mean, var = means[-1], variances[-1].clamp_min(0)
        start_mean = mean + self.spread.to(mean.dtype) * var.sqrt()
        start_var = var.expand_as(start_mean)
        if self.routed is not None:
            size, routed = size[:-1], size[:-1].sum() > 0
            start_mean = torch.where(routed, torch.where(size > 0, means[:-1], mean), start_mean)
            start_var = torch.where(routed & (size > 0), variances[:-1], start_var)
        fresh = self.num_batches_tracked == 0
        return Mixture(
            mixture.weight,
            torch.where(fresh, start_mean, mixture.mean),
            torch.where(fresh, start_var.clamp_min(MIN_VARIANCE), mixture.var),
        )

    # Whether a batch has been seen; only asked where ranks would have to agree on the start.
    _started = False

    def _fresh(self) -> bool:
        if not self._started:
            self._started = bool(self.num_batches_tracked > 0)
        return not self._started

    def _posterior(
        self, x: Tensor, moments: tuple[Tensor, Tensor] | None, mixture: Mixture, shift: Tensor
    ) -> Tensor:
        """The E-step: r [N, K] from the images' moments, or [N, K, L].

        The log-density is two products and a constant, so that [M, K, C] is never materialised.
        """
        precision = 1 / mixture.var
        weighted = 2 * mixture.mean * precision
        constant = (mixture.mean.square() * precision + mixture.var.log()).sum(1)
        prior = mixture.weight.log() + self._sharpness * constant
        if self.assign == "image":
            assert moments is not None
            first, second = (m[:, None] for m in moments)
            distance = (second * precision - first * weighted).sum(2)
            return torch.softmax(prior + self._sharpness * distance, dim=1)

        def posterior(x: Tensor) -> Tensor:
            centred = x.to(shift.dtype) - shift[:, None]
            distance = matmul(precision, centred.square()) - matmul(weighted, centred)
            return torch.softmax(prior[:, None] + self._sharpness * distance, dim=1)

        return by_parts(posterior, x)

    @property
    def _sharpness(self) -> float:
        return -0.5 / (self.temperature * self.channels**0.5)

    def _apply_route(self, r: Tensor) -> Tensor:
        """Images with a class group belong to its component alone."""
        if self.routed is None:
            return r
        shape = (-1, 1) if r.dim() == 2 else (-1, 1, 1)
        member = self.one_hot(r.dtype).view(*r.shape[:2], *shape[2:])
        return torch.where(self.routed.view(shape) >= 0, member, r)

    def _sums(self, x: Tensor, r: Tensor, moments: tuple[Tensor, Tensor], shift: Tensor) -> Sums:
        if r.dim() == 2:
            weight = r.T * x.shape[2]
            return Sums(weight.sum(1), *(matmul(weight, m) for m in moments))

        def powers(r: Tensor, x: Tensor) -> Tensor:
            centred = (x.to(shift.dtype) - shift[:, None]).transpose(1, 2)
            return torch.stack([matmul(r, centred), matmul(r, centred.square())], dim=1)

        return Sums(r.sum((0, 2)), *by_parts(powers, r, x).sum(0))

    def _m_step(
        self, sums: Sums, mixture: Mixture, positions: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Share of a position [K], mean and variance [K, C] of each component on this batch."""
        count = sums.count[:, None]
        if self.components == 1 and not self.pseudo_count:
            mean = sums.first / count
            return 1 / sums.count, mean, (sums.second / count - mean.square()).clamp_min(0)
        # A trace of the running moments even at pseudo-count 0, so that nothing is divided by 0.
        n0 = max(1.0 if self.pseudo_count is None else self.pseudo_count, 1e-6) * positions
        mean = (sums.first + n0 * mixture.mean) / (count + n0)
        within = sums.second - 2 * mean * sums.first + count * mean.square()
        prior = n0 * (mixture.var + (mixture.mean - mean).square())
        return 1 / (sums.count + n0), mean, (within.clamp_min(0) + prior) / (count + n0)

    def _update(
        self, sums: Sums, mixture: Mixture, mean: Tensor, var: Tensor, shift: Tensor
    ) -> None:
        """One step of stepwise EM, from sums, so that nothing is divided by a component's count.

        One component follows BatchNorm's own rule (unbiased variance).
        """
        a, positions = self.momentum, sums.count.sum()
        self.num_batches_tracked += 1
        if self.components == 1:
            unbiased = var * (positions / (positions - 1))
            self.running_mean.lerp_((mean + shift).to(self.running_mean.dtype), a)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), a)
            return
        part = sums.count / positions
        weight = ((1 - a) * mixture.weight + a * part).clamp_min(MIN_WEIGHT)
        weight = weight / weight.sum()
        rate = (a / weight)[:, None]
        # Sums around the running mean of each component.
        first = (sums.first - sums.count[:, None] * mixture.mean) / positions
        second = (sums.second - 2 * mixture.mean * sums.first) / positions
        second = second + part[:, None] * mixture.mean.square()
        step = rate * first
        var = mixture.var + rate * (second - part[:, None] * mixture.var) - step.square()
        self.mixing_weight.copy_(weight)
        self.running_mean.copy_(mixture.mean + step + shift)
        self.running_var.copy_(var.clamp_min(MIN_VARIANCE))

    def extra_repr(self) -> str:
        """The settings that differ between layers of one name."""
        return (
            f"{self.channels}, components={self.components}, assign={self.assign}, "
            f"momentum={self.momentum}, temperature={self.temperature}, eps={self.eps}"
        )
