"""A run's statistics computed anew over its training set, naturally or class-balanced sampled."""

import copy
from typing import Literal

import numpy as np
import torch
from torch import nn

from ltnorm.data.prepare import PreparedSet
from ltnorm.norms.recalibrate import recalibrating
from ltnorm.recipe import Recipe
from ltnorm.training.run import build_loader, build_objective

Sampling = Literal["natural", "balanced"]
# Training counts its epochs from 1: this one's order and augmentation were never seen.
EPOCH = 0


def balanced_sample(labels: np.ndarray, seed: int) -> np.ndarray:
    """Indices of as many images as there are, each class as often as any other (or one more).

    Whole rounds over a class's images, and a random part of the last, so that no image is drawn
    twice more than another of its class.
    """
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    sizes = np.full(len(classes), len(labels) // len(classes))
    sizes[: len(labels) % len(classes)] += 1
    drawn = []
    for c, size in zip(classes, sizes, strict=True):
        own = np.flatnonzero(labels == c)
        rounds = [rng.permutation(own) for _ in range(-(-size // len(own)))]
        drawn.append(np.concatenate(rounds)[:size])
    return np.concatenate(drawn)


def recalibrated(
    recipe: Recipe, model: nn.Module, data: PreparedSet, sampling: Sampling, device: torch.device
) -> nn.Module:
    """A copy of a trained model with statistics averaged over one pass of its training set.

    The pass is the training objective's, without gradient, on batches of the size and the
    augmentation of training: routed norms are routed, and compound BN takes both of its paths.
    "balanced" draws as many images, each class equally often.

    Raises:
        ValueError: a norm without running statistics.
    """
    images, labels = data.load("train")
    if sampling == "balanced":
        chosen = balanced_sample(labels, recipe.seed)
        images, labels = images[chosen], labels[chosen]
    model = copy.deepcopy(model)
    loader = build_loader(recipe, data, images, labels, device)
    objective = build_objective(recipe, model, data.counts).to(device)
    with recalibrating(model):
        for batch in loader.epoch(EPOCH):
            objective(*batch)
    return model.eval()
