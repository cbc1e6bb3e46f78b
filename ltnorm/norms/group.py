"""Norms over the channels and positions of one image, by torch's own layers: nothing is shared
between images, and evaluation is as training."""

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ltnorm.norms.layer import Versioned, check_input


class _ImageNorm(Versioned, nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        """Normalize each image."""
        check_input(self, input, self.num_channels)
        return super().forward(input)


class GroupNorm(_ImageNorm):
    """y = weight * (x - mean) / sqrt(var + eps) + bias, over groups of channels of one image.

    Wu & He 2018, arXiv 1803.08494. Input [N, C], [N, C, L] or [N, C, H, W]. The number of groups
    is the largest divisor of C that is at most `num_groups` and leaves each group at least
    `group_size` channels: 32 groups from 128 channels on, as in the paper, and 4, 8, 16 groups
    for the 16, 32, 64 channels of a CIFAR ResNet, where 32 groups would normalize single channels.
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


class LayerNorm(_ImageNorm):
    """y = weight * (x - mean) / sqrt(var + eps) + bias, over channels and positions of an image.

    Ba, Kiros & Hinton 2016, arXiv 1607.06450, in its form for convolutions: group normalization
    with one group, weight and bias per channel. Input [N, C], [N, C, L] or [N, C, H, W].
    """

    def __init__(self, channels: int, *, eps: PositiveFloat = 1e-5) -> None:
        super().__init__(1, channels, eps=eps)


class InstanceNorm(_ImageNorm):
    """y = weight * (x - mean) / sqrt(var + eps) + bias, over the positions of one channel.

    Ulyanov, Vedaldi & Lempitsky 2016, arXiv 1607.08022: group normalization with C groups, in
    training and evaluation alike. Input [N, C, L] or [N, C, H, W].

    Raises:
        ValueError: one position an image, which leaves nothing to normalize by.
    """

    def __init__(self, channels: int, *, eps: PositiveFloat = 1e-5) -> None:
        super().__init__(channels, channels, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize each channel of each image."""
        if input.shape[2:].numel() < 2:
            raise ValueError(
                f"expected more than 1 position per image, got input size {list(input.shape)}"
            )
        return super().forward(input)
