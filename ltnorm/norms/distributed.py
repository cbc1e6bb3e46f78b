"""Batch statistics of all ranks together, under torch.distributed."""

import torch
import torch.distributed as dist
from torch import Tensor


def synchronized(enabled: bool) -> bool:
    """Whether statistics are to be summed: asked for, and there is more than one rank."""
    return enabled and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def sum_over_ranks(t: Tensor) -> Tensor:
    """The sum of `t` over all ranks; one all-reduce, without gradient."""
    total = t.detach().clone()
    dist.all_reduce(total)
    return total


@torch.no_grad()
def sums_over_ranks(
    count: Tensor, first: Tensor, second: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts [K] and sums [K, C] of x - shift and its square, over all ranks.

    Each rank has a shift of its own, so the sums travel around 0; float64 keeps the digits that
    float32 would lose there.
    """
    s, n = shift.double(), count.double()[:, None]
    raw_first = first.double() + n * s
    raw_second = second.double() + s * (2 * first.double() + n * s)
    packed = sum_over_ranks(torch.cat([n, raw_first, raw_second], dim=1))
    n, raw_first, raw_second = packed.split([1, *[first.shape[1]] * 2], dim=1)
    around = (n[:, 0], raw_first - n * s, raw_second - s * (2 * raw_first - n * s))
    return tuple(t.to(first.dtype) for t in around)  # type: ignore[return-value]
