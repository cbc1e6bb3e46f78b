"""Steps as replays of a CUDA graph: one launch for all kernels of a step.

Of a small network the launches take longer than the kernels. A graph has them all; that of
several trainings has a branch for each, and a GPU runs branches beside each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ltnorm.data.augment import Batch
from ltnorm.training.loop import Update

# Steps that are made as they are before one is captured: libraries choose and allocate in them.
WARM_UP = 3


def capture(make: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """What repeats `make`, which is not carried out by this, with the values there are then."""
    graph = torch.cuda.CUDAGraph()
    # Threads that read images may allocate meanwhile: that is no part of the step.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        losses = make()

    def repeat() -> list[Tensor]:
        graph.replay()
        return losses

    return repeat


@dataclass(frozen=True)
class _Captured:
    """A step of some trainings, with the places that it reads its batches from."""

    updates: Sequence[Update]
    repeat: Callable[[], list[Tensor]]


class Graphs:
    """Makes steps of trainings at once, from the WARM_UP-th on by replaying them.

    Batches that are not whole are rare, and made as they are. A graph is captured anew where a
    training has ended.
    """

    def __init__(self) -> None:
        self._captured: _Captured | None = None
        self._warm: list[int] = []  # the trainings that are captured next
        self._steps = 0

    def make(self, updates: Sequence[Update]) -> list[Tensor]:
        """A step of each. Returns their losses."""
        for update in updates:
            update.optimizer.rate_on_device()
        if any(len(u.batch.labels) < u.train.images_per_step for u in updates):
            return [update.make() for update in updates]
        if (who := [id(update.objective) for update in updates]) != self._warm:
            self._captured, self._warm, self._steps = None, who, 0
        if self._steps < WARM_UP:
            self._steps += 1
            return _beside(updates)
        if self._captured is None:
            static = [replace(u, batch=_like(u.batch)) for u in updates]
            self._captured = _Captured(static, capture(lambda: _beside(static)))
        for mine, theirs in zip(self._captured.updates, updates, strict=True):
            mine.batch.images.copy_(theirs.batch.images)
            mine.batch.labels.copy_(theirs.batch.labels)
        return [loss.clone() for loss in self._captured.repeat()]


def _like(batch: Batch) -> Batch:
    """A place for batches such as this one."""
    return Batch(torch.empty_like(batch.images), torch.empty_like(batch.labels))


def _beside(updates: Sequence[Update]) -> list[Tensor]:
    """The steps, each on a stream of its own."""
    if updates[0].batch.images.device.type != "cuda":
        return [update.make() for update in updates]
    main, losses = torch.cuda.current_stream(), []
    streams = [torch.cuda.Stream() for _ in updates]
    for stream, update in zip(streams, updates, strict=True):
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            losses.append(update.make())
    for stream in streams:
        main.wait_stream(stream)
    return losses
