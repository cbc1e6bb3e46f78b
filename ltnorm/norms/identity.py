"""No normalization: what a network does without."""

import torch
from torch import Tensor, nn

from ltnorm.norms.functional import accumulation_dtype
from ltnorm.norms.layer import ChannelNorm


class Identity(ChannelNorm):
    """y = weight * x + bias, per channel; with affine off, y = x.

    The control: it shows what normalization itself is worth. Deep networks may need a lower
    learning rate to train without it.
    """

    needs_batch = False

    def __init__(self, channels: int, *, affine: bool = True) -> None:
        super().__init__(channels, sync=False)
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def _train(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return x
        dtype = accumulation_dtype(x.dtype)
        weight, bias = (p.to(dtype)[:, None] for p in (self.weight, self.bias))
        return (x.to(dtype) * weight + bias).to(x.dtype)

    _evaluate = _train

    def as_affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias [C]: ones and zeros without them."""
        ones = torch.ones(self.channels, dtype=dtype)
        if self.weight is None:
            return ones, torch.zeros_like(ones)
        return self.weight.to(dtype), self.bias.to(dtype)

    def extra_repr(self) -> str:
        """Channels and whether there is a weight and a bias."""
        return f"{self.channels}, affine={self.weight is not None}"
