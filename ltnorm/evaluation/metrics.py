"""Metrics: pure functions of logits [N, C], labels [N] and groups [C]. Accuracies in percent.

A class without images and a group without classes have no accuracy: NaN and None, never 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ltnorm.data.longtail import GROUP_NAMES


@dataclass(frozen=True)
class Metrics:
    """All metrics of one evaluation. `groups` maps head, medium, tail to percent or None."""

    accuracy: float
    groups: dict[str, float | None]
    macro_f1: float
    gmean: float
    worst_class: float
    nll: float
    ece: float
    per_class: list[float | None]
    images_per_class: list[int]


def class_accuracy(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Percent of each class's images that are classified right, [C]; NaN without images."""
    total = torch.bincount(labels, minlength=num_classes).double()
    right = torch.bincount(labels[predicted == labels], minlength=num_classes).double()
    return 100 * right / total


def group_accuracy(per_class: Tensor, groups: Sequence[str]) -> dict[str, float | None]:
    """The unweighted mean of the class accuracies of each group; None for an empty group."""
    means = {}
    for name in GROUP_NAMES:
        member = torch.tensor([g == name for g in groups]) & ~per_class.isnan()
        means[name] = float(per_class[member].mean()) if member.any() else None
    return means


def macro_f1(predicted: Tensor, labels: Tensor, num_classes: int) -> float:
    """The mean over classes of 2 TP / (2 TP + FP + FN), in percent; 0 for a class never right."""
    true = torch.bincount(labels, minlength=num_classes).double()
    said = torch.bincount(predicted, minlength=num_classes).double()
    right = torch.bincount(labels[predicted == labels], minlength=num_classes).double()
    seen = true + said > 0
    return float(100 * (2 * right / (true + said))[seen].mean())


def geometric_mean(per_class: Tensor) -> float:
    """The geometric mean of the class accuracies, in percent; 0 if one class is never right."""
    present = per_class[~per_class.isnan()]
    return float(present.log().mean().exp())


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """sum_b |B_b| / N * |accuracy(B_b) - confidence(B_b)| over equal-width bins, in percent.

    Guo et al. 2017, arXiv 1706.04599.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    gap = (predicted == labels).double() - confidence
    # Bins are half-open from below, (0, 1/15], so that a confidence of 1 has one.
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    per_bin = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, gap)
    return float(100 * per_bin.abs().sum() / len(labels))


def evaluate(logits: Tensor, labels: Tensor, groups: Sequence[str]) -> Metrics:
    """All metrics of logits [N, C] with labels int64 [N] and the report group of each class."""
    num_classes = logits.shape[1]
    predicted = logits.argmax(1)
    per_class = class_accuracy(predicted, labels, num_classes)
    return Metrics(
        accuracy=float(100 * (predicted == labels).double().mean()),
        groups=group_accuracy(per_class, groups),
        macro_f1=macro_f1(predicted, labels, num_classes),
        gmean=geometric_mean(per_class),
        worst_class=float(per_class[~per_class.isnan()].min()),
        nll=float(F.cross_entropy(logits.double(), labels)),
        ece=expected_calibration_error(logits, labels),
        per_class=[None if v != v else v for v in per_class.tolist()],
        images_per_class=torch.bincount(labels, minlength=num_classes).tolist(),
    )
