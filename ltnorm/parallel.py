"""A batch over the ranks of torch.distributed: each computes on images of its own.

All ranks know the whole batch's labels, and have its loss. Of N images rank r of R has those that
`Tensor.tensor_split(R)` gives it: the first N mod R ranks have one more. In a single process all
of this is nothing.
"""

from collections.abc import Iterable
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ltnorm.errors import UsageError


def world_size() -> int:
    """How many ranks there are; 1 outside of torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 outside of torch.distributed."""
    return dist.get_rank() if world_size() > 1 else 0


def rows(count: int) -> slice:
    """Which of `count` images are this rank's."""
    ranks, mine = world_size(), rank()
    sizes = [count // ranks + (r < count % ranks) for r in range(ranks)]
    start = list(accumulate(sizes, initial=0))[mine]
    return slice(start, start + sizes[mine])


def own(whole: Tensor) -> Tensor:
    """The part of this rank, of something with a row for each image of the batch."""
    return whole if world_size() == 1 else whole[rows(len(whole))]


def whole(own: Tensor, count: int) -> Tensor:
    """The rows of all ranks, `count` of them. Gradient flows to this rank's own alone.

    So each rank can compute the loss of the whole batch, and the sum of the ranks' gradients is
    its gradient. Half precision comes back as float32.
    """
    if world_size() == 1:
        return own
    if own.is_floating_point():  # not every backend adds half precision
        own = own.to(torch.promote_types(own.dtype, torch.float32))
    mine = rows(count)
    gathered = own.new_zeros(count, *own.shape[1:])
    gathered[mine] = own.detach()
    dist.all_reduce(gathered)  # of one number and zeros: exact, and the parts may differ in size
    return torch.cat([gathered[: mine.start], own, gathered[mine.stop :]])


@torch.no_grad()
def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Make the gradients of all ranks those of the whole batch, in one message.

    torch's DistributedDataParallel would send while it still computes. But it imports torch's
    compiler, which takes longer than a short run; it fails where a weight has no gradient; and it
    adds up in an order that it changes after the first step, so that with more than two ranks a
    resumed run would not repeat the digits of one that was not interrupted.
    """
    if world_size() > 1:
        _exchange([p.grad for p in parameters if p.grad is not None])


@torch.no_grad()
def as_first(tensors: Iterable[Tensor]) -> None:
    """Make tensors the same on all ranks, to the bit: those of rank 0."""
    if world_size() > 1:
        tensors = list(tensors)
        if rank() > 0:
            torch._foreach_zero_(tensors)
        _exchange(tensors)


def _exchange(tensors: list[Tensor]) -> None:
    """Replace tensors by their sums over the ranks."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        alike = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in alike])
        dist.all_reduce(flat)
        parts = flat.split([t.numel() for t in alike])
        for tensor, part in zip(alike, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def check_batches(images: int, batch_size: int) -> None:
    """Raises UsageError where a batch of an epoch of `images` has fewer of them than ranks."""
    ranks = world_size()

    def fits(size: int) -> bool:
        rest = images % size
        return size >= ranks and (rest < 2 or rest >= ranks)  # a batch of one is dropped

    if fits(batch_size):
        return
    last = min(batch_size, images % batch_size)
    near = [s for s in range(ranks, images + 1) if fits(s)]
    which = f"the last batch of {images} images has {last}"
    if batch_size < ranks:
        which = f"a batch has {batch_size}"
    raise UsageError(
        f"batch size {batch_size}: {which}, which {ranks} processes cannot share",
        f"take --batch-size {min(near, key=lambda s: abs(s - batch_size))}",
    )
