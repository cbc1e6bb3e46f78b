"""A run's statistics computed anew over its training set, naturally or class-balanced sampled."""

import copy
from functools import partial
from typing import Literal

import torch
from torch import nn

from ltnorm.data.files import workers_watched
from ltnorm.data.prepared import PreparedSet
from ltnorm.data.sampling import balanced
from ltnorm.norms.recalibrate import recalibrating
from ltnorm.recipe import Recipe
from ltnorm.training.build import build_loader, build_objective

Sampling = Literal["natural", "balanced"]
# Training counts its epochs from 1: this one's order and augmentation were never seen.
EPOCH = 0


def recalibrated(
    recipe: Recipe, model: nn.Module, data: PreparedSet, sampling: Sampling, device: torch.device
) -> nn.Module:
    """A copy of a trained model with statistics averaged over one pass of its training set.

    The pass is the training objective's, without gradient, on batches of the size and the
    augmentation of training: routed norms are routed, and compound BN takes both of its paths.
    "natural" takes every image once, "balanced" draws as many, each class equally often; the
    sampler of training has no part in either.

    Raises:
        ValueError: a norm without running statistics.
    """
    model = copy.deepcopy(model)
    loader = build_loader(recipe, data, data.open("train"), device)
    loader.sampler = partial(balanced, data.counts) if sampling == "balanced" else None
    objective = build_objective(recipe, model, data.counts).to(device)
    with recalibrating(model), workers_watched():
        for batch in loader.epoch(EPOCH):
            objective(*batch)
    return model.eval()
