"""The training loop."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ltnorm.console import TrainingProgress
from ltnorm.data.augment import Batch
from ltnorm.data.loader import Loader
from ltnorm.errors import LtnormError
from ltnorm.recipe import Train
from ltnorm.training import optim
from ltnorm.training.objective import SinglePath


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


def diverged(epoch: int, step: int, loss: float, train: Train) -> LtnormError:
    """The error for a loss that is not finite."""
    warm_up = "warmup_epochs" if train.epochs else "warmup"
    advice = f"lower the learning rate (--lr {train.lr / 2:g})"
    if getattr(train, warm_up):  # a second stage has none
        advice += f", or raise train.{warm_up}"
    if train.precision != "fp32":
        advice += ", or try --precision fp32"
    return LtnormError(f"the loss became {loss} in epoch {epoch}, step {step}", advice)


def step(objective: SinglePath, optimizer: optim.Optimizer, batch: Batch, train: Train) -> Tensor:
    """One update of the weights. Returns the loss, which is still on the device."""
    sam = train.optimizer == "sam"
    # Uphill the same function is asked again, from the same running statistics.
    before = optim.buffers(objective) if sam else []
    loss = _gradients(objective, optimizer, batch, train)
    if sam:
        with (
            optim.uphill(optimizer.parameters, train.sam_rho),
            optim.with_buffers(objective, before),
        ):
            _gradients(objective, optimizer, batch, train)
    if train.clip_grad:
        clip_grad_norm_(optimizer.parameters, train.clip_grad)
    optimizer.step()
    return loss.detach()


def _gradients(
    objective: SinglePath, optimizer: optim.Optimizer, batch: Batch, train: Train
) -> Tensor:
    bf16 = train.precision == "bf16"
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=bf16):
        loss = objective(*batch)
    optimizer.zero_grad()
    loss.backward()
    return loss


def fit(
    objective: SinglePath,
    loader: Loader,
    train: Train,
    progress: TrainingProgress,
    *,
    undecayed: Iterable[nn.Parameter] = (),
    after_step: Callable[[], None] = lambda: None,
    measure: Callable[[int], float | None] = lambda epoch: None,
) -> list[Epoch]:
    """Train `objective` until the budget is spent.

    With a budget of epochs the learning rate and the class weights change between epochs, as in
    LDAM-DRW; with one of steps or seconds, at every step. The sampler changes between epochs.

    Args:
        objective: the model, the loss, and how they are put together.
        loader: the training batches.
        train: the optimization settings.
        progress: told of every step and epoch.
        undecayed: parameters without weight decay if `train.decay_norm` is off.
        after_step: called after every step, on the clock.
        measure: called after every epoch, outside the clock; may return an accuracy.

    Raises:
        LtnormError: the loss became infinite or NaN.
    """
    optimizer = optim.build(train, objective.parameters(), undecayed)
    epochs: list[Epoch] = []
    steps, spent = 0, 0.0
    for epoch in count(1):
        objective.train()
        done = optim.part_done(train, epoch - 1, steps, spent)
        optimizer.lr = optim.learning_rate(train, epoch, done)
        objective.set_progress(done)
        losses: list[Tensor] = []
        start, images = time.perf_counter(), 0
        for batch in loader.epoch(epoch, done):
            if not train.epochs:
                optimizer.lr = optim.learning_rate(train, epoch, done)
                objective.set_progress(done)
            losses.append(step(objective, optimizer, batch, train))
            after_step()
            images += len(batch.labels)
            seconds = time.perf_counter() - start
            done = optim.part_done(train, epoch - 1, steps + len(losses), spent + seconds)
            if progress.due():
                _check(losses[-1:], epoch, len(losses) - 1, train)
                part = len(losses) / len(loader) / train.epochs if train.epochs else 0.0
                progress.step(done + part, epoch, float(losses[-1]), images / seconds)
            if done >= 1:
                break
        mean = _check(losses, epoch, 0, train)
        seconds = time.perf_counter() - start
        steps, spent = steps + len(losses), spent + seconds
        accuracy = measure(epoch)
        speed = images / seconds
        lr = optimizer.lr
        epochs.append(Epoch(epoch, lr, mean, len(losses), images, seconds, speed, accuracy))
        done = optim.part_done(train, epoch, steps, spent)
        progress.epoch(done, epoch, mean, lr, speed)
        if done >= 1:
            return epochs
    raise AssertionError("unreachable")


def _check(losses: list[Tensor], epoch: int, first: int, train: Train) -> float:
    """The mean of `losses`, all finite; reading them waits for the device, so it is done rarely."""
    values = torch.stack(losses).float()
    bad = torch.nonzero(~values.isfinite())
    if len(bad):
        step = int(bad[0])
        raise diverged(epoch, first + step + 1, float(values[step]), train)
    return float(values.mean())
