"""The long tail: class counts, the images that are kept, and groups of classes.

The conventions are those of LDAM-DRW (Cao et al. 2019, arXiv 1906.07413), so that a set made
here holds the same images as the one behind most published CIFAR-LT numbers.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ltnorm.errors import UsageError

Profile = Literal["exp", "step", "pareto"]
ClassOrder = Literal["label", "reversed", "seeded"]
GroupScheme = Literal["auto", "shots", "thirds"]

GROUP_NAMES = ("head", "medium", "tail")
MANY_SHOT, FEW_SHOT = 100, 20


def long_tail_counts(
    n_max: int, num_classes: int, ratio: float, profile: Profile = "exp"
) -> list[int]:
    """Training images per frequency rank, the head first; n_i for i = 0 .. C - 1.

    exp:     n_i = int(n_max * ratio^(-i / (C - 1)))
    step:    n_max for the first half of the classes, int(n_max / ratio) for the second
    pareto:  n_i = int(n_max * (1 + i / (C - 1) * (ratio^(1/6) - 1))^-6)

    `ratio` is n_0 / n_{C-1} before truncation (Cui et al. 2019, arXiv 1901.05555).

    Raises:
        UsageError: ratio < 1, fewer than two classes, or a profile that leaves a class empty.
    """
    if num_classes < 2:
        raise UsageError(f"a long tail needs at least 2 classes, got {num_classes}", "add classes")
    if ratio < 1:
        raise UsageError(
            f"ratio must be at least 1, got {ratio:g}",
            "ratio is the largest class over the smallest",
        )
    ranks = [i / (num_classes - 1) for i in range(num_classes)]
    if profile == "exp":
        counts = [_truncate(n_max * (1 / ratio) ** t) for t in ranks]
    elif profile == "step":
        half = num_classes // 2
        counts = [int(n_max)] * half + [_truncate(n_max / ratio)] * (num_classes - half)
    elif profile == "pareto":
        counts = [_truncate(n_max * (1 + t * (ratio ** (1 / 6) - 1)) ** -6) for t in ranks]
    else:
        raise UsageError(f"unknown profile '{profile}'", "choose from exp, step, pareto")
    if empty := counts.count(0):
        raise UsageError(
            f"profile {profile} at ratio {ratio:g} and n_max {n_max} leaves {empty} of "
            f"{num_classes} classes empty",
            f"lower --ratio to at most {n_max}, the images of the largest class",
        )
    return counts


def _truncate(x: float) -> int:
    """int(x), but 49.999999999 is 50: a rounding error must not cost an image of the tail."""
    return int(x * (1 + 1e-9))


def class_ranks(num_classes: int, order: ClassOrder = "label", data_seed: int = 0) -> np.ndarray:
    """The frequency rank of each class, [C]: 0 is the head.

    By convention rank and label are the same; `reversed` and `seeded` untie the tail from
    particular classes.
    """
    if order == "reversed":
        return np.arange(num_classes)[::-1].copy()
    if order == "seeded":
        return np.random.RandomState(data_seed).permutation(num_classes)
    return np.arange(num_classes)


@dataclass(frozen=True)
class Subset:
    """Which images of the source are kept: indices, in class order within each part."""

    train: np.ndarray
    val: np.ndarray
    counts: list[int]


def choose(
    labels: np.ndarray,
    num_classes: int,
    ratio: float,
    *,
    profile: Profile = "exp",
    n_max: int | None = None,
    val: int = 0,
    order: ClassOrder = "label",
    data_seed: int = 0,
) -> Subset:
    """Choose the training images of a long-tailed set, and `val` held-out images a class.

    One legacy numpy RandomState(data_seed) shuffles the indices of each class, in label order;
    the last `val` are held out, then the first n_i are kept. So the sets of one data_seed are
    nested across ratios, and with val = 0 they are LDAM-DRW's.

    Raises:
        UsageError: n_max or val above what the data has, or a profile with an empty class.
    """
    generator = np.random.RandomState(data_seed)
    shuffled = []
    for label in range(num_classes):
        indices = np.flatnonzero(labels == label)
        generator.shuffle(indices)
        shuffled.append(indices)
    smallest = min(len(indices) for indices in shuffled)
    if val >= smallest:
        raise UsageError(
            f"val {val} leaves no training image: the smallest class has {smallest}",
            f"--val can be at most {smallest - 1}",
        )
    left = smallest - val
    if n_max is not None and n_max > left:
        held = f" after {val} held out for validation" if val else ""
        raise UsageError(
            f"n_max {n_max} is more than the data has: {left} images a class{held}",
            f"--n-max can be at most {left}; leave it out to use all",
        )
    by_rank = long_tail_counts(n_max or left, num_classes, ratio, profile)
    counts = [by_rank[rank] for rank in class_ranks(num_classes, order, data_seed)]
    return Subset(
        train=np.concatenate([s[:n] for s, n in zip(shuffled, counts, strict=True)]),
        val=np.concatenate([s[len(s) - val :] for s in shuffled]),
        counts=counts,
    )


def _frequency_order(counts: list[int]) -> np.ndarray:
    """Classes from the most to the least frequent; equal counts keep their label order."""
    return np.argsort(-np.asarray(counts), kind="stable")


def report_groups(counts: list[int], scheme: GroupScheme = "auto") -> tuple[str, list[str]]:
    """The group ("head", "medium", "tail") of each class, for reporting.

    shots:   many (more than 100 training images), medium (20 to 100), few (fewer than 20)
             (Liu et al. 2019, arXiv 1904.05160); a group can be empty
    thirds:  by frequency rank, head = tail = C // 3 classes
    auto:    shots, or thirds where a shot group would be empty

    Returns:
        The scheme that was used, and one group name a class.
    """
    shots = ["head" if n > MANY_SHOT else "tail" if n < FEW_SHOT else "medium" for n in counts]
    if scheme == "shots" or (scheme == "auto" and set(shots) == set(GROUP_NAMES)):
        return "shots", shots
    third = len(counts) // 3
    groups = ["medium"] * len(counts)
    for rank, label in enumerate(_frequency_order(counts)):
        if rank < third:
            groups[label] = "head"
        elif rank >= len(counts) - third:
            groups[label] = "tail"
    return "thirds", groups


def class_groups(
    counts: list[int], groups: int, scheme: Literal["rank", "images"] = "rank"
) -> list[int]:
    """The group index of each class for the norm layers: 0 holds the most frequent classes.

    rank:    groups of nearly equal numbers of classes, by training frequency
    images:  groups of nearly equal numbers of training images, by training frequency

    These are independent of the groups that are reported.

    Raises:
        UsageError: more groups than classes.
    """
    if groups > len(counts):
        raise UsageError(
            f"norm.components {groups} is more than the {len(counts)} classes",
            f"--set norm.components={len(counts)} is the most here",
        )
    order = _frequency_order(counts)
    if scheme == "rank":
        parts = np.array_split(order, groups)
    else:
        # Cut where the running share of images passes k / groups, at least one class a group.
        share = np.cumsum(np.asarray(counts)[order]) / sum(counts)
        cuts: list[int] = []
        for k in range(1, groups):
            cut = int(np.searchsorted(share, k / groups)) + 1
            lowest = cuts[-1] + 1 if cuts else 1
            cuts.append(min(max(cut, lowest), len(counts) - groups + k))
        parts = np.split(order, cuts)
    index = [0] * len(counts)
    for group, part in enumerate(parts):
        for label in part:
            index[label] = group
    return index
