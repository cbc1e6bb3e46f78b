"""The training loop."""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ltnorm import parallel
from ltnorm.console import TrainingProgress
from ltnorm.data.augment import Batch
from ltnorm.data.loader import Loader
from ltnorm.errors import LtnormError
from ltnorm.recipe import Train
from ltnorm.training import distributed, optim
from ltnorm.training.clock import CLOCK
from ltnorm.training.objective import SinglePath
from ltnorm.training.position import Epoch, Position
from ltnorm.training.resume import Keeper

T = TypeVar("T")


@dataclass(frozen=True)
class Update:
    """A step that a training is to make: one update of the weights by a batch."""

    objective: SinglePath
    optimizer: optim.Optimizer
    batch: Batch
    train: Train

    def make(self) -> Tensor:
        """Make it. Returns the loss, which is still on the device."""
        return step(self.objective, self.optimizer, self.batch, self.train)


@dataclass(frozen=True)
class Made:
    """What has become of an update: the loss, on the device.

    `share` is the part of the time that is this training's: of several that are made together
    (see `training.together`) each has an equal one.
    """

    loss: Tensor
    share: float = 1.0


# A training that gives its steps away, see `training.together`.
Steps = Generator[Update, Made, T]


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
    parallel.as_first(b for b in objective.buffers() if b.is_floating_point())
    return loss.detach()


def _gradients(
    objective: SinglePath, optimizer: optim.Optimizer, batch: Batch, train: Train
) -> Tensor:
    bf16 = train.precision == "bf16"
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=bf16):
        loss = objective(*batch)
    optimizer.zero_grad()
    loss.backward()
    parallel.sum_gradients(optimizer.parameters)
    return loss


def fit(
    objective: SinglePath,
    loader: Loader,
    train: Train,
    progress: TrainingProgress,
    *,
    undecayed: Iterable[nn.Parameter] = (),
    average: optim.Average | None = None,
    measure: Callable[[int], float | None] = lambda epoch: None,
    keeper: Keeper | None = None,
    on_epoch: Callable[[Epoch], None] = lambda row: None,
) -> Steps[list[Epoch]]:
    """Train `objective` until the budget is spent; `together.alone` makes its steps.

    With a budget of epochs the learning rate and the class weights change between epochs, as in
    LDAM-DRW; with one of steps or seconds, at every step. The sampler changes between epochs.

    On several ranks all do the same steps, and what depends on a clock or is told to people is
    rank 0's.

    Args:
        objective: the model, the loss, and how they are put together.
        loader: the training batches.
        train: the optimization settings.
        progress: told of every step and epoch.
        undecayed: parameters without weight decay if `train.decay_norm` is off.
        average: of the model's weights; follows every step.
        measure: called after every epoch, outside the clock; may return an accuracy.
        keeper: of the state, from which the training goes on; None keeps nothing.
        on_epoch: called with the row of every epoch.

    Raises:
        LtnormError: the loss became infinite or NaN.
    """
    distributed.start_alike(objective)
    optimizer = optim.build(train, objective.parameters(), undecayed)
    keeper = keeper or Keeper()
    with keeper.training(objective, optimizer, average) as at:
        while _part_done(train, at) < 1:
            epoch = len(at.epochs) + 1
            mean = yield from _epoch(
                objective, optimizer, loader, train, progress, average, keeper, at
            )
            speed = at.images / at.seconds
            done = len(at.losses), at.images, at.seconds
            with CLOCK.stopped():
                accuracy = distributed.from_first(partial(measure, epoch))
                at.close(Epoch(epoch, at.lr, mean, *done, speed, accuracy))
                on_epoch(at.epochs[-1])
                progress.epoch(_part_done(train, at), epoch, mean, at.lr, speed)
                keeper.keep(at)
    return at.epochs


def _part_done(train: Train, at: Position) -> float:
    return optim.part_done(train, len(at.epochs), at.steps, at.spent)


def _epoch(
    objective: SinglePath,
    optimizer: optim.Optimizer,
    loader: Loader,
    train: Train,
    progress: TrainingProgress,
    average: optim.Average | None,
    keeper: Keeper,
    at: Position,
) -> Steps[float]:
    """The rest of an epoch, or of the budget; moves `at` and returns the mean loss."""
    epoch, before, spent = len(at.epochs) + 1, at.steps - len(at.losses), at.spent - at.seconds
    objective.train()
    done = optim.part_done(train, epoch - 1, before, spent)
    objective.set_progress(done)
    batches = loader.epoch(epoch, done, first=len(at.losses))
    done = _part_done(train, at)
    last, share = CLOCK.now(), 1.0

    def now() -> tuple[float, bool, bool]:
        """The seconds of this epoch; whether people are to hear of it, and it is to be kept."""
        nonlocal last
        since, last = last, CLOCK.now()
        return at.seconds + share * (last - since), progress.due(), keeper.due(at)

    def check(first: int) -> float:
        """Of the losses from the `first`."""
        return distributed.from_first(partial(_check, at.losses[first:], epoch, first, train))

    for batch in batches:
        optimizer.lr = at.lr = optim.learning_rate(train, epoch, done)
        if not train.epochs:
            objective.set_progress(done)
        distributed.draw_apart(loader.seed, epoch, 4, len(at.losses))
        made = yield Update(objective, optimizer, batch, train)
        at.losses.append(made.loss)
        share = made.share
        if average:
            average.update(objective.model)
        at.images += len(batch.labels)
        at.seconds, heard, kept = distributed.clock(now)
        done = optim.part_done(train, epoch - 1, before + len(at.losses), spent + at.seconds)
        if heard:
            check(len(at.losses) - 1)
            part = len(at.losses) / len(loader) / train.epochs if train.epochs else 0.0
            progress.step(done + part, epoch, float(at.losses[-1]), at.images / at.seconds)
        if done >= 1:
            break
        if kept:
            check(0)
            at.seconds, *_ = distributed.clock(now)
            with CLOCK.stopped():
                keeper.keep(at)
    mean = check(0)
    at.seconds, *_ = distributed.clock(now)
    return mean


def _check(losses: list[Tensor], epoch: int, first: int, train: Train) -> float:
    """The mean of `losses`, all finite; reading them waits for the device, so it is done rarely."""
    values = torch.stack(losses).float()
    bad = torch.nonzero(~values.isfinite())
    if len(bad):
        step = int(bad[0])
        raise diverged(epoch, first + step + 1, float(values[step]), train)
    return float(values.mean())
