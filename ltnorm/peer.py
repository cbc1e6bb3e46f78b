"""The peer: the training loop as long-tailed CIFAR papers publish it, to measure ours against.

Written from the description of LDAM-DRW's recipe (Cao et al. 2019, arXiv 1906.07413),
in the plain way of PyTorch's own examples, on which published loops are built: float32, images
[N, 3, H, W] in the default memory layout, PIL transforms of torchvision in the workers of a
DataLoader, `torch.nn` modules, `torch.optim.SGD`. Nothing here may use what makes ltnorm fast.
Where the description leaves a choice, it is the faster one: workers are not counted while they
start, and of the meters only that of the loss is kept.
"""

import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ltnorm import models, registry
from ltnorm.cores import cores
from ltnorm.data.source import Pixels
from ltnorm.recipe import Recipe

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
MOST_WORKERS = 4


def default_workers() -> int:
    """Processes that load data: as many as there are cores, but at most four."""
    return min(cores(), MOST_WORKERS)


class Block(nn.Module):
    """Two 3x3 convolutions with batch normalization, and the option-A shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.pad = channels // 4 if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, channels, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.pad is not None:  # every other pixel, and zeros for the new channels
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad), "constant", 0)
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet-(6n + 2): n blocks each of 16, 32, 64 channels, average pooling, a linear layer.

    He et al. 2016, arXiv 1512.03385, section 4.2; weights by kaiming_normal as in LDAM-DRW.
    """

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def _stage(self, in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = Block(in_channels, channels, stride)
        return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> logits [N, classes]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.size(3))
        return self.linear(out.view(out.size(0), -1))


def build_model(recipe: Recipe, classes: int, image_size: int) -> nn.Module:
    """The recipe's backbone with `nn.BatchNorm2d`: plain modules, whatever the recipe's norm.

    CIFAR ResNets are those above. The other backbones are libraries' own (torchvision, timm), from
    the registry.
    """
    entry = registry.lookup("model", recipe.model.name)
    torch.manual_seed(recipe.seed)
    if entry.target == "ltnorm.models:cifar_resnet":
        return CifarResNet(int(entry.variant), classes)
    return models.build(
        recipe.model.name, classes, nn.BatchNorm2d, image_size=image_size, **recipe.model.options
    )


class Photos(Dataset):
    """Images in memory, each as a PIL image through the transforms, as torchvision's CIFAR10."""

    def __init__(self, pixels: Pixels, padding: int) -> None:
        self.images, self.labels = pixels.images, pixels.labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(pixels.image_size, padding=padding),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(CIFAR_MEAN, CIFAR_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


class Peer:
    """The loop, step by step.

    Args:
        recipe: backbone, batch size, learning rate, momentum, weight decay and padding; the rest
            of it is not the peer's.
        pixels: the training images.
        classes: outputs.
        device: where it trains.
        workers: of the DataLoader; None is `default_workers()`.
    """

    passes = 1, 1

    def __init__(
        self,
        recipe: Recipe,
        pixels: Pixels,
        classes: int,
        device: torch.device,
        workers: int | None = None,
    ) -> None:
        train = recipe.train
        self.device, self.workers = device, default_workers() if workers is None else workers
        # By then the first batch of every worker is done.
        self.untimed = self.workers + 1
        self.model = build_model(recipe, classes, pixels.image_size).to(device).train()
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=train.lr,
            momentum=train.momentum,
            weight_decay=train.weight_decay,
        )
        self.loader = DataLoader(
            Photos(pixels, train.crop_padding),
            batch_size=train.batch_size,
            shuffle=True,
            num_workers=self.workers,
            pin_memory=device.type == "cuda",
            # Linux's default before Python 3.14; workers that start anew take seconds.
            multiprocessing_context="fork" if self.workers and sys.platform == "linux" else None,
        )

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch; the workers end with it."""
        return iter(self.loader)

    def step(self, batch: tuple[Tensor, Tensor]) -> float:
        """One update, and the loss, for the meter."""
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):  # as LDAM-DRW's script
            images, labels = (t.to(self.device, non_blocking=True) for t in batch)
            loss = self.criterion(self.model(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return loss.item()
