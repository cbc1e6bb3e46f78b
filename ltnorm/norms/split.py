"""Split batch normalization: each class group has statistics of its own."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from ltnorm.norms.compound import CompoundBatchNorm2d
from ltnorm.norms.routing import GroupRule, Momentum


class SplitBatchNorm2d(CompoundBatchNorm2d):
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
        components: K, the number of class groups. With one group this is BatchNorm2d.
        evaluation: the rule at test time.
        affine: one weight and bias for all groups ("shared") or one for each ("component").

    The others are those of `CompoundBatchNorm2d`.

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
        )
        self.evaluation = evaluation

    @staticmethod
    def check_options(affine: str, evaluation: str, **_: Any) -> Iterator[tuple[str, str]]:
        """Options that exclude each other, as (option, what is wrong)."""
        if affine == "component" and evaluation != "posterior":
            yield "affine", f"'component' needs evaluation 'posterior', not '{evaluation}'"

    def _apply_route(self, r: Tensor) -> Tensor:
        if self.routed is None and self.components > 1:
            raise RuntimeError(
                "split normalization needs the class group of each image while training: "
                "wrap the forward in `with ltnorm.norms.route(model, groups):`"
            )
        return super()._apply_route(r)

    def _forward_eval(self, x: Tensor, shift: Tensor) -> Tensor:
        if self.evaluation == "posterior":
            return super()._forward_eval(x, shift)
        mixture = self._running(shift)
        tau = mixture.weight if self.evaluation == "pooled" else torch.full_like(mixture.weight, 1)
        tau = tau / tau.sum()
        mean = tau @ mixture.mean
        var = tau @ (mixture.var + (mixture.mean - mean).square())
        weight, bias = self.weight[0].to(var.dtype), self.bias[0].to(var.dtype)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=self.eps)
