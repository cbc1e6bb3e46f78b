"""The losses, as formulas: one number per image.

To add one, write a class that gives `forward` its formula and one line in the registry; class
weights, deferred re-weighting, the mean and half precision are `ltnorm.losses.ClassLoss`'s. In the
formulas z are the logits [C] of an image, y its label, n_c the training images of class c, and
CE(z, y) = -log softmax(z)_y.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

Smoothing = Annotated[float, Field(ge=0, lt=1)]


class PerImageLoss(nn.Module):
    """(logits [N, C], labels int64 [N]) -> losses [N]; logits are float32 or float64.

    A loss takes the class counts, and its options by keyword. Buffers follow from the recipe and
    are not saved.

    Attributes:
        per_image_mean: with class weights, divide by the number of images, not by their weights.
        cosine_scale: the s of the cosine classifier z = s cos(theta) that the loss is defined on
            (`ltnorm.models.CosineLinear`); None for a linear one.
        initial_bias: what the bias of the classifier starts at; None for as it is.
    """

    per_image_mean: bool = False
    cosine_scale: float | None = None
    initial_bias: float | None = None

    def _constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value.float(), persistent=False)


def image_counts(class_counts: Sequence[int]) -> Tensor:
    """Images a class as float64 [C].

    Raises:
        ValueError: a class without images.
    """
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if counts.ndim != 1 or not (counts > 0).all():
        raise ValueError(f"each class needs at least one training image, got {class_counts}")
    return counts


def _log_prior(class_counts: Sequence[int]) -> Tensor:
    """log(n_c / n_max), which is log pi_c but for a constant that no softmax sees; float64 [C]."""
    counts = image_counts(class_counts)
    return torch.log(counts / counts.max())


class CrossEntropy(PerImageLoss):
    """l = CE(z, y)

    Args:
        class_counts: images a class; not used.
        label_smoothing: e; the target is 1 - e on the label plus e / C on every class.
    """

    def __init__(self, class_counts: Sequence[int], *, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [N, C], labels int64 [N] -> [N]."""
        return F.cross_entropy(
            self._adjust(logits, labels),
            labels,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )

    def _adjust(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits


class LogitAdjustment(CrossEntropy):
    """l = CE(z + tau log pi, y), pi_c = n_c / sum n

    Menon et al. 2021, arXiv 2007.07314 (the loss, not the post-hoc correction).

    Args:
        class_counts: n.
        tau: strength; 0 is cross-entropy, 1 is consistent with the balanced error.
        label_smoothing: as `CrossEntropy`, on the adjusted logits.
    """

    def __init__(
        self,
        class_counts: Sequence[int],
        *,
        tau: NonNegativeFloat = 1.0,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(class_counts, label_smoothing=label_smoothing)
        self.shift: Tensor
        self._constant("shift", tau * _log_prior(class_counts))

    def _adjust(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits + self.shift


class BalancedSoftmax(LogitAdjustment):
    """l = CE(z + log n, y)

    Ren et al. 2020, arXiv 2007.10740. The same as `LogitAdjustment` at tau = 1.

    Args:
        class_counts: n.
        label_smoothing: as `CrossEntropy`, on the adjusted logits.
    """

    def __init__(self, class_counts: Sequence[int], *, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(class_counts, tau=1.0, label_smoothing=label_smoothing)


class VectorScaling(CrossEntropy):
    """l = CE(D z + tau log pi, y), D_c = (n_c / n_max)^gamma, pi_c = n_c / sum n

    Kini et al. 2021, arXiv 2103.01550. The defaults are those tuned for CIFAR-10-LT; the
    authors' code falls back to 0.3 and 1.0.

    Args:
        class_counts: n.
        gamma: of the multiplicative part; 0 is `LogitAdjustment`.
        tau: of the additive part.
        label_smoothing: as `CrossEntropy`, on the adjusted logits.
    """

    def __init__(
        self,
        class_counts: Sequence[int],
        *,
        gamma: NonNegativeFloat = 0.15,
        tau: NonNegativeFloat = 1.25,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(class_counts, label_smoothing=label_smoothing)
        self.factor: Tensor
        self.shift: Tensor
        self._constant("factor", torch.exp(gamma * _log_prior(class_counts)))
        self._constant("shift", tau * _log_prior(class_counts))

    def _adjust(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.factor * logits + self.shift


class LDAM(CrossEntropy):
    """l = CE(z - s m_y onehot(y), y), m_c = max_margin (n_min / n_c)^(1/4), z = s cos(theta)

    Label-distribution-aware margins, Cao et al. 2019, arXiv 1906.07413. The scale s is in the
    classifier (`cosine_scale`), so that the logits are those that the softmax is taken of.

    Args:
        class_counts: n.
        max_margin: the margin of the smallest class, as a cosine.
        scale: s.
        label_smoothing: as `CrossEntropy`, on the adjusted logits.
    """

    def __init__(
        self,
        class_counts: Sequence[int],
        *,
        max_margin: NonNegativeFloat = 0.5,
        scale: PositiveFloat = 30.0,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(class_counts, label_smoothing=label_smoothing)
        self.cosine_scale = scale
        counts = image_counts(class_counts)
        self.margin: Tensor
        self._constant("margin", max_margin * (counts.min() / counts) ** 0.25)

    def _adjust(self, logits: Tensor, labels: Tensor) -> Tensor:
        margin = self.cosine_scale * self.margin[labels, None]
        return logits - margin * F.one_hot(labels, logits.shape[1])


class LabelAwareSmoothing(PerImageLoss):
    """l = (1 - e_y) CE(z, y) + e_y mean_c CE(z, c)

    Zhong et al. 2021 (MiSLAS), arXiv 2104.00466: smoothing for the classes that are many, since
    the network is overconfident in these. With t = (n_y - n_min) / (n_max - n_min), 1 where all
    classes are equal, the shapes of e_y are
        concave  tail + (head - tail) sin(pi t / 2)
        linear   tail + (head - tail) t
        convex   head - (head - tail) cos(pi t / 2)
    As in the authors' code e_y is spread over all classes; the paper has the C - 1 others. Their
    settings are 0.3 and 0.0 for CIFAR-10-LT (the defaults here) and 0.4 and 0.1 for CIFAR-100-LT
    at ratio 100, in a second stage that trains the classifier only.

    Args:
        class_counts: n.
        head: the smoothing of the largest class.
        tail: the smoothing of the smallest class.
        shape: how it falls between them.
    """

    def __init__(
        self,
        class_counts: Sequence[int],
        *,
        head: Smoothing = 0.3,
        tail: Smoothing = 0.0,
        shape: Literal["concave", "linear", "convex"] = "concave",
    ) -> None:
        super().__init__()
        counts = image_counts(class_counts)
        spread = counts.max() - counts.min()
        t = (counts - counts.min()) / spread if spread else torch.ones_like(counts)
        rise = {
            "concave": torch.sin(math.pi / 2 * t),
            "linear": t,
            "convex": 1 - torch.cos(math.pi / 2 * t),
        }[shape]
        self.smoothing: Tensor
        self._constant("smoothing", tail + (head - tail) * rise)

    @staticmethod
    def check_options(head: float, tail: float, shape: str, **_: Any) -> Iterator[tuple[str, str]]:
        """Options without effect, as (option, what is wrong): two names for one experiment."""
        if head == tail and shape != "concave":
            yield "shape", "has an effect only where head and tail differ"

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [N, C], labels int64 [N] -> [N]."""
        every = -logits.log_softmax(1)
        smoothing = self.smoothing[labels]
        label = every.gather(1, labels[:, None])[:, 0]
        return (1 - smoothing) * label + smoothing * every.mean(1)


class Focal(PerImageLoss):
    """softmax: l = (1 - p_y)^gamma CE(z, y), p = softmax(z)
    sigmoid: l = sum_c -(1 - q_c)^gamma log q_c, q_c = sigmoid(z_c) for c = y, else sigmoid(-z_c)

    Lin et al. 2017, arXiv 1708.02002, defines the sigmoid form, without its alpha here. Published
    results on long-tailed sets are mostly of the softmax form; those of LDAM-DRW have gamma = 1.
    With the sigmoid form the classifier's bias starts at probabilities of 1 / C.

    Args:
        class_counts: images a class; only their number is used.
        gamma: how much confident answers count less; 0 is cross-entropy.
        form: softmax or sigmoid.
    """

    def __init__(
        self,
        class_counts: Sequence[int],
        *,
        gamma: NonNegativeFloat = 2.0,
        form: Literal["softmax", "sigmoid"] = "softmax",
    ) -> None:
        super().__init__()
        self.gamma, self.form = gamma, form
        if form == "sigmoid":
            self.initial_bias = _rare_bias(len(class_counts))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [N, C], labels int64 [N] -> [N]."""
        focal = _softmax_focal if self.form == "softmax" else _sigmoid_focal
        return focal(logits, labels, self.gamma)


class ClassBalanced(PerImageLoss):
    """softmax: l = CE(z, y)
    sigmoid, focal: l as the sigmoid form of `Focal`, with gamma = 0 for sigmoid

    Cui et al. 2019, arXiv 1901.05555: class weights by the effective number of images, which the
    registry gives it. As defined there the weighted sum is divided by the number of images, so
    that a batch of the head weighs less than one of the tail. With the sigmoid forms the
    classifier's bias starts at probabilities of 1 / C; the authors spare it from weight decay, too.

    Args:
        class_counts: images a class; only their number is used.
        base: the loss that is weighted.
        gamma: of focal; the authors' code trains CIFAR-10-LT with 1, the paper tries 0.5, 1, 2.
    """

    per_image_mean = True

    def __init__(
        self,
        class_counts: Sequence[int],
        *,
        base: Literal["softmax", "sigmoid", "focal"] = "focal",
        gamma: NonNegativeFloat = 1.0,
    ) -> None:
        super().__init__()
        self.base, self.gamma = base, gamma if base == "focal" else 0.0
        if base != "softmax":
            self.initial_bias = _rare_bias(len(class_counts))

    @staticmethod
    def check_options(base: str, gamma: float, **_: Any) -> Iterator[tuple[str, str]]:
        """Options without effect, as (option, what is wrong): two names for one experiment."""
        if base != "focal" and gamma != 1.0:
            yield "gamma", "has an effect only with base=focal"

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [N, C], labels int64 [N] -> [N]."""
        if self.base == "softmax":
            return F.cross_entropy(logits, labels, reduction="none")
        return _sigmoid_focal(logits, labels, self.gamma)


def _softmax_focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    loss = F.cross_entropy(logits, labels, reduction="none")
    rest = -torch.expm1(-loss)
    # At 1 - p = 0 the power has no derivative for gamma < 1.
    return rest.clamp_min(torch.finfo(rest.dtype).tiny) ** gamma * loss


def _sigmoid_focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    signed = torch.where(F.one_hot(labels, logits.shape[1]).bool(), logits, -logits)
    return (-F.logsigmoid(signed) * torch.exp(gamma * F.logsigmoid(-signed))).sum(1)


def _rare_bias(classes: int) -> float:
    """-log((1 - pi) / pi) at pi = 1 / C: a sigmoid that starts there says pi."""
    return -math.log(classes - 1)


class Seesaw(PerImageLoss):
    """l = -log(e^{z_y} / sum_c S_c e^{z_c}), S_c = M_c K_c, M_y = K_y = 1

    mitigation    M_c = min(1, n_c / n_y)^p: a rarer class is pushed down less
    compensation  K_c = max(1, p_c / max(p_y, eps))^q, p = softmax(z) without gradient: but not
                  where the network errs

    Wang et al. 2021, arXiv 2008.10032. n are the images of the training set, which the authors
    count as they come; their normalized classifier is left out.

    Args:
        class_counts: n.
        p: strength of the mitigation.
        q: strength of the compensation.
        eps: bounds the compensation where p_y is small.
    """

    def __init__(
        self,
        class_counts: Sequence[int],
        *,
        p: NonNegativeFloat = 0.8,
        q: NonNegativeFloat = 2.0,
        eps: Annotated[float, Field(gt=0, lt=1)] = 0.01,
    ) -> None:
        super().__init__()
        self.p, self.q, self.eps = p, q, eps
        self.log_count: Tensor
        self._constant("log_count", torch.log(image_counts(class_counts)))

    @staticmethod
    def check_options(q: float, eps: float, **_: Any) -> Iterator[tuple[str, str]]:
        """Options without effect, as (option, what is wrong): two names for one experiment."""
        if q == 0 and eps != 0.01:
            yield "eps", "has an effect only with q above 0"

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [N, C], labels int64 [N] -> [N]."""
        mitigation = (self.log_count - self.log_count[labels, None]).clamp_max(0)
        log_p = logits.detach().log_softmax(1)
        label = log_p.gather(1, labels[:, None]).clamp_min(math.log(self.eps))
        compensation = (log_p - label).clamp_min(0)
        # Both are 0 at the label itself.
        log_seesaw = self.p * mitigation + self.q * compensation
        return F.cross_entropy(logits + log_seesaw, labels, reduction="none")
