"""Split batch normalization: each class group has statistics of its own."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from ltnorm.norms.compound import CompoundBatchNorm
from ltnorm.norms.em import pool, running_mixture
from ltnorm.norms.functional import as_affine
from ltnorm.norms.layer import ChannelNorm
from ltnorm.norms.routing import GroupRule, Momentum


class SplitBatchNorm(CompoundBatchNorm):
    """While training, an image is normalized with the batch statistics of its own class group.

    The class-aware split feature normalization of arXiv 2212.01007 (reimplemented from its
    abstract): compound BN whose responsibilities are given by the labels. Labels are unknown at
    test time, so a rule takes their place there:

        pooled     one Gaussian of all groups, weighted by their running frequency (law of total
                   variance): mean = sum_k tau_k mu_k, var = sum_k tau_k (var_k + (mu_k - mean)^2)
        balanced   the same with equal weights
        posterior  the mixture, as compound BN; the only rule that allows an affine pair a group

    Args:
        channels: C.
        components: K, the number of class groups. With one group this is batch normalization.
        evaluation: the rule at test time.
        affine: one weight and bias for all groups ("shared") or one for each ("component").

    The others are those of `CompoundBatchNorm`.

    Raises:
        RuntimeError: training without a `route`.
    """

    def __init__(
        self,
        channels: int,
        *,
        components: PositiveInt = 2,
        evaluation: Literal["pooled", "balanced", "posterior"] = "pooled",
        momentum: Momentum = 0.1,
        affine: Literal["component", "shared"] = "shared",
        pseudo_count: NonNegativeFloat | None = None,
        groups: GroupRule = "rank",
        eps: PositiveFloat = 1e-5,
        sync: bool = True,
    ) -> None:
        for _, text in self.check_options(affine=affine, evaluation=evaluation):
            raise ValueError(f"affine {text}")
        super().__init__(
            channels,
            components=components,
            momentum=momentum,
            affine=affine,
            pseudo_count=pseudo_count,
            groups=groups,
            eps=eps,
            sync=sync,
        )
        self.evaluation = evaluation

    @staticmethod
    def check_options(affine: str, evaluation: str, **_: Any) -> Iterator[tuple[str, str]]:
        """Options that exclude each other, as (option, what is wrong)."""
        if affine == "component" and evaluation != "posterior":
            yield "affine", f"'component' needs evaluation 'posterior', not '{evaluation}'"

    def check_route(self, images: int) -> None:
        """Training needs a route, of one group an image."""
        if self.components > 1:
            self.require_route()
        super().check_route(images)

    def as_affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scale and offset [C] of the evaluation with pooled or balanced statistics."""
        if self.evaluation == "posterior" or self.components == 1:
            return super().as_affine(dtype)
        mixture = running_mixture(self, self.running_mean.new_zeros((), dtype=dtype))
        tau = mixture.weight if self.evaluation == "pooled" else torch.ones_like(mixture.weight)
        mean, var = pool(tau, mixture.mean, mixture.var)
        return as_affine(mean[0], var[0], self.weight[0], self.bias[0], self.eps)

    def responsibilities(self, x: Tensor) -> Tensor | None:
        """r [N, K] of evaluation by the posterior; None by the other rules."""
        return super().responsibilities(x) if self.evaluation == "posterior" else None

    def _evaluate(self, x: Tensor) -> Tensor:
        if self.evaluation == "posterior":
            return super()._evaluate(x)
        return ChannelNorm._evaluate(self, x)
