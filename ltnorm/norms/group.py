"""Norms over the channels and positions of one image: nothing is shared between images, and
evaluation is as training.

They are torch's own layers. On a CPU in channels_last, where torch's kernel takes several times as
long as that of batch normalization, they are computed by the moments of each image's channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ltnorm.norms.functional import accumulation_dtype, by_parts, write_by_parts
from ltnorm.norms.layer import Versioned, check_input


class _ImageNorm(Versioned, nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        """Normalize each image."""
        check_input(self, input, self.num_channels)
        if _torch_is_slow(input):
            flat = input.flatten(2)
            with torch.no_grad():
                mean, var = _group_moments(flat, self.num_groups)
            y = _Normalize.apply(flat, self.weight, self.bias, mean, var, self.eps)
            return y.reshape(input.shape)
        return super().forward(input)


def _torch_is_slow(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.dim() != 4 or torch.compiler.is_compiling():
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _group_moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of the groups of each image of x [N, C, L]: [N, G] each.

    Squares are taken around each channel's own mean, so that nothing cancels.
    """
    dtype = accumulation_dtype(x.dtype)

    def square(x: Tensor, mean: Tensor) -> Tensor:
        target = mean[:, :, None].expand_as(x)
        return F.mse_loss(x.to(dtype), target, reduction="none").mean(2)

    mean = x.mean(2, dtype=dtype)
    within = by_parts(square, x, mean).unflatten(1, (groups, -1)).mean(2)
    between = mean.unflatten(1, (groups, -1)).var(2, correction=0)
    return mean.unflatten(1, (groups, -1)).mean(2), within + between


class _Normalize(torch.autograd.Function):
    """y = weight (x - mean) / sqrt(var + eps) + bias, for x [N, C, L], moments [N, G] of groups.

    The moments come as numbers, and are differentiated as what they are, moments of x. With
    xhat = (x - mean) / sqrt(var + eps), and <.> the mean over a group's channels and positions:

        dx = (weight g - <weight g> - xhat <weight g xhat>) / sqrt(var + eps)
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> Tensor:
        mean, inverse = _by_channel(mean, torch.rsqrt(var + eps), like=weight)
        scale = weight.to(var.dtype) * inverse
        offset = torch.addcmul(bias.to(var.dtype), mean, scale, value=-1)
        if x.dtype == var.dtype:
            return torch.addcmul(offset[:, :, None], x, scale[:, :, None])
        return write_by_parts(
            lambda x, a, b: torch.addcmul(b[:, :, None], x.to(a.dtype), a[:, :, None]),
            x,
            scale,
            offset,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives the moments are functions of x
            mean, var = _group_moments(x, mean.shape[1])
        return *_backward(grad, x, weight, mean, var, ctx.eps), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        x, weight, bias, mean, _, eps = args
        groups = mean.shape[-1]
        mapped = torch.vmap(
            lambda x, weight, bias: F.group_norm(x, groups, weight, bias, eps),
            in_dims=in_dims[:3],
        )
        return mapped(x, weight, bias), 0


def _by_channel(*moments: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """[N, G] each -> [N, C], the number of a group for each of its channels."""
    return tuple(m.repeat_interleave(len(like) // m.shape[1], dim=1) for m in moments)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, groups = var.dtype, mean.shape[1]
    mean, inverse = _by_channel(mean, torch.rsqrt(var + eps), like=weight)
    scale = weight.to(dtype) * inverse
    level = grad.mean(2, dtype=dtype)
    product = by_parts(lambda g, x: (g.to(dtype) * x.to(dtype)).mean(2), grad, x)
    slope = torch.addcmul(product, mean, level, value=-1) * inverse  # the mean of g xhat
    through = ((weight.to(dtype) * v).unflatten(1, (groups, -1)).mean(2) for v in (level, slope))
    level_, slope_ = _by_channel(*through, like=weight)
    factor = -inverse.square() * slope_
    rest = -torch.addcmul(inverse * level_, factor, mean)

    def dx(x: Tensor, g: Tensor, scale: Tensor, factor: Tensor, rest: Tensor) -> Tensor:
        y = torch.addcmul(rest[:, :, None], x.to(dtype), factor[:, :, None])
        add = y.addcmul if torch.is_grad_enabled() else y.addcmul_
        return add(g.to(dtype), scale[:, :, None])

    write = dx if x.dtype == dtype else lambda *tensors: write_by_parts(dx, *tensors)
    own = [(x.shape[2] * v.sum(0)).to(weight.dtype) for v in (slope, level)]
    return write(x, grad, scale, factor, rest), *own


class GroupNorm(_ImageNorm):
    """y = weight * (x - mean) / sqrt(var + eps) + bias, over groups of channels of one image.

    Wu & He 2018, arXiv 1803.08494. Input [N, C], [N, C, L] or [N, C, H, W]. The number of groups
    is the largest divisor of C that is at most `num_groups` and leaves each group at least
    `group_size` channels: 32 groups from 128 channels on, as in the paper, and 4, 8, 16 groups
    for the 16, 32, 64 channels of a CIFAR ResNet, where 32 groups would normalize single channels.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_groups: PositiveInt = 32,
        group_size: PositiveInt = 4,
        eps: PositiveFloat = 1e-5,
    ) -> None:
        most = max(1, min(num_groups, channels // group_size))
        super().__init__(max(g for g in range(1, most + 1) if channels % g == 0), channels, eps=eps)


class LayerNorm(_ImageNorm):
    """y = weight * (x - mean) / sqrt(var + eps) + bias, over channels and positions of an image.

    Ba, Kiros & Hinton 2016, arXiv 1607.06450, in its form for convolutions: group normalization
    with one group, weight and bias per channel. Input [N, C], [N, C, L] or [N, C, H, W].
    """

    def __init__(self, channels: int, *, eps: PositiveFloat = 1e-5) -> None:
        super().__init__(1, channels, eps=eps)


class InstanceNorm(_ImageNorm):
    """y = weight * (x - mean) / sqrt(var + eps) + bias, over the positions of one channel.

    Ulyanov, Vedaldi & Lempitsky 2016, arXiv 1607.08022: group normalization with C groups, in
    training and evaluation alike. Input [N, C, L] or [N, C, H, W].

    Raises:
        ValueError: one position an image, which leaves nothing to normalize by.
    """

    def __init__(self, channels: int, *, eps: PositiveFloat = 1e-5) -> None:
        super().__init__(channels, channels, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize each channel of each image."""
        if input.shape[2:].numel() < 2:
            raise ValueError(
                f"expected more than 1 position per image, got input size {list(input.shape)}"
            )
        return super().forward(input)
