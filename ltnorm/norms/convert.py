"""Swapping the normalization of a model that exists already."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


def convert_norm(
    model: nn.Module,
    norm: str | Callable[[int], nn.Module],
    *,
    only: str | Iterable[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Replace every BatchNorm1d, BatchNorm2d and SyncBatchNorm of a model by another norm.

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
        norm: a name, see `ltnorm list norms`, or a function from channels to a new layer, such as
            `norm_layer` gives, which decides on eps and momentum by itself.
        only: the path or paths of those that are replaced, as `named_modules` has them; None is
            all.
        options: of the norm, as for `norm_layer`; only with a name.

    Returns:
        The model.

    Raises:
        UsageError: no such norm.
        ValueError: no such layer in the model, or none at a path of `only`, one without running
            statistics, or an option that the norm lacks. Nothing is changed then.
    """
    make = _maker(norm, options)
    found = dict(model.named_modules(remove_duplicate=False))
    found = {path: m for path, m in found.items() if isinstance(m, BATCH_NORMS)}
    if not found:
        kinds = ", ".join(kind.__name__ for kind in BATCH_NORMS)
        raise ValueError(f"the model has no batch normalization to replace ({kinds})")
    if only is not None:
        wanted = {only} if isinstance(only, str) else set(only)
        if missing := sorted(wanted - set(found)):
            raise ValueError(f"no batch normalization at '{missing[0]}'")
        if not wanted:
            raise ValueError("only: no path, so that nothing would be replaced")
        chosen = {found[path] for path in wanted}  # a shared layer by all its paths
        found = {path: m for path, m in found.items() if m in chosen}
    paths = {m: path for path, m in reversed(found.items())}  # a shared layer stays shared
    new = {m: _converted(path, m, make) for m, path in paths.items()}
    made = {path: new[m] for path, m in found.items()}
    if "" in made:
        return made[""]
    for path, layer in made.items():
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
    return model


def _maker(
    norm: str | Callable[[int], nn.Module], options: dict[str, Any]
) -> Callable[[str, nn.Module], nn.Module]:
    """What makes the layer for a path and its source, but for what is carried over."""
    from ltnorm import registry
    from ltnorm.norms import norm_layer

    if not isinstance(norm, str):
        if options:
            raise ValueError(f"options ({', '.join(options)}) go with the name of a norm")
        return lambda path, source: norm(source.num_features)
    norm_layer(norm, **options)  # what is wrong with these, before any layer
    known = registry.options_model("norm", norm).model_fields

    def make(path: str, source: nn.Module) -> nn.Module:
        carried = {"eps": source.eps, "momentum": source.momentum}
        carried = {k: v for k, v in carried.items() if k in known and v is not None}
        try:
            return norm_layer(norm, **{**carried, **options})(source.num_features)
        except ValueError as error:
            raise ValueError(f"layer '{path}', with its own eps and momentum: {error}") from error

    return make


def _converted(
    path: str, source: nn.Module, make: Callable[[str, nn.Module], nn.Module]
) -> nn.Module:
    if source.running_mean is None:
        raise ValueError(
            f"layer '{path}' has no running statistics to carry over: make it with "
            "track_running_stats=True"
        )
    layer = make(path, source)
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
    """What both layers have: [C], or any shape of as many numbers, or broadcast over components."""
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
            same = parameter.numel() == len(ones)  # [C, 1, 1], say
            value = values[key]
            parameter.copy_(value.view_as(parameter) if same else value.expand_as(parameter))
        parameter.requires_grad_(own is not None and own.requires_grad)
    for key in ("running_mean", "running_var"):
        if getattr(layer, key, None) is not None:
            getattr(layer, key).copy_(getattr(source, key))
    if getattr(layer, "components", 1) == 1 and hasattr(layer, "num_batches_tracked"):
        layer.num_batches_tracked.copy_(source.num_batches_tracked)
