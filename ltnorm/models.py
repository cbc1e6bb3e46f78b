"""Backbones. Every block takes `norm: Callable[[int], nn.Module]`, channels -> layer.

A model's entry in the registry names the function of a family, which takes (variant, num_classes,
image_size, norm). A family that cannot take `norm` has batch normalization, and `build` converts
it; so it does where weights are pretrained.

`resnet8` to `resnet56` are the CIFAR networks (He et al. 2016, section 4.2) as LDAM-DRW uses
them; `timm/NAME` is a model of timm; all others are torchvision's, with a small-image stem where
images are small.
"""

import difflib
import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ltnorm import registry
from ltnorm.errors import UsageError
from ltnorm.norms import convert_norm
from ltnorm.norms.batch import BatchNorm
from ltnorm.norms.convert import BATCH_NORMS
from ltnorm.pretrained import load_pretrained

NormLayer = Callable[[int], nn.Module]
Stem = Literal["auto", "small", "imagenet"]
Placement = Literal["all", "first", "last"]
DropRate = Annotated[float, Field(ge=0, lt=1)]

OTHER = "choose another model, norm or image size"
# Below this height a 7x7 stride-2 stem and a max-pool leave too little to convolve.
SMALL_IMAGE = 64


def build(
    name: str,
    num_classes: int,
    norm: NormLayer,
    *,
    image_size: int = 32,
    pretrained: Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
    norm_layers: Placement = "all",
    weight_standardization: bool = False,
    **options: Any,
) -> nn.Module:
    """Build the backbone `name` of the registry, and try it on an image.

    Convolutions start from the same weights whatever the norm. Batch normalization that is
    replaced, timm's and where weights are pretrained, leaves its weight and bias (timm's can start
    at zero) and its running statistics; eps and momentum are always those of `norm`.

    Args:
        name: see `ltnorm list models`.
        num_classes: outputs of the classifier.
        norm: makes a norm layer for a number of channels; see `ltnorm.norms.norm_layer`.
        image_size: height of the images; torchvision's networks choose their stem by it.
        pretrained: a file of weights, see `load_pretrained`.
        tell: told if the classifier's weights are not taken from the file.
        norm_layers: which layers are `norm`: all, the first alone, or the last ones, at the
            smallest height. The others are `bn`, with the eps and momentum of `norm`.
        weight_standardization: standardize the filters of all convolutions.
        options: of the model.

    Raises:
        UsageError: no such model, one without batch normalization or not for such images, or
            weights that do not fit.
    """
    entry = registry.lookup("model", name)
    family = partial(registry.load(entry.target), entry.variant, num_classes, image_size)
    everywhere = norm if norm_layers == "all" else _bn_like(norm)
    if pretrained is None and "norm" in inspect.signature(family).parameters:
        model = family(everywhere, **options)
    else:
        model = family(**options)
        if pretrained is not None:
            if left_out := load_pretrained(model, pretrained):
                tell(f"{', '.join(left_out)}: not as in {pretrained}, which has other classes")
            _check_eps(pretrained, model, everywhere)
        model = _with_norm(name, model, everywhere)
    if norm_layers != "all":
        some = _placed(name, model, norm_layers, image_size)
        model = _with_norm(name, model, norm, only=some)
    if weight_standardization:
        standardize_weights(model)
    _try(name, model, num_classes, image_size)
    return model


def _bn_like(norm: NormLayer) -> NormLayer:
    """Batch normalization with the eps and momentum of a norm, where it has them."""
    layer = norm(8)
    own = {key: getattr(layer, key, None) for key in ("eps", "momentum")}
    return partial(BatchNorm, **{key: value for key, value in own.items() if value is not None})


def _with_norm(
    name: str, model: nn.Module, norm: NormLayer, only: list[str] | None = None
) -> nn.Module:
    try:
        return convert_norm(model, norm, only=only)
    except ValueError as error:
        raise UsageError(
            f"model '{name}' cannot be given a norm: {error}",
            "choose a model with batch normalization, such as resnet18 or timm/resnet26",
        ) from error


def _placed(name: str, model: nn.Module, placement: Placement, image_size: int) -> list[str]:
    """The paths of the first norm layer that an image comes to, or of all at the last's height."""
    heights: dict[str, int] = {}

    def note(path: str) -> Callable[..., None]:
        return lambda module, inputs, output: heights.update({path: output.shape[-2]})

    norms = {path: m for path, m in model.named_modules() if isinstance(m, BATCH_NORMS)}
    handles = [m.register_forward_hook(note(path)) for path, m in norms.items()]
    try:
        _evaluate(name, model, image_size)
    finally:
        for handle in handles:
            handle.remove()
    called = list(heights)  # in this order
    if placement == "first":
        return called[:1]
    return [path for path in called if heights[path] == heights[called[-1]]]


def standardize_weights(model: nn.Module) -> None:
    """Replace every convolution by one with standardized filters, which has the same weights."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Conv2d:
            module.__class__ = StandardizedConv2d
        elif isinstance(module, nn.Conv2d):
            raise UsageError(
                f"model.weight_standardization: layer '{path}' is a {type(module).__name__}, not "
                "a plain convolution",
                "leave it out, or choose a model such as resnet18",
            )


def _check_eps(path: Path, model: nn.Module, norm: NormLayer) -> None:
    """With another eps, running statistics would make another function of the same weights."""
    sources = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    if not sources:
        return
    layer, trained = norm(sources[0].num_features), {m.eps for m in sources}
    if hasattr(layer, "running_var") and getattr(layer, "eps", None) not in {None, *trained}:
        raise UsageError(
            f"the model of {path} has eps {max(trained):g}, and the norm has {layer.eps:g}",
            f"--set norm.eps={max(trained):g}",
        )


def _try(name: str, model: nn.Module, num_classes: int, image_size: int) -> None:
    """Evaluate one image: what does not fit together is found before work starts."""
    logits = _evaluate(name, model, image_size)
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        raise UsageError(f"model '{name}' does not give one logit a class", OTHER)


@torch.no_grad()
def _evaluate(name: str, model: nn.Module, image_size: int) -> object:
    """What a model gives for one image; it is in training mode afterwards."""
    size = f"{image_size}x{image_size}"
    try:
        return model.eval()(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:  # models check their input in many ways
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(f"model '{name}' fails on images of {size}: {reason}", OTHER) from error
    finally:
        model.train()


def classifier(model: nn.Module) -> nn.Linear:
    """The linear layer that makes the logits, mostly the model's last; its input: the features.

    Raises:
        UsageError: there is none, or several.
    """
    inside = [m for head in heads(model) for m in head.modules()]
    linear = [m for m in inside if isinstance(m, nn.Linear)]
    if len(linear) != 1:
        raise UsageError(
            f"{type(model).__name__} has {len(linear) or 'no'} linear layers that make its logits, "
            "where one is needed",
            "choose a model that ends with a linear layer, such as resnet18",
        )
    return linear[0]


def replace_classifier(model: nn.Module, new: nn.Linear) -> None:
    """Put `new` in the place of the classifier.

    Raises:
        UsageError: there is none, or several.
    """
    old = classifier(model)
    parent, _, attribute = next(k for k, m in model.named_modules() if m is old).rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)


def heads(model: nn.Module) -> list[nn.Module]:
    """What makes the logits: one layer, but for some of timm's models, where it is more."""
    if not hasattr(model, "get_classifier"):
        return [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    head = model.get_classifier()
    return list(head) if isinstance(head, tuple) else [head]


def _activated(y: Tensor, norm: nn.Module) -> Tensor:
    """ReLU of what a norm layer gave; in place, so that no other memory leaves the caches.

    But for layers that return a view: autograd would copy its gradient.
    """
    return F.relu(y, inplace=isinstance(norm, nn.BatchNorm2d))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A).

    Where the shape changes, the shortcut takes every other pixel and pads channels with zeros.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, norm: NormLayer) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = norm(channels)
        self.stride, self.widen = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, channels, H / stride, W / stride]."""
        y = _activated(self.norm1(self.conv1(x)), self.norm1)
        y = self.norm2(self.conv2(y))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.widen:
            x = F.pad(x, (0, 0, 0, 0, self.widen // 2, self.widen - self.widen // 2))
        return F.relu(y + x, inplace=True)


class CifarResNet(nn.Module):
    """ResNet-(6n + 2) for 32x32 images: three stages of n blocks with 16, 32, 64 channels."""

    def __init__(self, depth: int, num_classes: int, norm: NormLayer) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = norm(16)
        layers = []
        for stage, channels in enumerate((16, 32, 64)):
            for block in range(blocks):
                first = stage > 0 and block == 0
                in_channels = channels // 2 if first else channels
                layers.append(BasicBlock(in_channels, channels, 2 if first else 1, norm))
        self.blocks = nn.Sequential(*layers)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> logits [N, num_classes]."""
        x = _activated(self.norm(self.conv(x)), self.norm)
        return self.fc(self.blocks(x).mean(dim=(2, 3)))


def cifar_resnet(
    variant: str, num_classes: int, image_size: int, norm: NormLayer = nn.BatchNorm2d
) -> nn.Module:
    """ResNet of depth `variant`."""
    return CifarResNet(int(variant), num_classes, norm)


def torchvision_model(
    variant: str,
    num_classes: int,
    image_size: int,
    norm: NormLayer | None = None,
    *,
    stem: Stem = "auto",
) -> nn.Module:
    """A ResNet, ResNeXt, Wide ResNet or MobileNet of torchvision.

    Args:
        variant: its name there.
        num_classes: outputs.
        image_size: height of the images.
        norm: channels -> layer; None is torchvision's batch normalization.
        stem: `imagenet` is the original; `small` a ResNet that begins with a 3x3 convolution
            without a stride, and without max-pool, or a MobileNet whose first convolution has lost
            its stride, its weights keeping their shape; `auto` is the one for the image size.
    """
    import torchvision.models

    model = getattr(torchvision.models, variant)(num_classes=num_classes, norm_layer=norm)
    if not _is_small(stem, image_size):
        return model
    if hasattr(model, "features"):
        model.features[0][0].stride = (1, 1)
    else:
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


def _is_small(stem: Stem, image_size: int) -> bool:
    return stem == "small" or (stem == "auto" and image_size < SMALL_IMAGE)


def timm_model(
    variant: str,
    num_classes: int,
    image_size: int,
    *,
    drop_rate: DropRate = 0.0,
    drop_path_rate: DropRate = 0.0,
) -> nn.Module:
    """A model of timm, as it is for images of any size.

    Args:
        variant: its name there, without a tag for pretrained weights.
        num_classes: outputs.
        image_size: height of the images; makes no difference.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, where the model has it.

    Raises:
        UsageError: timm is missing, has no such model, or the model has no such option.
    """
    check_timm(variant)
    import timm

    rates = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
    rates = {key: rate for key, rate in rates.items() if rate}
    try:
        return timm.create_model(variant, num_classes=num_classes, **rates)
    except TypeError as error:
        refused = [key for key in rates if key in str(error)]
        if not refused:
            raise
        raise UsageError(
            f"model 'timm/{variant}' has no {refused[0]}", f"leave out --set model.{refused[0]}"
        ) from error


def check_timm(variant: str) -> None:
    """Check that timm is installed and has a model `variant`.

    Raises:
        UsageError: one of them is not so.
    """
    if importlib.util.find_spec("timm") is None:
        raise UsageError(f"model 'timm/{variant}' needs timm", 'pip install "ltnorm[timm]"')
    import timm

    names = timm.list_models()
    if variant in names:
        return
    near = difflib.get_close_matches(variant.partition(".")[0], names, n=1)
    hint = f"did you mean 'timm/{near[0]}'? " if near else ""
    raise UsageError(
        f"timm has no model '{variant}'", f"{hint}timm.list_models() has all {len(names)} of them"
    )


class StandardizedConv2d(nn.Conv2d):
    """A convolution by (W - mean) / sqrt(var + 1e-5), mean and var of each filter W

    Weight standardization (Qiao et al. 2019, arXiv 1903.10520), made for GroupNorm. Shapes are
    those of `torch.nn.Conv2d`; statistics are float32 also under autocast.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H', W']."""
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) * torch.rsqrt(var + 1e-5)
        return self._conv_forward(input, weight, self.bias)


class CosineLinear(nn.Linear):
    """y_c = scale cos(x, W_c) = scale x . W_c / (|x| |W_c|), a classifier without bias

    The classifier of LDAM (Cao et al. 2019, arXiv 1906.07413), whose rows W_c start with uniform
    directions in a cube and length one.

    Args:
        in_features, out_features: as `torch.nn.Linear`.
        scale: the largest logit.

    Shapes: [N, in_features] -> [N, out_features].
    """

    def __init__(self, in_features: int, out_features: int, scale: float = 30.0) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.scale = scale

    def reset_parameters(self) -> None:
        """Rows uniform in [-1, 1]^in_features, then of length one."""
        nn.init.uniform_(self.weight, -1, 1)
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_features] -> [N, out_features], in [-scale, scale]; autocast is off.

        In bf16 logits of 16 to 30 would lie 0.125 apart.
        """
        # The features of an image can all be zero: torch's own eps of 1e-12 makes of that a
        # gradient of 1e12.
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32)).to(self.weight.dtype)
            x, weight = (F.normalize(v, dim=1, eps=1e-5) for v in (x, self.weight))
            return self.scale * F.linear(x, weight)

    def extra_repr(self) -> str:
        """Features and the scale."""
        return f"{super().extra_repr()}, scale={self.scale:g}"
