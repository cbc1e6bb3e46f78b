"""Batch normalization: torch's own layer."""

from pydantic import PositiveFloat
from torch import nn

from ltnorm.norms.routing import Momentum


class BatchNorm2d(nn.BatchNorm2d):
    """y = weight * (x - mean) / sqrt(var + eps) + bias, per channel over the batch.

    Ioffe & Szegedy 2015, arXiv 1502.03167. Input [N, C, H, W]. This is `torch.nn.BatchNorm2d`;
    evaluation uses moving averages of the batch statistics.
    """

    def __init__(
        self, channels: int, *, momentum: Momentum = 0.1, eps: PositiveFloat = 1e-5
    ) -> None:
        super().__init__(channels, momentum=momentum, eps=eps)
