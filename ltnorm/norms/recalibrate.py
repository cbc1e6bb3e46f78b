"""Running statistics computed anew after training, with the weights as they are."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ltnorm.norms.routing import route


def running_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that keep running statistics."""
    return [m for m in model.modules() if getattr(m, "running_mean", None) is not None]


@contextmanager
def recalibrating(model: nn.Module) -> Iterator[None]:
    """Training forwards inside average their batch statistics, instead of a moving average.

    The n-th batch enters with momentum 1 / n, so that all count alike and what was there before
    counts no more; a mixture takes a step of EM of that size. Only layers with running
    statistics are in training mode inside: what they see is what evaluation computes.

    Raises:
        ValueError: the model has no running statistics.
    """
    layers = running_layers(model)
    if not layers:
        raise ValueError("the model has no layer with running statistics")
    modes = [(m, m.training) for m in model.modules()]
    momenta = [layer.momentum for layer in layers]
    correcting = [layer for layer in layers if getattr(layer, "corrects", False)]
    seen = dict.fromkeys(layers, 0)

    def count(layer: nn.Module, inputs: Any) -> None:
        seen[layer] += 1
        layer.momentum = 1 / seen[layer]

    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        model.eval()
        for layer in layers:
            layer.train()
        for layer in correcting:  # towards the very moments that are to count no more
            layer.corrects = False
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in correcting:
            layer.corrects = True
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, training in modes:
            module.training = training


def recalibrate(model: nn.Module, batches: Iterable[Tensor | tuple[Tensor, Tensor]]) -> None:
    """Compute a model's running statistics anew, as averages over batches of training images.

    Moving averages lag behind the weights, and follow the last batches most; averages over many
    batches at fixed weights do not ("PreciseBN": Wu & Johnson 2021, arXiv 2105.07576). Sampled
    otherwise than in training, class by class equally, say, they also show what statistics
    dominated by frequent classes cost the rare ones. Weights stay as they are.

    Args:
        model: changed in place; any layer with running statistics, torch's own included.
        batches: images, or (images, groups) to route them (see `route`).

    Raises:
        ValueError: the model has no running statistics, or there is no batch.

    Example:
        recalibrate(model, (images for images, _ in loader))
    """
    done = 0
    with recalibrating(model):
        for batch in batches:
            images, groups = batch if isinstance(batch, tuple | list) else (batch, None)
            with nullcontext() if groups is None else route(model, groups):
                model(images)
            done += 1
    if not done:
        raise ValueError("no batch to compute statistics from")
