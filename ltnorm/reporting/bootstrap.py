"""What the choice of test images adds: a bootstrap over images, given the trained networks.

It answers another question than the interval over seeds (other images, the same networks; not
other networks, the same images), so the two are never mixed.
"""

import functools
import io
import math
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ltnorm.errors import LtnormError
from ltnorm.reporting.statistics import CONFIDENCE

RESAMPLES = 2000
DIGITS = 4  # of an interval: draws are in single precision
LARGE_CLASS = 2000  # images; the draws of all of them would take gigabytes

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
        # Read whole: an archive is opened by a dozen small reads, and np.load has more.
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            labels, predicted = (archive.read(f"{name}.npy") for name in ("label", "prediction"))
        labels, predicted = _labels(labels), _array(predicted)
    except Exception as error:  # of damaged content, the parsers raise many kinds
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise _damaged(path, reason.splitlines()[0].strip("'\"")) from error
    if labels.ndim != 1 or labels.shape != predicted.shape:
        raise _damaged(path, f"label {labels.shape} and prediction {predicted.shape} do not match")
    integers = all(np.can_cast(array.dtype, np.int64) for array in (labels, predicted))
    if not integers or (labels < 0).any():
        raise _damaged(path, "labels and predictions must be class numbers from 0")
    return Predictions(labels, labels == predicted)


def _array(content: bytes) -> np.ndarray:
    """The array of a .npy file; most time would go into its header, of which runs share theirs."""
    end = 10 + int.from_bytes(content[8:10], "little")
    dtype, shape = _header(content[:end])
    return np.frombuffer(content, dtype, offset=end).reshape(shape)


@functools.lru_cache(maxsize=64)
def _header(content: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array of another format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("objects are not read")
    return dtype, shape


@functools.lru_cache(maxsize=8)
def _labels(content: bytes) -> np.ndarray:
    """Labels, which the runs of a data set share: an array once, which nobody changes."""
    labels = _array(content)
    labels.setflags(write=False)
    return labels


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


@dataclass(frozen=True, eq=False)
class Contrast:
    """What is compared: one metric of two settings.

    Attributes:
        ours: the runs of a setting, at least one.
        theirs: those of the reference, not necessarily as many.
        ours_weights, theirs_weights: [C], as of `class_weights`; they differ where groups do.
    """

    ours: Sequence[Predictions]
    theirs: Sequence[Predictions]
    ours_weights: np.ndarray
    theirs_weights: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """int [N], of all runs if it `is_possible`."""
        return self.ours[0].labels

    def is_possible(self) -> bool:
        """Whether all runs are of the same images, two or more of each class that counts."""
        runs = [*self.ours, *self.theirs]
        if not all(np.array_equal(self.labels, run.labels) for run in runs):
            return False
        sides = (self.ours_weights, self.theirs_weights)
        images = np.bincount(self.labels, minlength=len(sides[0]))
        enough = images > 1  # one image has no spread
        return len(images) == len(sides[0]) and all(w.any() and enough[w != 0].all() for w in sides)

    def values(self) -> np.ndarray:
        """Points of each image, [N], such that the sum over classes of their means is the delta."""
        ours = self.ours_weights[self.labels] * _share_right(self.ours)
        return 100 * (ours - self.theirs_weights[self.labels] * _share_right(self.theirs))


def intervals(
    contrasts: Sequence[Contrast], resamples: int = RESAMPLES, seed: int = 0
) -> list[Interval | None]:
    """Percentile intervals of differences in accuracy, in points (Efron & Tibshirani 1993, ch. 13).

    The statistic is 100 sum_c (w_c a_c - w'_c a'_c), a_c the mean over the images of class c of
    the share of our runs that are right, primes for theirs. Images are drawn with replacement
    within each class, the same for both sides, so that what makes an image hard for both cancels.

    Contrasts on the same images share the draws, which take most of the time: give all at once.

    Args:
        contrasts: on any images.
        resamples: draws of a test set.
        seed: of the draws: the same contrasts have the same intervals.

    Returns:
        One a contrast; None where the runs are not of the same images, a class that counts has no
        image, or no class counts.
    """
    sets = defaultdict(list)
    for i, contrast in enumerate(contrasts):
        if contrast.is_possible():
            sets[contrast.labels.tobytes()].append(i)
    found: list[Interval | None] = [None] * len(contrasts)
    tail = 50 * (1 - CONFIDENCE)
    for members in sets.values():
        values = np.column_stack([contrasts[i].values().astype(np.float32) for i in members])
        drawn = _drawn(contrasts[members[0]].labels, values, resamples, seed)
        ends = np.percentile(drawn, [tail, 100 - tail], axis=0).T.tolist()
        for i, (low, high) in zip(members, ends, strict=True):
            found[i] = round(low, DIGITS), round(high, DIGITS)
    return found


def interval(
    ours: Sequence[Predictions],
    theirs: Sequence[Predictions],
    ours_weights: np.ndarray,
    theirs_weights: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """`intervals` of a single contrast."""
    contrast = Contrast(ours, theirs, ours_weights, theirs_weights)
    return intervals([contrast], resamples, seed)[0]


def _share_right(runs: Sequence[Predictions]) -> np.ndarray:
    return np.mean([run.correct for run in runs], axis=0)


def _drawn(labels: np.ndarray, values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums over classes of the means of `values` [N, K] over drawn images, [resamples, K]."""
    sums = np.zeros((resamples, values.shape[1]))
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    for c, images in enumerate(by_class):
        if values[images].any():  # else the class counts for nothing
            means = _means if len(images) <= LARGE_CLASS else _means_of_many
            # Draws of its own for each class: a column does not depend on what the others skip.
            drawn, n = means(values[images], resamples, [seed, c]), len(images)
            centre = values[images].mean(axis=0)
            # The variance of n draws is that of the class times (n - 1) / n: too little for few.
            sums += centre + (drawn - centre) * math.sqrt(n / max(n - 1, 1))
    return sums


def _means(values: np.ndarray, resamples: int, seed: Sequence[int]) -> np.ndarray:
    """Means of `values` [n, K] over n rows drawn with replacement, [resamples, K]."""
    n = len(values)
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n), dtype=np.uint16)
    # How often each image is in each draw: then the means of all columns are one matrix product.
    places = drawn + np.arange(0, resamples * n, n)[:, None]
    times = np.bincount(places.ravel(), minlength=resamples * n).reshape(resamples, n)
    return times.astype(np.float32) @ (values / n)


def _means_of_many(values: np.ndarray, resamples: int, seed: Sequence[int]) -> np.ndarray:
    """The same, in distribution, column by column.

    With few runs there are few distinct values: it is enough to draw how often each one is.
    """
    n = len(values)
    columns = []
    for column in values.T:
        kinds, counts = np.unique(column, return_counts=True)
        generator = np.random.default_rng(seed)
        columns.append(generator.multinomial(n, counts / n, size=resamples) @ kinds / n)
    return np.column_stack(columns)
