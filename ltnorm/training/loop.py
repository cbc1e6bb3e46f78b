"""The training loop."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ltnorm.console import TrainingProgress
from ltnorm.data.loader import Loader
from ltnorm.errors import LtnormError
from ltnorm.recipe import Train
from ltnorm.training import optim
from ltnorm.training.objective import SinglePath


@dataclass(frozen=True)
class Epoch:
    """One row of epochs.csv."""

    epoch: int
    lr: float
    loss: float
    seconds: float
    images_per_second: float
    accuracy: float | None = None  # where it was measured


def diverged(epoch: int, step: int, loss: float, train: Train) -> LtnormError:
    """The error for a loss that is not finite."""
    advice = f"lower the learning rate (--lr {train.lr / 2:g}), or raise train.warmup_epochs"
    if train.precision != "fp32":
        advice += ", or try --precision fp32"
    return LtnormError(f"the loss became {loss} in epoch {epoch}, step {step}", advice)


def step(
    objective: SinglePath, optimizer: optim.SGD, images: Tensor, labels: Tensor, bf16: bool
) -> Tensor:
    """One update of the weights. Returns the loss, which is still on the device."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        loss = objective(images, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def fit(
    objective: SinglePath,
    loader: Loader,
    train: Train,
    progress: TrainingProgress,
    measure: Callable[[int], float | None] = lambda epoch: None,
) -> list[Epoch]:
    """Train `objective` for train.epochs epochs.

    Args:
        objective: the model, the loss, and how they are put together.
        loader: the training batches.
        train: the optimization settings.
        progress: told of every step and epoch.
        measure: called after every epoch, outside the clock; may return an accuracy.

    Raises:
        LtnormError: the loss became infinite or NaN.
    """
    optimizer = optim.SGD(train, objective.parameters())
    bf16 = train.precision == "bf16"
    epochs = []
    for epoch in range(1, train.epochs + 1):
        objective.train()
        lr = optim.learning_rate(train, epoch)
        optimizer.lr = lr
        losses: list[Tensor] = []
        start, images_done = time.perf_counter(), 0
        for images, labels in loader.epoch(epoch):
            losses.append(step(objective, optimizer, images, labels, bf16))
            images_done += len(labels)
            if progress.due():
                _check(losses[-1:], epoch, len(losses) - 1, train)
                speed = images_done / (time.perf_counter() - start)
                done = (epoch - 1) * len(loader) + len(losses)
                progress.step(done, epoch, float(losses[-1]), speed)
        mean = _check(losses, epoch, 0, train)
        seconds = time.perf_counter() - start
        epochs.append(Epoch(epoch, lr, mean, seconds, images_done / seconds, measure(epoch)))
        progress.epoch(epoch, mean, lr, images_done / seconds)
    return epochs


def _check(losses: list[Tensor], epoch: int, first: int, train: Train) -> float:
    """The mean of `losses`, all finite; reading them waits for the device, so it is done rarely."""
    values = torch.stack(losses).float()
    bad = torch.nonzero(~values.isfinite())
    if len(bad):
        step = int(bad[0])
        raise diverged(epoch, first + step + 1, float(values[step]), train)
    return float(values.mean())
