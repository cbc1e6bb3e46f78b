"""Compound batch normalization: normalization by a Gaussian mixture, fitted by EM.

Cheng, Fang, Zhang, Li, Huang, "Compound Batch Normalization for Long-tailed Image
Classification", ACM MM 2022, arXiv 2212.01007. No code of the authors is public: this is a
reimplementation from the published abstract, and the equations below are ours. Moving-average
EM is the stepwise EM of Cappe & Moulines 2009, arXiv 0712.4273.

Notation: input x [N, C, H, W]; a position is one of the M = N * H * W vectors in R^C; K
components with diagonal covariances; responsibilities R, [N, K] a row an image or [N, K, H*W] a
row a position. R is constant for the gradient; all else is differentiated by autograd.
"""

from statistics import NormalDist
from typing import Literal, NamedTuple

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ltnorm.norms.routing import GroupRule, Momentum, RoutedNorm

MIN_WEIGHT, MIN_VARIANCE = 1e-4, 1e-5


class Mixture(NamedTuple):
    """Parameters of the mixture: weights [K], means [K, C] and variances [K, C]."""

    weight: Tensor
    mean: Tensor
    var: Tensor


class Sums(NamedTuple):
    """What a batch says of each component: sum_i r_ik [K], sum r x [K, C], sum r x^2 [K, C]."""

    count: Tensor
    first: Tensor
    second: Tensor


class CompoundBatchNorm2d(RoutedNorm):
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
    With components = 1 all of it is BatchNorm2d.

    Args:
        channels: C.
        components: K.
        assign: one responsibility an image ("image": ll is the mean over its positions) or one
            a position ("position").
        momentum: weight of a new batch in the moving averages, in (0, 1].
        temperature: softness of the responsibilities, above 0.
        affine: a weight and bias for each component ("component") or one for all ("shared").
        pseudo_count: weight of the running moments in the M-step, in images (n0 is this times
            H * W); None is 1, or 0 for one component. An empty component uses its running
            moments.
        groups: how training groups the classes when it routes images.
        eps: added to the variance.

    Shapes: input and output [N, C, H, W], any float dtype; statistics in float32 (float64 for
    float64 input).

    Raises:
        ValueError: input not [N, C, H, W], or one value a channel while training.

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
    ) -> None:
        super().__init__()
        if components < 1:
            raise ValueError(f"components must be at least 1, got {components}")
        self.channels, self.components, self.assign = channels, components, assign
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

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [N, C, H, W]."""
        self._check_input(x)
        with torch.autocast(x.device.type, enabled=False):
            # Squares are expanded below, so everything is done around a point near the data.
            shift = self._shift(x)
            centred = x.to(torch.promote_types(x.dtype, torch.float32)) - shift[:, None, None]
            if self.training:
                y = self._forward_train(centred, shift)
            else:
                y = self._forward_eval(centred, shift)
        return y.to(x.dtype)

    def _forward_train(self, x: Tensor, shift: Tensor) -> Tensor:
        moments = _image_moments(x)
        with torch.no_grad():
            mixture = self._running(shift)
            if self.components > 1:
                mixture = self._start(mixture, *moments)
            r = self._responsibilities(x, moments, mixture)
            r = self._apply_route(r)
        sums = self._sums(x, moments, r)
        mean, var = self._m_step(sums, mixture, positions=x.shape[2] * x.shape[3])
        with torch.no_grad():
            self._update(sums, mixture, mean, var, shift, positions=x.numel() // self.channels)
        return self._normalize(x, r, mean, var)

    def _forward_eval(self, x: Tensor, shift: Tensor) -> Tensor:
        mixture = self._running(shift)
        with torch.no_grad():
            by_image = self.assign == "image" and self.components > 1
            moments = _image_moments(x) if by_image else None
            r = self._responsibilities(x, moments, mixture)
        return self._normalize(x, r, mixture.mean, mixture.var)

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"{type(self).__name__} expects [N, {self.channels}, H, W], got {list(x.shape)}"
            )
        if self.training and x.numel() == self.channels:
            raise ValueError(
                "expected more than 1 value per channel when training, "
                f"got input size {list(x.shape)}"
            )
        if self.training and self.routed is not None and len(self.routed) != len(x):
            raise ValueError(f"route has {len(self.routed)} groups for a batch of {len(x)} images")

    def _shift(self, x: Tensor) -> Tensor:
        """A point near the data, [C]: the mean of the first image, or of the running mixture.

        D away from the mean of N images, one image makes their variance at least D^2 / N, so
        that what cancels when squares are expanded around it stays bounded. Evaluation must not
        depend on the rest of the batch, and takes the running mean.
        """
        if self.training:
            return x[0].detach().mean(dim=(1, 2), dtype=torch.promote_types(x.dtype, torch.float32))
        dtype = torch.promote_types(x.dtype, torch.float32)
        return self.mixing_weight.to(dtype) @ self.running_mean.to(dtype)

    def _running(self, shift: Tensor) -> Mixture:
        """The running mixture, with means relative to `shift`."""
        weight, mean, var = (
            b.to(shift.dtype) for b in (self.mixing_weight, self.running_mean, self.running_var)
        )
        return Mixture(weight, mean - shift, var)

    def _start(self, mixture: Mixture, first: Tensor, second: Tensor) -> Mixture:
        """Before the first batch the components start at the class groups, or spread out.

        With a route, component k starts at the moments of class group k in this batch (at the
        batch's own if the group is empty); without one at mean + spread_k * std.
        """
        mean, var = first.mean(0), second.mean(0) - first.mean(0).square()
        start_mean = mean + self.spread.to(mean.dtype) * var.clamp_min(0).sqrt()
        start_var = var.expand_as(start_mean)
        if self.routed is not None:
            member = self._one_hot(first.dtype)
            size = member.sum(0)[:, None]
            group_mean = member.T @ first / size.clamp_min(1)
            group_var = member.T @ second / size.clamp_min(1) - group_mean.square()
            routed = size.sum() > 0
            start_mean = torch.where(routed, torch.where(size > 0, group_mean, mean), start_mean)
            start_var = torch.where(routed & (size > 0), group_var, start_var)
        fresh = self.num_batches_tracked == 0
        return Mixture(
            mixture.weight,
            torch.where(fresh, start_mean, mixture.mean),
            torch.where(fresh, start_var.clamp_min(MIN_VARIANCE), mixture.var),
        )

    def _responsibilities(
        self, x: Tensor, moments: tuple[Tensor, Tensor] | None, mixture: Mixture
    ) -> Tensor:
        """The E-step: R [N, K], or [N, K, H*W] by position.

        The log-density is expanded into two products and a constant, so that [M, K, C] is never
        materialised; by image the products are small, and done without matrix units, whose TF32
        would cost the difference of squares its digits.
        """
        if self.components == 1:
            return x.new_ones(len(x), 1)
        precision = 1 / mixture.var
        weighted = mixture.mean * precision
        constant = (mixture.mean * weighted + mixture.var.log()).sum(1)
        if self.assign == "image":
            assert moments is not None
            first, second = moments
            products = second[:, None] * precision - 2 * first[:, None] * weighted
            distance = products.sum(2) + constant
            prior = mixture.weight.log()
        else:
            flat = x.flatten(2)
            distance = precision @ flat.square() - 2 * weighted @ flat + constant[:, None]
            prior = mixture.weight.log()[:, None]
        scale = -0.5 / (self.temperature * self.channels**0.5)
        return torch.softmax(prior + scale * distance, dim=1)

    def _apply_route(self, r: Tensor) -> Tensor:
        """Images with a class group belong to its component alone."""
        if self.routed is None or self.components == 1:
            return r
        shape = (-1, 1) if r.dim() == 2 else (-1, 1, 1)
        member = self._one_hot(r.dtype)
        member = member if r.dim() == 2 else member[:, :, None]
        return torch.where(self.routed.view(shape) >= 0, member, r)

    def _one_hot(self, dtype: torch.dtype) -> Tensor:
        """[N, K]; a row of zeros where the group is -1."""
        assert self.routed is not None
        index = torch.arange(self.components, device=self.routed.device)
        return (self.routed[:, None] == index).to(dtype)

    def _sums(self, x: Tensor, moments: tuple[Tensor, Tensor], r: Tensor) -> Sums:
        positions = x.shape[2] * x.shape[3]
        if r.dim() == 2:
            first, second = moments
            weight = r.T * positions
            return Sums(weight.sum(1), weight @ first, weight @ second)
        flat = x.flatten(2).transpose(1, 2)
        first, second = (r @ flat).sum(0), (r @ flat.square()).sum(0)
        return Sums(r.sum((0, 2)), first, second)

    def _m_step(self, sums: Sums, mixture: Mixture, positions: int) -> tuple[Tensor, Tensor]:
        """Mean and variance [K, C] of each component on this batch, with the pseudo-count."""
        count = sums.count[:, None]
        if self.components == 1 and not self.pseudo_count:
            mean = sums.first / count
            return mean, (sums.second / count - mean.square()).clamp_min(0)
        # A trace of the running moments even at pseudo-count 0, so that nothing is divided by 0.
        n0 = max(1.0 if self.pseudo_count is None else self.pseudo_count, 1e-6) * positions
        mean = (sums.first + n0 * mixture.mean) / (count + n0)
        within = sums.second - 2 * mean * sums.first + count * mean.square()
        prior = n0 * (mixture.var + (mixture.mean - mean).square())
        return mean, (within.clamp_min(0) + prior) / (count + n0)

    def _update(
        self,
        sums: Sums,
        mixture: Mixture,
        mean: Tensor,
        var: Tensor,
        shift: Tensor,
        positions: int,
    ) -> None:
        """One step of stepwise EM, from sums, so that nothing is divided by a component's count.

        One component follows BatchNorm's own rule (unbiased variance).
        """
        a = self.momentum
        self.num_batches_tracked += 1
        if self.components == 1:
            unbiased = var * (positions / (positions - 1))
            self.running_mean.lerp_((mean + shift).to(self.running_mean.dtype), a)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), a)
            return
        share = sums.count / positions
        weight = ((1 - a) * mixture.weight + a * share).clamp_min(MIN_WEIGHT)
        weight = weight / weight.sum()
        rate = (a / weight)[:, None]
        # Sums around the running mean of each component.
        first = (sums.first - sums.count[:, None] * mixture.mean) / positions
        second = (sums.second - 2 * mixture.mean * sums.first) / positions
        second = second + share[:, None] * mixture.mean.square()
        step = rate * first
        var = mixture.var + rate * (second - share[:, None] * mixture.var) - step.square()
        self.mixing_weight.copy_(weight)
        self.running_mean.copy_(mixture.mean + step + shift)
        self.running_var.copy_(var.clamp_min(MIN_VARIANCE))

    def _normalize(self, x: Tensor, r: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """One affine map an image (or position) and channel: x * (R A) + R B."""
        scale = self.weight.to(var.dtype) * torch.rsqrt(var + self.eps)
        offset = self.bias.to(var.dtype) - mean * scale
        if r.dim() == 2:
            return x * (r @ scale)[:, :, None, None] + (r @ offset)[:, :, None, None]
        by_position = r.transpose(1, 2)
        a, b = (by_position @ t for t in (scale, offset))
        a, b = (t.transpose(1, 2).unflatten(2, x.shape[2:]) for t in (a, b))
        return x * a + b

    def extra_repr(self) -> str:
        """The settings that differ between layers of one name."""
        return (
            f"{self.channels}, components={self.components}, assign={self.assign}, "
            f"momentum={self.momentum}, temperature={self.temperature}, eps={self.eps}"
        )


def _image_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square of each image and channel, [N, C] each."""
    return x.mean(dim=(2, 3)), x.square().mean(dim=(2, 3))
