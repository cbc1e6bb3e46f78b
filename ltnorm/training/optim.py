"""Optimizer and learning-rate schedules."""

import math
from collections.abc import Iterable

import torch
from torch import nn

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


def build(train: Train, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum, weight decay on everything."""
    return torch.optim.SGD(
        parameters,
        lr=train.lr,
        momentum=train.momentum,
        nesterov=train.nesterov,
        weight_decay=train.weight_decay,
    )
