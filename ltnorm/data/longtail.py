"""The long tail: class counts, the images that are kept, and groups of classes.

The conventions are those of LDAM-DRW (Cao et al. 2019, arXiv 1906.07413), so that a set made
here holds the same images as the one behind most published CIFAR-LT numbers.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ltnorm.errors import UsageError

Profile = Literal["exp", "step", "pareto"]
ClassOrder = Literal["label", "reversed", "seeded", "frequency"]
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
    if profile not in get_args(Profile):
        raise UsageError(f"unknown profile '{profile}'", "choose from exp, step, pareto")
    counts = _profile(n_max, num_classes, ratio, profile)
    if empty := counts.count(0):
        raise UsageError(
            f"profile {profile} at ratio {ratio:g} and n_max {n_max} leaves {empty} of "
            f"{num_classes} classes empty",
            f"lower --ratio to at most {n_max}, the images of the largest class",
        )
    return counts


def _profile(n_max: int, num_classes: int, ratio: float, profile: Profile) -> list[int]:
    """The counts of a profile, which may leave classes empty."""
    ranks = [i / (num_classes - 1) for i in range(num_classes)]
    if profile == "step":
        half = num_classes // 2
        return [int(n_max)] * half + [_truncate(n_max / ratio)] * (num_classes - half)
    if profile == "pareto":
        return [_truncate(n_max * (1 + t * (ratio ** (1 / 6) - 1)) ** -6) for t in ranks]
    return [_truncate(n_max * (1 / ratio) ** t) for t in ranks]


def largest_n_max(available: Sequence[int], ratio: float, profile: Profile = "exp") -> int:
    """The largest n_max of a profile for which the data has enough images.

    `available` are the images of each class by frequency rank, the head first. Where all classes
    have as many, that is their number.
    """

    def fits(n_max: int) -> bool:
        counts = _profile(n_max, len(available), ratio, profile)
        return all(n <= most for n, most in zip(counts, available, strict=True))

    return bisect_left(range(1, available[0] + 1), True, key=lambda n_max: not fits(n_max))


def _truncate(x: float) -> int:
    """int(x), but 49.999999999 is 50: a rounding error must not cost an image of the tail."""
    return int(x * (1 + 1e-9))


def class_ranks(
    sizes: Sequence[int], order: ClassOrder = "label", data_seed: int = 0
) -> np.ndarray:
    """The frequency rank of each class, [C]: 0 is the head. `sizes` are their images.

    By convention rank and label are the same; `reversed` and `seeded` untie the tail from
    particular classes. `frequency` makes the class of most images the head.
    """
    num_classes = len(sizes)
    if order == "frequency":
        ranks = np.empty(num_classes, np.int64)
        ranks[_frequency_order(sizes)] = np.arange(num_classes)
        return ranks
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
    ratio: float | None,
    *,
    profile: Profile | Literal["natural"] = "exp",
    n_max: int | None = None,
    val: int = 0,
    order: ClassOrder = "label",
    data_seed: int = 0,
) -> Subset:
    """Choose the training images of a long-tailed set, and `val` held-out images a class.

    One legacy numpy RandomState(data_seed) shuffles the indices of each class, in label order;
    the last `val` are held out, then the first n_i are kept. So the sets of one data_seed are
    nested across ratios, and with val = 0 they are LDAM-DRW's. `natural` keeps all, as they come.

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
            f"--val can be at most {smallest - 1}" if smallest > 1 else "leave out --val",
        )
    left = [len(indices) - val for indices in shuffled]
    if profile == "natural":
        kept = [np.sort(s[:n]) for s, n in zip(shuffled, left, strict=True)]
        counts = left
    else:
        assert ratio is not None
        counts = _imposed(left, ratio, profile, n_max, class_ranks(left, order, data_seed))
        kept = [s[:n] for s, n in zip(shuffled, counts, strict=True)]
    return Subset(
        train=np.concatenate(kept),
        val=np.concatenate([s[len(s) - val :] for s in shuffled]),
        counts=counts,
    )


def _imposed(
    left: list[int], ratio: float, profile: Profile, n_max: int | None, ranks: np.ndarray
) -> list[int]:
    """The images of each class under a profile; `left` are those that there are."""
    available = [left[label] for label in np.argsort(ranks)]
    most = largest_n_max(available, ratio, profile) if len(left) > 1 and ratio >= 1 else left[0]
    if n_max is not None and n_max > most:
        raise UsageError(
            f"n_max {n_max} is more than the data has at this ratio: {most}",
            f"--n-max can be at most {most}; leave it out to use all",
        )
    by_rank = long_tail_counts(n_max or most, len(left), ratio, profile)
    return [by_rank[rank] for rank in ranks]


def split_test(
    labels: np.ndarray, num_classes: int, per_class: int | None = None, data_seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Split a test set off a data set that has none: the indices of the rest, and of the test set.

    As many test images a class, `per_class`, by default a fifth of the median class; but never
    more than half of a class, so that each keeps a training image. Which ones follows from
    `data_seed`.
    """
    sizes = np.bincount(labels, minlength=num_classes)
    wanted = per_class or max(1, round(float(np.median(sizes)) / 5))
    # Another stream than that of `choose`, which shuffles what is left.
    generator = np.random.RandomState([data_seed, 1])
    held = [
        generator.permutation(np.flatnonzero(labels == label))[: min(wanted, size // 2)]
        for label, size in enumerate(sizes)
    ]
    test = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), test), test


def _frequency_order(counts: Sequence[int]) -> np.ndarray:
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
