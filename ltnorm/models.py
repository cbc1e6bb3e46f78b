"""Backbones. Every block takes `norm: Callable[[int], nn.Module]`, channels -> layer.

`resnet8` to `resnet56` are the CIFAR networks (He et al. 2016, section 4.2) as LDAM-DRW uses
them; `resnet18` to `resnet50` are torchvision's, with a small-image stem where images are small.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltnorm import registry

NormLayer = Callable[[int], nn.Module]

# Below this height a 7x7 stride-2 stem and a max-pool leave too little to convolve.
SMALL_IMAGE = 64


def build(
    name: str, num_classes: int, norm: NormLayer, *, image_size: int = 32, **options: Any
) -> nn.Module:
    """Build the backbone `name` of the registry.

    Args:
        name: see `ltnorm list models`.
        num_classes: outputs of the classifier.
        norm: makes a norm layer for a number of channels; see `ltnorm.norms.norm_layer`.
        image_size: height of the images; torchvision's networks choose their stem by it.

    Raises:
        UsageError: no such model.
    """
    return registry.load(registry.lookup("model", name).target)(
        num_classes, norm, image_size, **options
    )


def classifier(model: nn.Module) -> nn.Linear:
    """The model's last linear layer; its input are the features."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


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
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.widen:
            x = F.pad(x, (0, 0, 0, 0, self.widen // 2, self.widen - self.widen // 2))
        return F.relu(y + x)


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
        x = F.relu(self.norm(self.conv(x)))
        return self.fc(self.blocks(x).mean(dim=(2, 3)))


def _cifar_resnet(depth: int) -> Callable[[int, NormLayer, int], nn.Module]:
    def make(num_classes: int, norm: NormLayer, image_size: int) -> nn.Module:
        return CifarResNet(depth, num_classes, norm)

    return make


resnet8, resnet14, resnet20, resnet32, resnet44, resnet56 = (
    _cifar_resnet(depth) for depth in (8, 14, 20, 32, 44, 56)
)


def _torchvision_resnet(
    name: str, num_classes: int, norm: NormLayer, image_size: int, stem: str
) -> nn.Module:
    import torchvision.models

    model = getattr(torchvision.models, name)(num_classes=num_classes, norm_layer=norm)
    if stem == "small" or (stem == "auto" and image_size < SMALL_IMAGE):
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


Stem = Literal["auto", "small", "imagenet"]


def resnet18(
    num_classes: int, norm: NormLayer, image_size: int, *, stem: Stem = "auto"
) -> nn.Module:
    """torchvision's ResNet-18; `stem` is a 3x3 convolution for small images, or ImageNet's."""
    return _torchvision_resnet("resnet18", num_classes, norm, image_size, stem)


def resnet34(
    num_classes: int, norm: NormLayer, image_size: int, *, stem: Stem = "auto"
) -> nn.Module:
    """torchvision's ResNet-34; `stem` is a 3x3 convolution for small images, or ImageNet's."""
    return _torchvision_resnet("resnet34", num_classes, norm, image_size, stem)


def resnet50(
    num_classes: int, norm: NormLayer, image_size: int, *, stem: Stem = "auto"
) -> nn.Module:
    """torchvision's ResNet-50; `stem` is a 3x3 convolution for small images, or ImageNet's."""
    return _torchvision_resnet("resnet50", num_classes, norm, image_size, stem)


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
        """[N, in_features] -> [N, out_features], in [-scale, scale]."""
        # The features of an image can all be zero: torch's own eps of 1e-12 makes of that a
        # gradient of 1e12.
        x, weight = (F.normalize(v, dim=1, eps=1e-5) for v in (x, self.weight))
        return self.scale * F.linear(x, weight)

    def extra_repr(self) -> str:
        """Features and the scale."""
        return f"{super().extra_repr()}, scale={self.scale:g}"
