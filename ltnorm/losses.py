"""Training losses, built from class counts.

`image_losses` has the formulas, each of which gives one number per image. `ClassLoss` makes a
scalar of them, with class weights from any point of the training on, in float32 or better.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltnorm import registry
from ltnorm.errors import UsageError
from ltnorm.image_losses import PerImageLoss, image_counts

Weights = Literal["none", "inverse", "effective"]


def build(
    name: str,
    class_counts: Sequence[int],
    *,
    weights: Weights | None = None,
    beta: float = 0.9999,
    drw_start: float | None = None,
    **options: Any,
) -> "ClassLoss":
    """Build the loss `name` of the registry: a module (logits [N, C], labels [N]) -> scalar.

    Args:
        name: see `ltnorm list losses`.
        class_counts: training images a class, [C].
        weights: how images are weighted by class (see `class_weights`); None is as the loss is
            defined.
        beta: of the weights "effective".
        drw_start: the part of the training, in [0, 1], after which the weights set in
            (see `ClassLoss`); None is from the start.
        options: those of the loss.

    Raises:
        UsageError: no such loss, or a deferred start without weights.
        ValueError: a class without images.
    """
    entry = registry.lookup("loss", name)
    scheme = weights or entry.weights
    if drw_start is not None and scheme == "none":
        raise UsageError(
            f"the loss '{name}' has no class weights to start at {drw_start:g} of the training",
            "choose them: weights effective (as LDAM-DRW), or inverse",
        )
    loss = registry.load(entry.target)(class_counts, **options)
    return ClassLoss(loss, class_weights(class_counts, scheme, beta), drw_start)


def class_weights(class_counts: Sequence[int], scheme: Weights, beta: float = 0.9999) -> Tensor:
    """The weight of an image by its class, float64 [C] of sum C.

    none:       w_c = 1
    inverse:    w_c ~ 1 / n_c
    effective:  w_c ~ (1 - beta) / (1 - beta^n_c), the inverse effective number of images
                (Cui et al. 2019, arXiv 1901.05555); "none" at beta = 0, "inverse" towards 1

    Raises:
        ValueError: a class without images, beta outside [0, 1), no such scheme.
    """
    counts = image_counts(class_counts)
    if scheme == "none":
        weight = torch.ones_like(counts)
    elif scheme == "inverse":
        weight = 1 / counts
    elif scheme == "effective":
        if not 0 <= beta < 1:
            raise ValueError(f"beta must be in [0, 1), got {beta}")
        # 1 - beta^n, without cancellation; the numerator is the same for all.
        weight = -1 / torch.expm1(counts * torch.log1p(torch.tensor(beta - 1, dtype=counts.dtype)))
    else:
        raise ValueError(f"class weights are none, inverse or effective, not '{scheme}'")
    return weight * (len(weight) / weight.sum())


class ClassLoss(nn.Module):
    """L = sum_i w_{y_i} l_i / sum_i w_{y_i}, the class-weighted mean of a per-image loss.

    As `torch.nn.functional.cross_entropy` and LDAM-DRW have it: a batch's loss does not depend on
    the scale of the weights. Where the loss has `per_image_mean`, sum_i w_{y_i} l_i / N.

    Deferred re-weighting (Cao et al. 2019, arXiv 1906.07413): with a `drw_start` all weights are
    one until that part of the training is done, which `set_progress` tells.

    Args:
        per_image: l.
        class_weight: w [C].
        drw_start: in [0, 1]; None weights from the start.
    """

    def __init__(
        self, per_image: PerImageLoss, class_weight: Tensor, drw_start: float | None = None
    ) -> None:
        super().__init__()
        self.per_image, self.drw_start = per_image, drw_start
        self.class_weight: Tensor
        self.active_weight: Tensor
        self.register_buffer("class_weight", class_weight.float(), persistent=False)
        self.register_buffer("active_weight", self.class_weight.clone(), persistent=False)
        self.set_progress(0.0)

    @property
    def cosine_scale(self) -> float | None:
        """The scale of the cosine classifier that the loss needs; None for a linear one."""
        return self.per_image.cosine_scale

    @property
    def initial_bias(self) -> float | None:
        """What the bias of the classifier starts at; None for as it is."""
        return self.per_image.initial_bias

    def set_progress(self, progress: float) -> None:
        """Say which part of the training is done, in [0, 1]: (e - 1) / E as epoch e of E starts."""
        if self.drw_start is None or progress >= self.drw_start - 1e-9:  # for rounding
            self.active_weight.copy_(self.class_weight)
        else:
            self.active_weight.fill_(1.0)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [N, C], labels int64 [N] -> scalar."""
        # Half precision is too coarse for a softmax over many classes.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = self.per_image(logits, labels)
        weight = self.active_weight.to(losses.dtype)
        if self.per_image.per_image_mean:
            return (weight[labels] * losses).mean()
        # torch's own weighted mean, so that `ce` is F.cross_entropy to the last bit.
        return F.nll_loss(-losses[:, None].expand_as(logits), labels, weight)
