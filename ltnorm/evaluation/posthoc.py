"""Corrections of a trained classifier that need no training, only its outputs or its features.

Each has at most one number to tune, and it is tuned on validation images, never on the test set.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltnorm.data.longtail import GroupScheme
from ltnorm.data.prepared import PreparedSet
from ltnorm.data.source import Split
from ltnorm.errors import UsageError
from ltnorm.evaluation.evaluate import Evaluation, of_logits, predict
from ltnorm.evaluation.metrics import class_accuracy
from ltnorm.models import CosineLinear, classifier

# 0 is no correction (but tau-norm drops the bias); beyond 2 both overshoot on any long tail.
TAUS = tuple(i / 10 for i in range(21))


def adjust_logits(logits: Tensor, class_counts: Sequence[int], tau: float) -> Tensor:
    """z_c - tau log(n_c / N): the training prior taken out of trained logits [N, C].

    Menon et al. 2021, arXiv 2007.07314. Equal priors, and tau = 0, change no order.
    """
    prior = torch.tensor(class_counts, dtype=torch.float64)
    return (logits.double() - tau * (prior / prior.sum()).log()).to(logits.dtype)


def tau_normalized(weight: Tensor, tau: float) -> Tensor:
    """w_c / |w_c|^tau for classifier weights [C, D], which are used without a bias.

    Kang et al. 2020, arXiv 1910.09217. tau = 1 leaves directions only.
    """
    return weight / torch.linalg.vector_norm(weight, dim=1, keepdim=True) ** tau


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The mean feature of each class, scaled to length 1: [N, D] -> [C, D].

    As weights without a bias they make the nearest-class-mean classifier by cosine (arXiv
    1910.09217): the length of an image's own feature changes no order.
    """
    sums = torch.zeros(num_classes, features.shape[1], dtype=torch.float64)
    sums.index_add_(0, labels, features.double())
    return F.normalize(sums, dim=1).to(features.dtype)


def corrected(layer: nn.Linear, method: str, tau: float, class_counts: Sequence[int]) -> nn.Linear:
    """A copy of a classifier, on the CPU, corrected by "tau-norm" or "logit-adjust"."""
    if method == "tau-norm":
        return _with_weight(layer, tau_normalized(layer.weight.detach(), tau))
    layer = copy.deepcopy(layer).cpu().requires_grad_(False)
    layer.bias.copy_(adjust_logits(layer.bias, class_counts, tau))
    return layer


def nearest_class_mean(layer: nn.Linear, seen: "Outputs") -> nn.Linear:
    """A copy of a classifier, on the CPU, that takes the nearest class mean of what was seen."""
    return _with_weight(layer, class_means(seen.features, seen.labels, layer.out_features))


def _with_weight(layer: nn.Linear, weight: Tensor) -> nn.Linear:
    """A copy, on the CPU, with other weights [C, D] and without a bias's effect."""
    layer = copy.deepcopy(layer).cpu().requires_grad_(False)
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.zero_()
    return layer


def tune(logits: Callable[[float], Tensor], labels: Tensor, taus: Sequence[float] = TAUS) -> float:
    """The tau whose logits have the best mean class accuracy on labelled images; the least such."""

    def score(tau: float) -> float:
        given = logits(tau)
        per_class = class_accuracy(given.argmax(1), labels, given.shape[1])
        return float(per_class[~per_class.isnan()].mean())

    return max(taus, key=lambda tau: (score(tau), -tau))


@dataclass(frozen=True)
class Outputs:
    """What a model makes of a split, on the CPU: features [N, D], logits [N, C], labels [N].

    Features are what enters the classifier.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor


def outputs(
    model: nn.Module,
    data: PreparedSet,
    split: Split,
    device: torch.device,
    workers: int | None = None,
) -> Outputs:
    """The features and logits of a split, without augmentation; `workers` decode files."""
    images = data.open(split)
    features: list[Tensor] = []
    hook = classifier(model).register_forward_pre_hook(
        lambda _, inputs: features.append(inputs[0].cpu())
    )
    try:
        logits = predict(
            model, images, mean=data.mean, std=data.std, device=device, workers=workers
        )
    finally:
        hook.remove()
    return Outputs(torch.cat(features), logits, torch.from_numpy(images.labels))


@dataclass(frozen=True)
class Correction:
    """One correction: its name, its tau and whether that was tuned, and what was measured."""

    name: str
    tau: float | None
    tuned: bool
    evaluation: Evaluation


class Corrections:
    """A trained model's corrections, each evaluated on a split; `measured` has them by row.

    A tau that is not given is tuned on the validation images.

    Args:
        model: on `device`; nothing but its mode (evaluation) is changed.
        data, split: the images that are evaluated.
        scheme: how classes are grouped.
        device: where the model is.
        workers: processes that decode files.
    """

    def __init__(
        self,
        model: nn.Module,
        data: PreparedSet,
        split: Split,
        scheme: GroupScheme,
        device: torch.device,
        workers: int | None = None,
    ) -> None:
        self.model, self.data, self.split = model, data, split
        self.scheme, self.device, self.workers = scheme, device, workers
        self.measured: dict[str, Correction] = {}
        self._outputs: dict[str, Outputs] = {}

    def tau_norm(self, tau: float | None) -> None:
        """With tau-normalized weights.

        Raises:
            UsageError: a cosine classifier, or nothing to tune on.
        """
        layer = classifier(self.model)
        if isinstance(layer, CosineLinear):
            raise UsageError(
                "--tau-norm changes the norms of class weights: a cosine classifier has none",
                "--logit-adjust and --ncm are for it, too",
            )

        def logits(seen: Outputs, tau: float) -> Tensor:
            return corrected(layer, "tau-norm", tau, self.data.counts)(seen.features)

        used = self._tuned(tau, logits, "--tau-norm")
        self._add("tau-norm", logits(self._of(self.split), used), used, tuned=tau is None)

    def logit_adjust(self, tau: float | None) -> None:
        """With the training prior taken out of the logits.

        Raises:
            UsageError: nothing to tune on.
        """

        def logits(seen: Outputs, tau: float) -> Tensor:
            return adjust_logits(seen.logits, self.data.counts, tau)

        used = self._tuned(tau, logits, "--logit-adjust")
        self._add("logit-adjust", logits(self._of(self.split), used), used, tuned=tau is None)

    def ncm(self) -> None:
        """By the nearest class mean, of training images without augmentation."""
        layer = nearest_class_mean(classifier(self.model), self._of("train"))
        self._add("ncm", layer(self._of(self.split).features))

    def _tuned(
        self, tau: float | None, logits: Callable[[Outputs, float], Tensor], flag: str
    ) -> float:
        if tau is not None:
            return tau
        if "val" not in self.data.splits:
            raise UsageError(
                f"{flag} is tuned on validation images, and {self.data.set_id} has none",
                "give its tau, or train with --val N",
            )
        if self.split == "val":
            raise UsageError(
                f"{flag} would be tuned on the very images that are evaluated",
                "give its tau, or evaluate on the test set: --split test",
            )
        held = self._of("val")
        return tune(lambda t: logits(held, t), held.labels)

    def _of(self, split: Split) -> Outputs:
        if split not in self._outputs:
            found = outputs(self.model, self.data, split, self.device, self.workers)
            self._outputs[split] = found
        return self._outputs[split]

    def _add(
        self, name: str, logits: Tensor, tau: float | None = None, tuned: bool = False
    ) -> None:
        labels = self._of(self.split).labels
        found = of_logits(logits, labels, self.data, self.scheme)
        row = name if tau is None else f"{name} {tau:g}" + (" (tuned)" if tuned else "")
        self.measured[row] = Correction(name, tau, tuned, found)
