"""Optimizer and learning-rate schedules."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from ltnorm.recipe import Train


def learning_rate(train: Train, epoch: int) -> float:
    """The learning rate of an epoch; epochs count from 1.

    Warm-up: lr * epoch / warmup_epochs. Then
        step    lr * decay^k after the k-th milestone (a fraction of the epochs)
        cosine  lr / 2 * (1 + cos(pi * t)), t from 0 after warm-up towards 1
    The step schedule with its defaults is LDAM-DRW's: at 200 epochs, 0.1 in 6 .. 160, 0.001 in
    161 .. 180 and 0.00001 from 181 (arXiv 1906.07413).
    """
    if epoch <= train.warmup_epochs:
        return train.lr * epoch / train.warmup_epochs
    if train.schedule == "cosine":
        after = train.epochs - train.warmup_epochs
        t = (epoch - 1 - train.warmup_epochs) / after
        return train.lr / 2 * (1 + math.cos(math.pi * t))
    # Rounded, since 0.9 * 200 is not an integer in floating point for every pair of factors.
    passed = sum(epoch > round(m * train.epochs) for m in train.milestones)
    return train.lr * train.decay**passed


class SGD:
    """torch's SGD with momentum, by its functional form; weight decay on everything.

    `torch.optim.SGD` makes the same updates, bit for bit, but to create one imports torch's
    compiler, which takes longer than a short run.

    Args:
        train: momentum, nesterov and weight decay; lr is an attribute, set before each step.
        parameters: those without a gradient are left out of a step.
    """

    def __init__(self, train: Train, parameters: Iterable[nn.Parameter]) -> None:
        self.lr = train.lr
        self.settings = {
            "momentum": train.momentum,
            "nesterov": train.nesterov,
            "weight_decay": train.weight_decay,
        }
        self.parameters = list(parameters)
        self.momentum_buffers: list[Tensor | None] = [None] * len(self.parameters)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        index = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        buffers = [self.momentum_buffers[i] for i in index]
        sgd(
            [self.parameters[i] for i in index],
            [self.parameters[i].grad for i in index],
            buffers,
            lr=self.lr,
            dampening=0.0,
            maximize=False,
            **self.settings,
        )
        for i, buffer in zip(index, buffers, strict=True):
            self.momentum_buffers[i] = buffer
