"""Samplers: how often each class comes in an epoch, and the draw of the images that make it so.

A sampler is a function (class_counts, progress, *, options) -> q, the probability of each class,
float64 [C] that sums to 1; progress is the part of training that is done, 0 .. 1. Within a class
all images are alike.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ltnorm import registry

Sampler = Callable[[float], np.ndarray]


def build(name: str, class_counts: Sequence[int], **options: Any) -> Sampler | None:
    """The sampler `name` of the registry as a function progress -> q, float64 [C].

    None for "instance": it is no draw but an order (see `Loader`).

    Args:
        name: see `ltnorm.registry.SAMPLERS`.
        class_counts: training images a class, [C].

    Raises:
        UsageError: no such sampler.
    """
    target = registry.lookup("sampler", name).target
    if registry.load(target) is instance:
        return None
    return partial(registry.load(target), class_counts, **options)


def instance(class_counts: Sequence[int], progress: float) -> np.ndarray:
    """q_j = n_j / N: every image alike, which is the data as it is."""
    return _normalized(np.array(class_counts, float))


def balanced(class_counts: Sequence[int], progress: float) -> np.ndarray:
    """q_j = 1 / C: every class alike."""
    return _normalized(np.ones(len(class_counts)))


def sqrt(class_counts: Sequence[int], progress: float) -> np.ndarray:
    """q_j ~ sqrt(n_j): half-way between the two, in logarithms."""
    return _normalized(np.sqrt(class_counts))


def progressive(class_counts: Sequence[int], progress: float) -> np.ndarray:
    """q_j = (1 - t) n_j / N + t / C, t the progress: from the data as it is to balanced classes.

    Kang et al. 2020, arXiv 1910.09217.
    """
    start, end = (of(class_counts, progress) for of in (instance, balanced))
    return (1 - progress) * start + progress * end


def effective(
    class_counts: Sequence[int],
    progress: float,
    *,
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9999,
) -> np.ndarray:
    """q_j ~ n_j (1 - beta) / (1 - beta^n_j): an image counts one over its class's effective number.

    beta = 0 is the data as it is, beta -> 1 balances the classes. Cui et al. 2019,
    arXiv 1901.05555.
    """
    counts = np.array(class_counts, float)
    # 1 - beta^n, without cancellation.
    with np.errstate(divide="ignore"):  # at beta = 0 the logarithm is minus infinity, as it should
        return _normalized(counts / -np.expm1(counts * np.log1p(beta - 1)))


def _normalized(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def draw(labels: Tensor, probability: np.ndarray, generator: torch.Generator) -> Tensor:
    """An epoch of as many draws as there are images, N q_j of them from class j.

    Systematic sampling, with one uniform offset u for all classes: class j is drawn
    floor(N (q_0 + .. + q_j) + u) - floor(N (q_0 + .. + q_{j-1}) + u) times, which is N q_j
    rounded up or down, and N q_j in expectation. Its images come in whole rounds, and a random
    part of them once more, so that no image is drawn twice more than another of its class.

    Args:
        labels: int64 [N] on the CPU, each of 0 .. C - 1 among them.
        probability: q, float64 [C].
        generator: of the CPU.

    Returns:
        Indices int64 [N], in random order.

    Raises:
        ValueError: a class without images.
    """
    count = len(labels)
    sizes = torch.bincount(labels, minlength=len(probability))
    if not sizes.all():
        raise ValueError(f"class {int(sizes.argmin())} has no images to draw from")
    share = np.cumsum(probability)
    # Rounded, so that what is whole stays whole; u has 24 bits, so that N + u is exact.
    edges = (count * share / share[-1]).round(9) + float(torch.rand((), generator=generator))
    draws = torch.from_numpy(np.diff(np.floor(edges), prepend=0).astype(np.int64))

    shuffled = torch.randperm(count, generator=generator)
    labels, order = labels[shuffled].sort(stable=True)
    images, starts = shuffled[order], sizes.cumsum(0) - sizes  # class by class, each shuffled
    once_more = torch.arange(count) - starts[labels] < (draws % sizes)[labels]
    drawn = images.repeat_interleave((draws // sizes)[labels] + once_more)
    return drawn[torch.randperm(count, generator=generator)]
