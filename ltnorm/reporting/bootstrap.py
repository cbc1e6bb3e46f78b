"""What the choice of test images adds: a bootstrap over images, given the trained networks.

It answers another question than the interval over seeds (other images, the same networks; not
other networks, the same images), so the two are never mixed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ltnorm.errors import LtnormError
from ltnorm.reporting.statistics import CONFIDENCE

RESAMPLES = 2000
# Up to here a pair of images of a class has a number of 16 bits, the quickest to draw.
SMALL_CLASS = 256

Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Predictions:
    """Of one run.

    Attributes:
        labels: int [N], in the order of the split.
        correct: bool [N], whether an image was classified right.
    """

    labels: np.ndarray
    correct: np.ndarray


def read(path: Path) -> Predictions:
    """Read the predictions.npz of a run.

    Raises:
        LtnormError: not readable, damaged, or without the arrays `label` and `prediction`.
    """
    try:
        arrays = np.load(path, allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with arrays:
            labels, predicted = (np.asarray(arrays[key]) for key in ("label", "prediction"))
    except Exception as error:  # of damaged content, numpy passes on what its parsers raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise _damaged(path, reason.splitlines()[0].strip("'\"")) from error
    if labels.ndim != 1 or labels.shape != predicted.shape:
        raise _damaged(path, f"label {labels.shape} and prediction {predicted.shape} do not match")
    integers = all(np.can_cast(array.dtype, np.int64) for array in (labels, predicted))
    if not integers or (labels < 0).any():
        raise _damaged(path, "labels and predictions must be class numbers from 0")
    return Predictions(labels, labels == predicted)


def _damaged(path: Path, reason: str) -> LtnormError:
    return LtnormError(
        f"{path} is not a readable file of predictions: {reason}",
        "delete it (the interval over test images is then left out), or repeat the run",
    )


def class_weights(metric: str, groups: Sequence[str], labels: np.ndarray) -> np.ndarray | None:
    """The weights of the classes' accuracies in a metric, [C], of sum 1.

    All images count the same in `all`, all classes that have images in a group.

    Args:
        metric: all, or a name in `groups`.
        groups: [C], the group of each class.
        labels: int [N], below C.

    Returns:
        None where no image counts, as in an empty group.
    """
    images = np.bincount(labels, minlength=len(groups))
    counted = images if metric == "all" else (images > 0) & (np.array(groups) == metric)
    return counted / counted.sum() if counted.any() else None


def interval(
    ours: Sequence[Predictions],
    theirs: Sequence[Predictions],
    ours_weights: np.ndarray,
    theirs_weights: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """`intervals` of one metric: weights [C] instead of [M, C]."""
    found = intervals(
        ours, theirs, ours_weights[None], theirs_weights[None], resamples=resamples, seed=seed
    )
    return found and found[0]


def intervals(
    ours: Sequence[Predictions],
    theirs: Sequence[Predictions],
    ours_weights: np.ndarray,
    theirs_weights: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval] | None:
    """Percentile intervals of differences in accuracy, in points (Efron & Tibshirani 1993, ch. 13).

    The statistic is 100 sum_c (w_c a_c - w'_c a'_c), a_c the mean over the images of class c of
    the share of our runs that are right, primes for theirs. Images are drawn with replacement
    within each class, the same for both sides, so that what makes an image hard for both cancels.

    Args:
        ours: the runs of a setting, at least one.
        theirs: those of the reference, not necessarily as many.
        ours_weights, theirs_weights: [M, C], one row a metric; they differ where the groups do.
        resamples: draws of the test set.
        seed: of the draws: the same input has the same interval.

    Returns:
        One interval a metric; None where the runs were not evaluated on the same images, a class
        that counts has no image, or no class counts in a metric.
    """
    labels = ours[0].labels
    if not all(np.array_equal(labels, run.labels) for run in [*ours, *theirs]):
        return None
    weights = np.stack([ours_weights, theirs_weights]).astype(float)  # [side, metric, class]
    images = np.bincount(labels, minlength=weights.shape[2])
    counts = weights.any(axis=(0, 1))
    if len(images) != len(counts) or not images[counts].all() or not weights.any(axis=2).all():
        return None
    right = np.stack([_share_right(ours), -_share_right(theirs)])
    if np.array_equal(ours_weights, theirs_weights):  # then only the difference matters
        right, weights = right.sum(0, keepdims=True), weights[:1]
    generator = np.random.default_rng(seed)
    drawn = np.zeros((weights.shape[1], resamples))
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(images)[:-1])
    for c in np.flatnonzero(counts):
        drawn += weights[:, :, c].T @ _means(right[:, by_class[c]], resamples, generator)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(100 * drawn, [tail, 100 - tail], axis=1).tolist()
    return list(zip(low, high, strict=True))


def _share_right(runs: Sequence[Predictions]) -> np.ndarray:
    return np.mean([run.correct for run in runs], axis=0)


def _means(values: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Means over n images drawn with replacement, [S, resamples], of their values [S, n]."""
    n = values.shape[1]
    if n > SMALL_CLASS:
        # Few values are distinct, as there are few seeds: it is enough to draw how often each is.
        kinds, counts = np.unique(values, axis=1, return_counts=True)
        return kinds @ generator.multinomial(n, counts / n, size=resamples).T / n
    # Two images at a time, from the table of all pairs: that halves the random numbers.
    pairs = (values[:, :, None] + values[:, None, :]).reshape(len(values), n * n)
    drawn = generator.integers(n * n, size=(n // 2, resamples), dtype=np.uint16)
    sums = pairs.take(drawn, axis=1).sum(1)
    if n % 2:
        sums += values.take(generator.integers(n, size=resamples), axis=1)
    return sums / n
