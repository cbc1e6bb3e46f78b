"""How far a training is: its epochs, and the steps since."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Epoch:
    """One row of epochs.csv. The last epoch of a budget of steps or seconds may be a part of one.

    Attributes:
        epoch: from 1.
        lr: its learning rate, or that of its last step.
        loss: the mean of its steps.
        steps, images: what it had.
        seconds, images_per_second: of training alone.
        accuracy: where it was measured.
    """

    epoch: int
    lr: float
    loss: float
    steps: int
    images: int
    seconds: float
    images_per_second: float
    accuracy: float | None = None


@dataclass
class Position:
    """How far a training is.

    Attributes:
        epochs: those that are over.
        losses: of the steps of the epoch that is under way, on the device.
        images, seconds: of these steps.
        lr: of the last of them.
    """

    epochs: list[Epoch] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    images: int = 0
    seconds: float = 0.0
    lr: float = 0.0

    @property
    def steps(self) -> int:
        """Of all epochs."""
        return sum(epoch.steps for epoch in self.epochs) + len(self.losses)

    @property
    def spent(self) -> float:
        """The seconds of all epochs."""
        return sum(epoch.seconds for epoch in self.epochs) + self.seconds

    def close(self, epoch: Epoch) -> None:
        """The epoch that was under way is over."""
        self.epochs.append(epoch)
        self.losses, self.images, self.seconds = [], 0, 0.0
