"""The dual-path objective of compound BN (arXiv 2212.01007, reimplemented from the abstract).

The mainstream path normalizes by the mixture's posterior. The auxiliary path normalizes each
image by the statistics of its own class group (class-aware split normalization), which keeps
the components from collapsing onto the head. All weights are shared; at test time only the
mainstream path exists.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from ltnorm import parallel
from ltnorm.models import classifier
from ltnorm.norms import route
from ltnorm.training.objective import SinglePath

AuxGradient = Literal["full", "statistics"]
DualPathOption = Literal[True, False, "always"]


class DualPath(SinglePath):
    """(L_main + w L_aux) / (1 + w) + c (1 - cos(projector(f_main), stopgrad(f_aux)))

    f is the classifier's input and the projector Linear-ReLU-Linear of its width. A mixed image
    has two labels in each L, and goes to the class group of the one with the larger share.

    Args:
        model, loss, class_group: as `SinglePath`.
        dual_path: False trains the mixture alone, at the cost of one path; so does a single
            class group, which leaves nothing to tell apart, unless it is "always": with one
            component that is batch normalization under the same objective, a control.
        aux_gradient: what the auxiliary path does. "statistics": a forward without gradient
            that only shapes the components, so that L_aux is left out (w = 0). "full": one
            forward over both halves with pooled batch statistics; beware that the class group
            then chooses the affine parameters, from which the network can read the label.
        aux_weight: w; only with aux_gradient "full".
        consistency: c; 0 leaves the term and the projector out.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        class_group: Tensor,
        *,
        dual_path: DualPathOption = True,
        aux_gradient: AuxGradient = "statistics",
        aux_weight: NonNegativeFloat = 1.0,
        consistency: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__(model, loss, class_group)
        self.dual_path = dual_path == "always" or (dual_path and bool(class_group.any()))
        self.aux_gradient = aux_gradient
        self.aux_weight, self.consistency = aux_weight, consistency
        self.projector: nn.Module | None = None
        if self.dual_path and consistency > 0:
            width = classifier(model).in_features
            self.projector = nn.Sequential(
                nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
            )

    @staticmethod
    def check_options(
        dual_path: DualPathOption,
        aux_gradient: AuxGradient,
        aux_weight: float,
        consistency: float,
        components: int = 1,
        **_: Any,
    ) -> Iterator[tuple[str, str]]:
        """Options without effect, as (option, what is wrong): two names for one experiment."""
        if dual_path == "always" and components > 1:
            yield "dual_path", "'always' has an effect only with components=1"
        if aux_weight != 1.0 and aux_gradient != "full":
            yield "aux_weight", "has an effect only with aux_gradient=full"
        if not dual_path:
            if aux_gradient != "statistics":
                yield "aux_gradient", "has an effect only with dual_path=true"
            if consistency:
                yield "consistency", "has an effect only with dual_path=true"

    @property
    def cost(self) -> tuple[int, int]:
        """How often each image passes forward and backward."""
        if not self.dual_path:
            return 1, 1
        return 2, 2 if self.aux_gradient == "full" else 1

    def forward(
        self, images: Tensor, labels: Tensor, other: Tensor | None = None, share: float = 1.0
    ) -> Tensor:
        """A batch (see `Batch`) -> scalar."""
        if not self.dual_path:
            return super().forward(images, labels, other, share)
        with self._features() as features:
            if self.aux_gradient == "full":
                loss = self._both(images, labels, other, share)
            else:
                with torch.no_grad(), route(self.model, self._groups(labels, other, share)):
                    self.model(images)
                loss = super().forward(images, labels, other, share)
        if self.projector is None:
            return loss
        main, aux = features[0].chunk(2) if len(features) == 1 else reversed(features)
        similarity = F.cosine_similarity(self.projector(main), aux.detach(), dim=1)
        similarity = parallel.whole(similarity, len(labels))
        return loss + self.consistency * (1 - similarity.mean())

    def _both(self, images: Tensor, labels: Tensor, other: Tensor | None, share: float) -> Tensor:
        """One forward over both halves: batch statistics are pooled, one running update."""
        groups = self._groups(labels, other, share)
        with route(self.model, torch.cat([torch.full_like(groups, -1), groups])):
            halves = self.model(torch.cat([images, images])).chunk(2)
        main, aux = (self._mixed_loss(half, labels, other, share) for half in halves)
        return (main + self.aux_weight * aux) / (1 + self.aux_weight)

    @contextmanager
    def _features(self) -> Iterator[list[Tensor]]:
        """Collects the classifier's inputs of the forwards inside, where they are needed."""
        features: list[Tensor] = []
        if self.projector is None:
            yield features
            return
        layer = classifier(self.model)
        hook = layer.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        try:
            yield features
        finally:
            hook.remove()
