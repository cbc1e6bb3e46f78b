"""Mode normalization: a learned gate assigns each image to modes with statistics of their own."""

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ltnorm.norms import distributed
from ltnorm.norms.em import MIN_VARIANCE
from ltnorm.norms.functional import accumulation_dtype, affine_map, image_moments
from ltnorm.norms.layer import ChannelNorm
from ltnorm.norms.routing import Momentum


def _common_point(x: Tensor) -> Tensor:
    """A point [C] near the data of all ranks, the same on each."""
    near = x[0].detach().mean(1, dtype=accumulation_dtype(x.dtype))
    return distributed.mean_over_ranks(near)


class ModeNorm(ChannelNorm):
    """y_n = weight * sum_k g_nk (x_n - m_k) / sqrt(v_k + eps) + bias

    Deecke, Murray & Bilen 2019, arXiv 1810.05466. The gates g_n = softmax(W p_n + c) follow from
    the image's mean per channel p_n, and are learned with the network, through the statistics,
    too:
        m_k = sum_n g_nk p_n / sum_n g_nk
        v_k = sum_n g_nk mean((x_n - m_k)^2) / sum_n g_nk
    Evaluation gates each image by itself and uses moving averages of the modes' first and second
    moments. With components = 1 the batch is normalized as by BN. As in the authors' code W
    starts small and random (from torch's seed, without drawing from its generator, so that the
    other weights of a network do not depend on the norm).

    Args:
        channels: C.
        components: K, the number of modes.
        momentum: weight of a new batch in the moving averages, in (0, 1].
        eps: added to the variance.
        sync: under torch.distributed, sum the batch statistics over all ranks.

    Shapes: input and output [N, C], [N, C, L] or [N, C, H, W].
    """

    def __init__(
        self,
        channels: int,
        *,
        components: PositiveInt = 2,
        momentum: Momentum = 0.1,
        eps: PositiveFloat = 1e-5,
        sync: bool = True,
    ) -> None:
        super().__init__(channels, sync)
        self.components, self.momentum, self.eps = components, momentum, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        rng = torch.Generator().manual_seed(torch.initial_seed())
        gate = 0.01 * torch.randn(components, channels, generator=rng, device="cpu")
        self.gate_weight = nn.Parameter(gate.to(self.weight.device))
        self.gate_bias = nn.Parameter(torch.zeros(components))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self.register_buffer("running_mean", torch.zeros(components, channels))
        self.register_buffer("running_var", torch.ones(components, channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def _gates(self, pooled: Tensor) -> Tensor:
        dtype = pooled.dtype
        logits = pooled @ self.gate_weight.to(dtype).T + self.gate_bias.to(dtype)
        return logits.softmax(1)

    def _train(self, x: Tensor) -> Tensor:
        sync = distributed.synchronized(self.sync)
        first, second, shift = image_moments(x, _common_point(x) if sync else None)
        gates = self._gates(first + shift)
        if sync:
            sums = torch.cat([gates.sum(0)[:, None], gates.T @ first, gates.T @ second], dim=1)
            size, *sums = distributed.differentiable_sum(sums).split([1, *[self.channels] * 2], 1)
            mean, raw = (s / size.clamp_min(1e-6) for s in sums)
        else:
            share = (gates / gates.sum(0).clamp_min(1e-6)).T
            mean, raw = share @ first, share @ second
        var = (raw - mean.square()).clamp_min(0)
        self._track(mean.detach() + shift, var.detach())
        return self._mix(x, gates, mean + shift, var)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Moving averages of the first and the second moment: of the variance and a rest."""
        a, apart = self.momentum, mean - self.running_mean
        spread = (1 - a) * self.running_var + a * var + a * (1 - a) * apart.square()
        self.running_mean.copy_(self.running_mean + a * apart)
        self.running_var.copy_(spread.clamp_min(MIN_VARIANCE))
        self.num_batches_tracked += 1

    def _evaluate(self, x: Tensor) -> Tensor:
        gates = self.responsibilities(x)
        return self._mix(
            x, gates, *(t.to(gates.dtype) for t in (self.running_mean, self.running_var))
        )

    def responsibilities(self, x: Tensor) -> Tensor:
        """The gates [N, K] of each image."""
        return self._gates(x.mean(2, dtype=accumulation_dtype(x.dtype)))

    def _mix(self, x: Tensor, gates: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        scale = self.weight.to(var.dtype) * torch.rsqrt(var + self.eps)
        offset = self.bias.to(var.dtype) - mean * scale
        return affine_map(x, gates, scale, offset).to(x.dtype)

    def extra_repr(self) -> str:
        """Channels and the settings that matter."""
        return (
            f"{self.channels}, components={self.components}, "
            f"momentum={self.momentum}, eps={self.eps}"
        )
