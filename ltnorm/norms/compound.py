"""Compound batch normalization: normalization by a Gaussian mixture, fitted by EM.

Cheng, Fang, Zhang, Li, Huang, "Compound Batch Normalization for Long-tailed Image
Classification", ACM MM 2022, arXiv 2212.01007. No code of the authors is public: this is a
reimplementation from the published abstract, and the equations below are ours. Moving-average
EM is the stepwise EM of Cappe & Moulines 2009, arXiv 0712.4273.

Notation: input x [N, C, L]; a position is one of the M = N * L vectors in R^C; K components with
diagonal covariances; responsibilities r, [N, K] a row an image or [N, K, L] a row a position,
constant for the gradient.
"""

from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ltnorm.norms import distributed
from ltnorm.norms.em import (
    MIN_VARIANCE,
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
    Sums,
    accumulation_dtype,
    affine_map,
    as_affine,
    image_moments,
    matmul,
    normalize,
    plain_sums,
)
from ltnorm.norms.routing import GroupRule, Momentum, RoutedNorm


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
        prior: what stands for tau in the E-step: the running mixing weights ("weights"), or the
            same for all components ("uniform"), so that rare ones need not be far away to be
            taken. The moving averages have the mixing weights in any case.
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
        prior: Literal["weights", "uniform"] = "weights",
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
        self.reads_state = components > 1
        self.momentum, self.temperature, self.eps = momentum, temperature, eps
        self.prior = prior
        self.pseudo_count, self.groups = pseudo_count, groups
        rows = components if affine == "component" else 1
        self.weight = nn.Parameter(torch.ones(rows, channels))
        self.bias = nn.Parameter(torch.zeros(rows, channels))
        self.mixing_weight: Tensor
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self.spread: Tensor
        register_mixture(self, components, channels)

    def _train(self, x: Tensor) -> Tensor:
        self.check_route(len(x))
        sync = distributed.synchronized(self.sync)
        with torch.no_grad():
            moments = image_moments(x)
            shift = moments.shift
            mixture = running_mixture(self, shift)
            if self.components == 1:
                r, sums = None, plain_sums(moments)
            else:
                if self._may_be_fresh():
                    mixture = self._start(mixture, moments, sync)
                r = self._apply_route(self._posterior(x, mixture, shift, moments))
                sums = component_sums(x, moments, r)
            if sync:
                sums = distributed.sums_over_ranks(sums, shift)
            share, mean, var = self._m_step(sums, mixture, positions=x.shape[2])
            self._update(sums, mixture, mean, var, shift, positions=x.shape[2])
        return self._normalize_batch(x, r, share, mean, var, shift, sync)

    def _normalize_batch(
        self,
        x: Tensor,
        r: Tensor | None,
        share: Tensor,
        mean: Tensor,
        var: Tensor,
        shift: Tensor,
        sync: bool,
    ) -> Tensor:
        return normalize(x, r, share, mean, var, self.weight, self.bias, shift, self.eps, sync)

    def as_affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scale and offset [C] of the evaluation, of one component alone."""
        if self.components > 1:
            raise ValueError(f"chooses among its {self.components} components by the image")
        mean, var = (t[0].to(dtype) for t in (self.running_mean, self.running_var))
        return as_affine(mean, var, self.weight[0], self.bias[0], self.eps)

    def _evaluate(self, x: Tensor) -> Tensor:
        if self.components == 1:
            return super()._evaluate(x)
        dtype = accumulation_dtype(x.dtype)
        mean, var = self.running_mean.to(dtype), self.running_var.to(dtype)
        scale, offset = as_affine(mean, var, self.weight, self.bias, self.eps)
        return affine_map(x, self.responsibilities(x), scale, offset).to(x.dtype)

    def responsibilities(self, x: Tensor) -> Tensor | None:
        """r of the running mixture [N, K] or, by position, [N, K, L]; None for one component."""
        if self.components == 1:
            return None
        with torch.no_grad():
            # Each image by itself: the point near the data is that of the running mixture.
            shift = centre(self, accumulation_dtype(x.dtype))
            r = self._posterior(x, running_mixture(self, shift), shift)
        # Constant for forward-mode differentiation, too.
        return r.detach()

    # The batch counter as the last training step left it: where it still is so, the mixture has
    # started. The start is a torch.where on that counter; this only saves it where it is moot.
    _counted: tuple[int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the mark, which is of this very counter."""
        return {key: value for key, value in super().__getstate__().items() if key != "_counted"}

    def _may_be_fresh(self) -> bool:
        if torch.compiler.is_compiling():
            return True
        counter = self.num_batches_tracked
        return counter.is_inference() or self._counted != (id(counter), counter._version)

    def _start(self, mixture: Mixture, moments: ImageMoments, sync: bool) -> Mixture:
        """Before the first batch the components start at the class groups, or spread out.

        With a route, component k starts at the moments of class group k in this batch (at the
        batch's own if the group is empty); without one at mean + spread_k * std.
        """
        fresh = self.num_batches_tracked == 0
        if sync and not fresh:  # the ranks would have to agree on the sums below
            return mixture
        member = moments.first.new_ones(len(moments.first), 1)
        if self.routed is not None:
            member = torch.cat([self.one_hot(member.dtype), member], dim=1)
        sums = Sums(member.sum(0), *(matmul(member.T, m) for m in moments[:2]))
        if sync:
            sums = distributed.sums_over_ranks(sums, moments.shift)
        size = sums.count[:, None]
        means = sums.first / size.clamp_min(1)
        variances = sums.second / size.clamp_min(1) - means.square()
        mean, var = means[-1], variances[-1].clamp_min(0)
        start_mean = mean + self.spread.to(mean.dtype) * var.sqrt()
        start_var = var.expand_as(start_mean)
        if self.routed is not None:
            size, routed = size[:-1], size[:-1].sum() > 0
            start_mean = torch.where(routed, torch.where(size > 0, means[:-1], mean), start_mean)
            start_var = torch.where(routed & (size > 0), variances[:-1], start_var)
        return Mixture(
            mixture.weight,
            torch.where(fresh, start_mean, mixture.mean),
            torch.where(fresh, start_var.clamp_min(MIN_VARIANCE), mixture.var),
        )

    def _posterior(
        self, x: Tensor, mixture: Mixture, shift: Tensor, moments: ImageMoments | None = None
    ) -> Tensor:
        sharpness = 1 / (self.temperature * self.channels**0.5)
        if self.prior == "uniform":
            mixture = mixture._replace(weight=torch.ones_like(mixture.weight))
        if self.assign == "position":
            return posterior(x, mixture, shift, None, sharpness)
        moments = moments or image_moments(x, shift)
        return posterior(x, mixture, shift, moments, sharpness)

    def _apply_route(self, r: Tensor) -> Tensor:
        """Images with a class group belong to its component alone."""
        if self.routed is None:
            return r
        shape = (-1, 1) if r.dim() == 2 else (-1, 1, 1)
        member = self.one_hot(r.dtype).view(*r.shape[:2], *shape[2:])
        return torch.where(self.routed.view(shape) >= 0, member, r)

    def _m_step(
        self, sums: Sums, mixture: Mixture, positions: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Share of a position [K], mean and variance [K, C] of each component on this batch."""
        count, first, second = sums.count[:, None], sums.first, sums.second
        if self.components > 1 or self.pseudo_count:
            # A trace of the running moments even at 0, so that nothing is divided by 0.
            n0 = max(1.0 if self.pseudo_count is None else self.pseudo_count, 1e-6)
            count = count + n0
            first = torch.add(first, mixture.mean, alpha=n0)
            prior = torch.addcmul(mixture.var, mixture.mean, mixture.mean)
            second = torch.add(second, prior, alpha=n0)
        mean = first / count
        var = torch.addcmul(second / count, mean, mean, value=-1).clamp_min(0)
        return 1 / (count[:, 0] * positions), mean, var

    def _update(
        self,
        sums: Sums,
        mixture: Mixture,
        mean: Tensor,
        var: Tensor,
        shift: Tensor,
        positions: int,
    ) -> None:
        """One step of stepwise EM; one component follows BatchNorm's own rule (unbiased)."""
        counter = self.num_batches_tracked
        counter += 1
        if self.components == 1:
            total = sums.count.sum() * positions
            unbiased = var * (total / (total - 1))
            self.running_mean.lerp_((mean + shift).to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            return
        keep(self, stepwise(mixture, sums, self.momentum), shift)
        if not (torch.compiler.is_compiling() or counter.is_inference()):
            self._counted = (id(counter), counter._version)

    def extra_repr(self) -> str:
        """The settings that differ between layers of one name."""
        return (
            f"{self.channels}, components={self.components}, assign={self.assign}, "
            f"momentum={self.momentum}, temperature={self.temperature}, eps={self.eps}"
        )
