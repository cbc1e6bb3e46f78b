"""Balanced batch normalization: every class group counts the same, however many images it has."""

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from ltnorm.norms.em import pool
from ltnorm.norms.functional import matmul
from ltnorm.norms.routing import GroupRule, Momentum
from ltnorm.norms.split import SplitBatchNorm


class BalancedBatchNorm(SplitBatchNorm):
    """BN by one Gaussian, to which K class groups contribute equally.

        mean = 1/K sum_k m_k,    var = 1/K sum_k (v_k + (m_k - mean)^2)

    with m_k, v_k the moments of group k: of the batch while training, with the pseudo-count of
    `CompoundBatchNorm`, so that a group without images counts by its running moments, and the
    running ones in evaluation, which needs no labels. In the spirit of the balanced batch
    normalization of TRIBE (Su, Xu & Jia 2024, arXiv 2309.14949), which adapts a trained network
    to an imbalanced stream by statistics kept for each class; here it is a layer to train with.

    Args:
        channels: C.
        components: K, the number of class groups. Give the number of classes, and each class is
            a group of its own.

    The others are those of `SplitBatchNorm`. With one group this is batch normalization.

    Raises:
        RuntimeError: training without a `route`.
    """

    def __init__(
        self,
        channels: int,
        *,
        components: PositiveInt = 2,
        momentum: Momentum = 0.1,
        pseudo_count: NonNegativeFloat | None = None,
        groups: GroupRule = "rank",
        eps: PositiveFloat = 1e-5,
        sync: bool = True,
    ) -> None:
        super().__init__(
            channels,
            components=components,
            evaluation="balanced",
            momentum=momentum,
            pseudo_count=pseudo_count,
            groups=groups,
            eps=eps,
            sync=sync,
        )

    @staticmethod
    def check_options(**_: Any) -> Iterator[tuple[str, str]]:
        """None of these options exclude each other."""
        return iter(())

    def _normalize_batch(
        self,
        x: Tensor,
        r: Tensor | None,
        share: Tensor,
        mean: Tensor,
        var: Tensor,
        shift: Tensor,
        sync: bool,
    ) -> Tensor:
        if r is not None:  # one Gaussian, in which an image weighs what its group does
            equal = torch.full_like(share, 1 / self.components)
            mean, var = pool(equal, mean, var)
            share = matmul(r, (equal * share)[:, None])
            r = torch.ones_like(share)
        return super()._normalize_batch(x, r, share, mean, var, shift, sync)
