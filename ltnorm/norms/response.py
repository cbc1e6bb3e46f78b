"""Filter response normalization."""

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from ltnorm.norms.functional import accumulation_dtype
from ltnorm.norms.layer import ChannelNorm


class FilterResponseNorm(ChannelNorm):
    """y = weight * x / sqrt(mean(x^2) + eps) + bias, over the positions of a channel of an image.

    Singh & Krishnan 2020, arXiv 1911.09737. No mean is subtracted and no batch is needed. The
    paper's activation after it is TLU, max(y, tau) with a tau learned per channel in place of
    ReLU; `tlu` adds it to the layer. It is off by default, so that only the normalization
    differs between the networks that are compared: their ReLU stays where it is.

    Args:
        channels: C.
        tlu: end with max(y, tau), tau starting at 0.
        eps: added to the mean square.

    Shapes: input and output [N, C], [N, C, L] or [N, C, H, W].
    """

    needs_batch = False

    def __init__(self, channels: int, *, tlu: bool = False, eps: PositiveFloat = 1e-6) -> None:
        super().__init__(channels, sync=False)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.tau = nn.Parameter(torch.zeros(channels)) if tlu else None

    def _train(self, x: Tensor) -> Tensor:
        values = x.to(accumulation_dtype(x.dtype))
        power = values.square().mean(2, keepdim=True)
        scale = self.weight.to(values.dtype)[:, None] * torch.rsqrt(power + self.eps)
        y = values * scale + self.bias.to(values.dtype)[:, None]
        if self.tau is not None:
            y = torch.maximum(y, self.tau.to(y.dtype)[:, None])
        return y.to(x.dtype)

    _evaluate = _train

    def extra_repr(self) -> str:
        """Channels and the settings that matter."""
        return f"{self.channels}, tlu={self.tau is not None}, eps={self.eps}"
