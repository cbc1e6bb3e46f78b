"""Group normalization: torch's own layer, with the number of groups chosen for narrow layers."""

from pydantic import PositiveFloat, PositiveInt
from torch import nn


class GroupNorm(nn.GroupNorm):
    """y = weight * (x - mean) / sqrt(var + eps) + bias, over groups of channels of one image.

    Wu & He 2018, arXiv 1803.08494. Input [N, C, H, W]. The number of groups is the largest
    divisor of C that is at most `num_groups` and leaves each group at least `group_size`
    channels: 32 groups from 128 channels on, as in the paper, and 4, 8, 16 groups for the 16,
    32, 64 channels of a CIFAR ResNet, where 32 groups would normalize single channels.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_groups: PositiveInt = 32,
        group_size: PositiveInt = 4,
        eps: PositiveFloat = 1e-5,
    ) -> None:
        most = max(1, min(num_groups, channels // group_size))
        super().__init__(max(g for g in range(1, most + 1) if channels % g == 0), channels, eps=eps)
