"""Folding norms into the convolutions before them, for inference."""

import copy
import inspect
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from ltnorm import registry
from ltnorm.norms.convert import activation_of
from ltnorm.norms.functional import accumulation_dtype, as_affine
from ltnorm.norms.layer import ChannelNorm

# Norms of torch whose statistics are those of the image that they normalize.
_PER_IMAGE = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


def fold(model: nn.Module) -> nn.Module:
    """A copy of a model for inference, with each norm folded into the convolution before it.

    A norm whose evaluation is one affine map a channel, y = scale * x + offset, is no work of its
    own after a convolution or linear layer: weight' = scale * weight, bias' = scale * bias +
    offset. That is so for whatever evaluates by pooled statistics: BatchNorm (torch's, and timm's
    BatchNormAct2d, whose activation stays), `compound` with one component, `split` unless it
    evaluates by the posterior. What is before a norm is found by tracing the model's evaluation
    with torch.fx, for the default values of the arguments that have one. The output of a linear
    layer before a norm is taken to be [N, C].

    Args:
        model: left as it is.

    Returns:
        The copy, in evaluation mode, of the same class, each norm replaced by an identity. A
        model without norms is copied only.

    Raises:
        ValueError: some norm cannot be folded. All of them are named, with the reasons.

    Example:
        model = fold(convert_norm(torchvision.models.resnet18(), "compound", components=1))
    """
    try:
        model = copy.deepcopy(model).eval()
    except RuntimeError as error:  # pruned, or reparametrized by hooks
        raise ValueError(f"this model cannot be folded: it cannot be copied: {error}") from error
    norms = {path: m for path, m in model.named_modules() if _is_norm(m)}
    if not norms:
        return model
    tracer = _Tracer()
    calls, failure = tracer.calls(model), tracer.failure
    pairs, reasons = [], [failure] if failure else []
    for path, norm in norms.items():
        try:
            # Why the norm itself cannot, before where it stands.
            _affine(norm, torch.float32)
            if not failure:
                pairs.append((_layer_before(model, path, calls, tracer.read), norm))
        except ValueError as reason:
            reasons.append(f"layer '{path}' {reason}")
    if reasons:
        raise ValueError("this model cannot be folded:\n  " + "\n  ".join(reasons))
    for layer, norm in pairs:
        _absorb(layer, *_affine(norm, accumulation_dtype(layer.weight.dtype)))
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if _is_norm(module):
            rest = activation_of(module)
            model.set_submodule(path, nn.Sequential(OrderedDict(rest)) if rest else nn.Identity())
    return model


def _is_norm(module: nn.Module) -> bool:
    ours = tuple(registry.load(entry.target) for entry in registry.NORMS.values())
    return isinstance(module, (_NormBase, ChannelNorm, *_PER_IMAGE, *ours))


def _affine(norm: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and offset [C] of what a norm does in evaluation; ValueError says why it has none."""
    if isinstance(norm, ChannelNorm):
        return norm.as_affine(dtype)
    if not isinstance(norm, _NormBase):
        raise ValueError(f"({type(norm).__name__}) is another function of each image in evaluation")
    if norm.running_mean is None:
        raise ValueError(f"({type(norm).__name__}) has no running statistics")
    mean, var = norm.running_mean.to(dtype), norm.running_var.to(dtype)
    weight = torch.ones_like(var) if norm.weight is None else norm.weight
    bias = torch.zeros_like(var) if norm.bias is None else norm.bias
    return as_affine(mean, var, weight, bias, norm.eps)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd | nn.Linear)


class _Tracer(fx.Tracer):
    """Traces down to norms and to what they may be folded into."""

    failure: str | None = None
    read: frozenset[str] = frozenset()  # parameters and buffers that forwards use directly

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_norm(m) or _is_layer(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            if not self.failure:  # the innermost
                self._fail(f"layer '{self.path_of_module(m)}'", error)
            raise

    def _fail(self, what: str, error: Exception) -> None:
        first = str(error).partition("\n")[0]
        self.failure = f"{what} cannot be traced by torch.fx, to see what is before a norm: {first}"

    def calls(self, model: nn.Module) -> dict[str, list[fx.Node]]:
        """Where each module is called; `failure` is set where that cannot be known."""
        found = defaultdict(list)
        if _is_norm(model):
            return found
        parameters = inspect.signature(model.forward).parameters.values()
        given = {p.name: p.default for p in parameters if p.default is not p.empty}
        try:
            graph = self.trace(model, given)
        except Exception as error:  # whatever the model's code raises
            if not self.failure:
                self._fail("the model", error)
            return found
        self.read = frozenset(n.target for n in graph.nodes if n.op == "get_attr")
        for node in graph.nodes:
            if node.op == "call_module":
                found[node.target].append(node)
        return found


def _layer_before(
    model: nn.Module, path: str, calls: dict[str, list[fx.Node]], read: frozenset[str]
) -> nn.Module:
    """The convolution whose only use is the norm at `path`; ValueError where there is none."""
    if not path:
        raise ValueError("is the whole model: no convolution is before it")
    nodes = calls[path]
    if len(nodes) != 1:
        raise ValueError(f"is called {len(nodes)} times in evaluation, not once")
    [before] = nodes[0].all_input_nodes
    while isinstance(module := _module(model, before), nn.Identity) and len(before.users) == 1:
        [before] = before.all_input_nodes
    if module is None or not _is_layer(module):
        what = f"'{before.target}'" if module is not None else before.name
        raise ValueError(f"follows {what}, not a convolution or linear layer")
    name = f"'{before.target}', before it,"
    if len(before.users) > 1:
        raise ValueError(f"is not the only one to use what {name} gives")
    if len(calls[before.target]) > 1:
        raise ValueError(f"cannot change {name} which is called more than once")
    if parametrize.is_parametrized(module):
        raise ValueError(f"cannot change {name} whose parameters are parametrized")
    if type(module).forward.__module__.partition(".")[0] != "torch":
        raise ValueError(f"cannot change {name} whose class {type(module).__name__} is not torch's")
    for changed, of in ((path, "its"), (before.target, f"{name} whose")):
        if any(key.startswith(f"{changed}.") for key in read):
            raise ValueError(f"cannot change {of} parameters, which the model uses elsewhere")
        hooked = model.get_submodule(changed)
        if hooked._forward_hooks or hooked._forward_pre_hooks:
            raise ValueError(f"cannot be folded: hooks on '{changed}' see what is inside")
    return module


def _module(model: nn.Module, node: fx.Node) -> nn.Module | None:
    return model.get_submodule(node.target) if node.op == "call_module" else None


@torch.no_grad()
def _absorb(layer: nn.Module, scale: Tensor, offset: Tensor) -> None:
    """Make `layer` compute scale * layer(x) + offset, channel by channel."""
    weight, bias = layer.weight, layer.bias
    rows = scale[:, None]  # by output channel: of weight [C, in, ...], ahead of all the rest
    if isinstance(layer, _ConvTransposeNd):  # [in, C / groups, ...]
        in_channels, per_group = weight.shape[:2]
        rows = scale.view(layer.groups, 1, per_group)
        rows = rows.expand(-1, in_channels // layer.groups, -1).reshape(in_channels, per_group)
    rows = rows.reshape(*rows.shape, *[1] * (weight.dim() - 2))
    if bias is not None:
        offset = offset + scale * bias
    # New parameters: the old ones may be another layer's, too.
    layer.weight = nn.Parameter((weight * rows).to(weight.dtype), weight.requires_grad)
    layer.bias = nn.Parameter(offset.to(weight.dtype), weight.requires_grad)
