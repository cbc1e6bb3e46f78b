"""Optimizers, learning-rate schedules, budgets, and averages of weights.

The optimizers are torch's, by their functional forms: `torch.optim.SGD` and the others make the
same updates, bit for bit, but to create one imports torch's compiler, which takes longer than a
short run.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from ltnorm.recipe import Train


def part_done(train: Train, epochs: int, steps: int, seconds: float) -> float:
    """The part of the budget that is done after so many whole epochs, steps and seconds."""
    if train.steps:
        return steps / train.steps
    if train.seconds:
        return seconds / train.seconds
    assert train.epochs is not None
    return epochs / train.epochs


def learning_rate(train: Train, epoch: int, done: float) -> float:
    """The learning rate of an epoch, which counts from 1, or of a step of another budget.

    Warm-up: lr * epoch / warmup_epochs; of a budget of steps or seconds from lr / 100 linearly,
    over `warmup`, a part of it. Then
        step    lr * decay^k after the k-th milestone (a part of the budget)
        cosine  lr / 2 * (1 + cos(pi * t)), t from 0 after warm-up towards 1
    The step schedule with its defaults is LDAM-DRW's: at 200 epochs, 0.1 in 6 .. 160, 0.001 in
    161 .. 180 and 0.00001 from 181 (arXiv 1906.07413).

    Args:
        train: the settings.
        epoch: which.
        done: the part of the budget that is done when the epoch, or the step, starts.
    """
    if train.epochs:
        if epoch <= train.warmup_epochs:
            return train.lr * epoch / train.warmup_epochs
        warm = train.warmup_epochs / train.epochs
    else:
        warm = train.warmup
        if done < warm:
            return train.lr * (0.01 + 0.99 * done / warm)
    if train.schedule == "cosine":
        t = (done - warm) / (1 - warm)
        return train.lr / 2 * (1 + math.cos(math.pi * t))
    # Rounding may leave a part a little short of its milestone.
    passed = sum(done > milestone - 1e-9 for milestone in train.milestones)
    return train.lr * train.decay**passed


class Optimizer:
    """What takes a step downhill; `lr` is an attribute, set before each step.

    Args:
        train: the settings.
        parameters: those that need no gradient are left out, and those without one of a step.
        undecayed: those of them without weight decay.
    """

    def __init__(
        self,
        train: Train,
        parameters: Iterable[nn.Parameter],
        undecayed: Iterable[nn.Parameter] = (),
    ) -> None:
        self.train, self.lr = train, train.lr
        self.parameters = [p for p in parameters if p.requires_grad]
        spared = set(undecayed)
        self.groups = [
            ([p for p in self.parameters if p not in spared], train.weight_decay),
            ([p for p in self.parameters if p in spared], 0.0),
        ]
        self.state: dict[nn.Parameter, tuple[Tensor | None, ...]] = {}
        self._rate: Tensor | None = None

    def rate_on_device(self) -> None:
        """Have the learning rate where the weights are, for steps that a graph repeats."""
        if self._rate is None:
            self._rate = torch.zeros((), device=self.parameters[0].device)
            state, self.state = self.state_dict(), {}
            self.load_state_dict(state)  # what it counts is there, too
        self._rate.fill_(self.lr)

    @property
    def _where(self) -> dict[str, Any]:
        """The learning rate for torch's functions: a number, or a tensor that kernels read."""
        return {"lr": self.lr} if self._rate is None else {"lr": self._rate, "fused": True}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for parameters, weight_decay in self.groups:
            if used := [p for p in parameters if p.grad is not None]:
                self._update(used, [p.grad for p in used], weight_decay)

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], decay: float) -> None:
        raise NotImplementedError

    def state_dict(self) -> list[tuple[Tensor | None, ...] | None]:
        """What it has gathered for each of its parameters."""
        return [self.state.get(parameter) for parameter in self.parameters]

    def load_state_dict(self, state: Sequence[tuple[Tensor | None, ...] | None]) -> None:
        """Take what `state_dict` gave, wherever it lies."""
        self.state = {
            parameter: tuple(self._placed(i, value, parameter) for i, value in enumerate(values))
            for parameter, values in zip(self.parameters, state, strict=True)
            if values is not None
        }

    def _placed(self, i: int, value: Tensor | None, parameter: nn.Parameter) -> Tensor | None:
        """The i-th value for a parameter, where it has to lie."""
        return None if value is None else value.to(parameter.device)


class SGD(Optimizer):
    """v = momentum v + (g + weight_decay p); p = p - lr v."""

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], decay: float) -> None:
        buffers = [self.state.get(p, (None,))[0] for p in parameters]
        sgd(
            parameters,
            gradients,
            buffers,
            **self._where,
            momentum=self.train.momentum,
            nesterov=self.train.nesterov,
            weight_decay=decay,
            dampening=0.0,
            maximize=False,
        )
        self.state |= {p: (buffer,) for p, buffer in zip(parameters, buffers, strict=True)}


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], decay: float) -> None:
        for p in parameters:
            if p not in self.state:
                start = torch.zeros_like(p), torch.zeros_like(p), torch.tensor(0.0)
                self.state[p] = tuple(self._placed(i, value, p) for i, value in enumerate(start))
        means, squares, steps = zip(*(self.state[p] for p in parameters), strict=True)
        beta1, beta2 = self.train.betas
        adamw(
            parameters,
            gradients,
            list(means),
            list(squares),
            [],
            list(steps),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            **self._where,
            capturable=self._rate is not None,
            weight_decay=decay,
            eps=1e-8,
            maximize=False,
        )

    def _placed(self, i: int, value: Tensor | None, parameter: nn.Parameter) -> Tensor | None:
        if i == 2 and self._rate is None:  # steps: on the CPU
            return value.cpu()
        return super()._placed(i, value, parameter)


def build(
    train: Train, parameters: Iterable[nn.Parameter], undecayed: Iterable[nn.Parameter] = ()
) -> Optimizer:
    """The optimizer of the settings (SAM takes SGD's steps, with other gradients)."""
    kind = AdamW if train.optimizer == "adamw" else SGD
    return kind(train, parameters, () if train.decay_norm else undecayed)


@contextmanager
def uphill(parameters: Iterable[nn.Parameter], rho: float) -> Iterator[None]:
    """Inside, the weights are moved by rho along their gradient: p + rho g / |g|.

    The gradient there is that of SAM (Foret et al. 2021, arXiv 2010.01412).
    """
    moved = [p for p in parameters if p.grad is not None]
    before = [p.detach().clone() for p in moved]
    gradients = [p.grad for p in moved]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    with torch.no_grad():
        torch._foreach_add_(moved, torch._foreach_mul(gradients, rho / (norm + 1e-12)))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(moved, before)


def buffers(module: nn.Module) -> list[Tensor]:
    """A copy of a module's buffers: its running statistics."""
    return [b.clone() for b in module.buffers()]


@contextmanager
def with_buffers(module: nn.Module, values: list[Tensor]) -> Iterator[None]:
    """Inside, a module has these buffers; what forwards do to them leaves no trace."""
    now = buffers(module)
    try:
        _set_buffers(module, values)
        yield
    finally:
        _set_buffers(module, now)


def _set_buffers(module: nn.Module, values: list[Tensor]) -> None:
    for buffer, value in zip(module.buffers(), values, strict=True):
        buffer.copy_(value)


class Average:
    """A moving average of a model's weights and running statistics, from which to evaluate.

    a = d a + (1 - d) p, in its n-th update with d = min(decay, n / (9 + n)), and a = p in the
    first: the steps of the start, which matter least, do not weigh most. Counters are copied.
    (torch's AveragedModel asks the device for n at every step.)

    Attributes:
        model: the averaged copy.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.updates = copy.deepcopy(model), decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model as it is now."""
        self.updates += 1
        decay = min(self.decay, self.updates / (9 + self.updates)) if self.updates > 1 else 0.0
        mine, theirs = (chain(m.parameters(), m.buffers()) for m in (self.model, model))
        pairs = list(zip(mine, theirs, strict=True))
        averaged, current = zip(*(p for p in pairs if p[0].is_floating_point()), strict=True)
        torch._foreach_lerp_(averaged, current, 1 - decay)
        for counter, now in pairs:
            if not counter.is_floating_point():
                counter.copy_(now)

    def state_dict(self) -> dict[str, Any]:
        """The average and how many updates it has had."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]
