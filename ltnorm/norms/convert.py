"""Swapping the normalization of a model that exists already."""

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

_BatchNorm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


def convert_norm(model: nn.Module, name: str, **options: Any) -> nn.Module:
    """Replace every BatchNorm1d, BatchNorm2d and SyncBatchNorm of a model by the norm `name`.

    Weights, running statistics, eps and momentum are carried over (eps and momentum unless
    given), so that a norm with running statistics gives the same evaluation output as before,
    until it is trained. The K components of a mixture all start at the source's statistics; its
    first training step spreads them, over the class groups or the quantiles of the batch. Norms
    without running statistics keep weight and bias; what they compute is another function.

    Layers with an activation of their own (timm's BatchNormAct2d) keep it, after the norm, and are
    named `norm` and `act` below their old name: load pretrained weights before converting. A
    source without weight and bias gets ones and zeros that are not trained.

    Args:
        model: changed in place; a bare BatchNorm cannot be, so use what is returned.
        name: see `ltnorm list norms`.
        options: of the norm, as for `norm_layer`.

    Returns:
        The model.

    Raises:
        ValueError: no such layer in the model, one without running statistics, or an option that
            the norm lacks. Nothing is changed then.
    """
    from ltnorm.norms import norm_layer

    norm_layer(name, **options)  # what is wrong with these, before any layer
    found = dict(model.named_modules(remove_duplicate=False))
    found = {path: m for path, m in found.items() if isinstance(m, _BatchNorm)}
    if not found:
        kinds = ", ".join(kind.__name__ for kind in _BatchNorm)
        raise ValueError(f"the model has no batch normalization to replace ({kinds})")
    paths = {m: path for path, m in reversed(found.items())}  # a shared layer stays shared
    new = {m: _converted(path, m, name, options) for m, path in paths.items()}
    made = {path: new[m] for path, m in found.items()}
    if "" in made:
        return made[""]
    for path, layer in made.items():
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
    return model


def _converted(path: str, source: nn.Module, name: str, options: dict[str, Any]) -> nn.Module:
    from ltnorm import registry
    from ltnorm.norms import norm_layer

    if source.running_mean is None:
        raise ValueError(
            f"layer '{path}' has no running statistics to carry over: make it with "
            "track_running_stats=True"
        )
    carried = {"eps": source.eps, "momentum": source.momentum}
    known = registry.options_model("norm", name).model_fields
    carried = {k: v for k, v in carried.items() if k in known and v is not None}
    try:
        layer = norm_layer(name, **{**carried, **options})(source.num_features)
    except ValueError as error:
        raise ValueError(f"layer '{path}', with its own eps and momentum: {error}") from error
    layer.to(source.running_mean.device, source.running_mean.dtype)
    _carry(source, layer)
    layer.train(source.training)
    rest = activation_of(source)
    return nn.Sequential(OrderedDict([("norm", layer), *rest])) if rest else layer


def activation_of(norm: nn.Module) -> list[tuple[str, nn.Module]]:
    """What a layer does after normalizing (timm's BatchNormAct2d), by name; mostly nothing."""
    rest = [(key, getattr(norm, key, None)) for key in ("drop", "act")]
    return [(k, m) for k, m in rest if m is not None and not isinstance(m, nn.Identity)]


@torch.no_grad()
def _carry(source: nn.Module, layer: nn.Module) -> None:
    """What both layers have, broadcast over components."""
    ones = torch.ones_like(source.running_mean)
    given = {"weight": (source.weight, ones), "bias": (source.bias, torch.zeros_like(ones))}
    values = {key: default if own is None else own for key, (own, default) in given.items()}
    if hasattr(layer, "set_affine"):
        layer.set_affine(**values)
    for name, parameter in layer.named_parameters():
        key = name.partition("_")[0]  # weight, or what scales it
        if key not in given:
            continue
        own, _ = given[key]
        if not hasattr(layer, "set_affine"):
            parameter.copy_(values[key].expand_as(parameter))
        parameter.requires_grad_(own is not None and own.requires_grad)
    for key in ("running_mean", "running_var"):
        if getattr(layer, key, None) is not None:
            getattr(layer, key).copy_(getattr(source, key))
    if getattr(layer, "components", 1) == 1 and hasattr(layer, "num_batches_tracked"):
        layer.num_batches_tracked.copy_(source.num_batches_tracked)
