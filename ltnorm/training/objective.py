"""Training objectives: what a batch's loss is, given the model and the loss function.

A norm names its objective in the registry; keyword-only parameters become options of the norm.

On several ranks each passes its own images through the model, and has the loss of the whole batch,
whose gradient is the sum of theirs (see `ltnorm.parallel`).
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ltnorm import parallel
from ltnorm.losses import ClassLoss
from ltnorm.norms import route


class SinglePath(nn.Module):
    """loss(model(images), labels): one forward and one backward of the batch.

    Of a mixed batch, both losses of the same logits: share * loss(.., labels) + (1 - share) *
    loss(.., other).

    Args:
        model: the network.
        loss: (logits [N, C], labels [N]) -> scalar.
        class_group: the class group of each class for the norm layers, int64 [C].

    Attributes:
        in_training: the modules of the model that are in training mode while training, all
            others being in evaluation; None is the whole model.
    """

    in_training: Sequence[nn.Module] | None = None

    def __init__(self, model: nn.Module, loss: nn.Module, class_group: Tensor) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.class_group: Tensor
        self.register_buffer("class_group", class_group)

    def train(self, mode: bool = True) -> "SinglePath":
        """Switch to training: the model, or what of it is `in_training`."""
        super().train(mode)
        if self.in_training is not None:
            self.model.eval()
            for module in self.in_training:
                module.train(mode)
        return self

    def set_progress(self, done: float) -> None:
        """Tell the loss which part of the training is done, in 0 .. 1."""
        if isinstance(self.loss, ClassLoss):
            self.loss.set_progress(done)

    @property
    def cost(self) -> tuple[int, int]:
        """How often each image passes forward and backward."""
        return 1, 1

    def forward(
        self, images: Tensor, labels: Tensor, other: Tensor | None = None, share: float = 1.0
    ) -> Tensor:
        """A batch (see `Batch`) -> scalar."""
        return self._mixed_loss(self.model(images), labels, other, share)

    def _mixed_loss(
        self, logits: Tensor, labels: Tensor, other: Tensor | None, share: float
    ) -> Tensor:
        """share * loss(logits, labels) + (1 - share) * loss(logits, other)."""
        logits = parallel.whole(logits, len(labels))
        loss = self.loss(logits, labels)
        if other is None:
            return loss
        return share * loss + (1 - share) * self.loss(logits, other)

    def _groups(self, labels: Tensor, other: Tensor | None, share: float) -> Tensor:
        """The class group of each image, int64 [N]; of a mixed one, that of the larger share."""
        return self.class_group[parallel.own(labels if other is None or share >= 0.5 else other)]


class RoutedPath(SinglePath):
    """As `SinglePath`, with each image routed to its class group in the norm layers.

    A mixed image goes to the class group of the label that has the larger share of it.
    """

    def forward(
        self, images: Tensor, labels: Tensor, other: Tensor | None = None, share: float = 1.0
    ) -> Tensor:
        """A batch (see `Batch`) -> scalar."""
        with route(self.model, self._groups(labels, other, share)):
            return super().forward(images, labels, other, share)
