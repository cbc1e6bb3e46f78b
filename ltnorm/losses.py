"""Training losses, built from class counts."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ltnorm import registry


def build(name: str, class_counts: Sequence[int], **options: Any) -> nn.Module:
    """Build the loss `name` of the registry: a module (logits [N, C], labels [N]) -> scalar.

    Args:
        name: see `ltnorm list losses`.
        class_counts: training images a class, [C].

    Raises:
        UsageError: no such loss.
    """
    return registry.load(registry.lookup("loss", name).target)(class_counts, **options)


class CrossEntropy(nn.Module):
    """L = -log softmax(logits)[label], the mean over the batch."""

    def __init__(self, class_counts: Sequence[int]) -> None:
        super().__init__()

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [N, C], labels int64 [N] -> scalar."""
        return F.cross_entropy(logits, labels)
