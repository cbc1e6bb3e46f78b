"""Batch statistics of all ranks together, under torch.distributed."""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from ltnorm.norms.functional import Sums


def synchronized(enabled: bool) -> bool:
    """Whether statistics are to be summed: asked for, and there is more than one rank."""
    return enabled and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def sum_over_ranks(t: Tensor) -> Tensor:
    """The sum of `t` over all ranks; one all-reduce, without gradient."""
    total = t.detach().clone()
    dist.all_reduce(total)
    return total


class _DifferentiableSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return sum_over_ranks(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return sum_over_ranks(grad)


def differentiable_sum(t: Tensor) -> Tensor:
    """The sum of `t` over all ranks; its gradient is what it passes on to all of them."""
    return _DifferentiableSum.apply(t)


@torch.no_grad()
def mean_over_ranks(t: Tensor) -> Tensor:
    """The mean of `t` over all ranks, the same to the bit on each; without gradient."""
    return sum_over_ranks(t) / dist.get_world_size()


@torch.no_grad()
def sums_over_ranks(sums: "Sums", shift: Tensor) -> "Sums":
    """The sums of all ranks together.

    Each rank has a shift of its own, so the sums travel around 0; float64 keeps the digits that
    float32 would lose there.
    """
    count, first, second = (t.double() for t in sums)
    n, s = count[:, None], shift.double()
    packed = torch.cat([n, first + n * s, second + s * (2 * first + n * s)], dim=1)
    n, first, second = sum_over_ranks(packed).split([1, *[len(s)] * 2], dim=1)
    around = (n[:, 0], first - n * s, second - s * (2 * first - n * s))
    return type(sums)(*(t.to(shift.dtype) for t in around))
