"""Training objectives: what a batch's loss is, given the model and the loss function.

A norm names its objective in the registry; keyword-only parameters become options of the norm.
"""

from torch import Tensor, nn

from ltnorm.norms import route


class SinglePath(nn.Module):
    """loss(model(images), labels): one forward and one backward of the batch.

    Args:
        model: the network.
        loss: (logits [N, C], labels [N]) -> scalar.
        class_group: the class group of each class for the norm layers, int64 [C].
    """

    def __init__(self, model: nn.Module, loss: nn.Module, class_group: Tensor) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.class_group: Tensor
        self.register_buffer("class_group", class_group)

    @property
    def cost(self) -> tuple[int, int]:
        """How often each image passes forward and backward."""
        return 1, 1

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """images [N, 3, H, W], labels int64 [N] -> scalar."""
        return self.loss(self.model(images), labels)


class RoutedPath(SinglePath):
    """As `SinglePath`, with each image routed to its class group in the norm layers."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """images [N, 3, H, W], labels int64 [N] -> scalar."""
        with route(self.model, self.class_group[labels]):
            return super().forward(images, labels)
