"""Expectation maximization for a Gaussian mixture with diagonal covariances, batch by batch.

The E-step, the sums that an M-step needs, and stepwise EM (Cappe & Moulines 2009, arXiv 0712.4273)
on them. Conventions are those of `functional`: means are relative to a `shift` [C], r is [N, K] or
[N, K, L] and constant for the gradient, counts are in units of images.
"""

from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ltnorm.norms.functional import ImageMoments, Sums, by_parts, matmul

MIN_WEIGHT, MIN_VARIANCE = 1e-4, 1e-5


class Mixture(NamedTuple):
    """Parameters of the mixture: weights [K], means [K, C] and variances [K, C]."""

    weight: Tensor
    mean: Tensor
    var: Tensor


def register_mixture(layer: nn.Module, components: int, channels: int) -> None:
    """Give a layer the buffers of a running mixture, and a counter of its batches."""
    layer.register_buffer("mixing_weight", torch.full((components,), 1 / components))
    layer.register_buffer("running_mean", torch.zeros(components, channels))
    layer.register_buffer("running_var", torch.ones(components, channels))
    layer.register_buffer("num_batches_tracked", torch.tensor(0))
    # Where components start without a route: normal quantiles, so that no two are equal.
    quantiles = [NormalDist().inv_cdf((k + 0.5) / components) for k in range(components)]
    layer.register_buffer("spread", torch.tensor(quantiles)[:, None], persistent=False)


def running_mixture(layer: nn.Module, shift: Tensor) -> Mixture:
    """The running mixture of a layer, with means relative to `shift`, in its dtype."""
    buffers = (layer.mixing_weight, layer.running_mean, layer.running_var)
    weight, mean, var = (b.to(shift.dtype) for b in buffers)
    return Mixture(weight, mean - shift, var)


def centre(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The mean of a layer's running mixture [C]: the point near the data in evaluation."""
    return (layer.mixing_weight.to(dtype)[:, None] * layer.running_mean.to(dtype)).sum(0)


def keep(layer: nn.Module, mixture: Mixture, shift: Tensor) -> None:
    """Make a mixture the running one of a layer."""
    layer.mixing_weight.copy_(mixture.weight)
    layer.running_mean.copy_(mixture.mean + shift)
    layer.running_var.copy_(mixture.var)


def posterior(
    x: Tensor, mixture: Mixture, shift: Tensor, moments: ImageMoments | None, sharpness: float
) -> Tensor:
    """The E-step: r = softmax_k(log tau_k + sharpness * ll_k), ll the Gaussian log-density.

    It is two products and a constant, so that [M, K, C] is never materialised.

    Args:
        x: [N, C, L].
        mixture: its means relative to `shift`.
        shift: [C].
        moments: of the images, around shift: r [N, K] then follows from an image's mean ll.
            None: r [N, K, L], each position for itself.
        sharpness: 1 for the exact posterior; less is softer.
    """
    weight, mean, var = mixture
    precision = var.reciprocal()
    weighted = mean * precision
    constant = torch.addcmul(var.log(), mean, weighted).sum(1)
    prior = torch.add(weight.log(), constant, alpha=-0.5 * sharpness)
    weighted, precision = sharpness * weighted, (-0.5 * sharpness) * precision
    if moments is not None:
        # One product for both moments: small ones cost more to start than to do.
        logits = matmul(moments.both, torch.cat([weighted, precision], dim=1).T)
        return torch.softmax(logits + prior, dim=1)
    target = shift[:, None]

    def by_position(x: Tensor) -> Tensor:
        centred = x.to(target.dtype) - target
        logits = matmul(weighted, centred) + prior[:, None]
        return torch.softmax(logits.add_(matmul(precision, centred.square_())), dim=1)

    return by_parts(by_position, x)


def component_sums(x: Tensor, moments: ImageMoments, r: Tensor) -> Sums:
    """What the batch says of each component, for r [N, K] or [N, K, L]."""
    if r.dim() == 2:
        return Sums(r.sum(0), *matmul(r.T, moments.both).chunk(2, dim=1))
    target = moments.shift[:, None]

    def powers(r: Tensor, x: Tensor) -> Tensor:
        centred = (x.to(target.dtype) - target).transpose(1, 2)
        first = matmul(r, centred)
        return torch.stack([first, matmul(r, centred.square_())], dim=1)

    count, sums = r.sum((0, 2)), by_parts(powers, r, x).sum(0)
    positions = x.shape[2]
    return Sums(count / positions, *(sums / positions))


def stepwise(mixture: Mixture, sums: Sums, step: float) -> Mixture:
    """The mixture after one step of stepwise EM: of its sufficient statistics, not its moments.

    From sums, so that nothing is divided by a component's count: an empty one stays as it is,
    but for its weight.
    """
    total = sums.count.sum()
    share = sums.count / total
    weight = torch.lerp(mixture.weight, share, step).clamp_min(MIN_WEIGHT)
    weight = weight / weight.sum()
    rate, share = (step / weight)[:, None], share[:, None]
    # First and second moment take the same step, which is that of mean and variance.
    raw = torch.addcmul(mixture.var, mixture.mean, mixture.mean)
    mean = mixture.mean + rate * torch.addcmul(sums.first / total, share, mixture.mean, value=-1)
    raw = raw + rate * torch.addcmul(sums.second / total, share, raw, value=-1)
    var = torch.addcmul(raw, mean, mean, value=-1).clamp_min(MIN_VARIANCE)
    return Mixture(weight, mean, var)


def pool(weight: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """The mixture as one Gaussian, by the law of total variance: mean and variance, [1, C]."""
    weight = (weight / weight.sum())[:, None]
    centre = (weight * mean).sum(0, keepdim=True)
    return centre, (weight * (var + (mean - centre).square())).sum(0, keepdim=True)
