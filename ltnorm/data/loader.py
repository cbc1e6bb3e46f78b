"""The training set on the device, in augmented batches: indexing instead of worker processes."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ltnorm.recipe import Train


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in channels_last, (x / 255 - mean) / std."""
    mean_, std_ = (torch.tensor(v, device=images.device) * 255 for v in (mean, std))
    return images.to(torch.float32).sub_(mean_).div_(std_).permute(0, 3, 1, 2)


def crop_and_flip(
    padded: Tensor, index: Tensor, size: int, flip: bool, rng: torch.Generator
) -> Tensor:
    """Random crops of `size` and horizontal flips of padded[index], uint8 [B, size, size, 3].

    Both are one gather: a row of source rows and a row of source columns for each image.
    """
    device, (_, height, width, channels) = padded.device, padded.shape
    count, steps = len(index), torch.arange(size, device=device)
    top = torch.randint(height - size + 1, (count, 1), generator=rng, device=device)
    left = torch.randint(width - size + 1, (count, 1), generator=rng, device=device)
    columns = left + steps
    if flip:
        mirrored = torch.rand(count, 1, generator=rng, device=device) < 0.5
        columns = torch.where(mirrored, left + steps.flip(0), columns)
    pixels = (index[:, None] * height + top + steps)[:, :, None] * width + columns[:, None, :]
    return padded.view(-1, channels)[pixels.view(-1)].view(count, size, size, channels)


def cutout(images: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """Zero a square of `size` at a random centre of each image [N, C, H, W], clipped at the edge.

    DeVries & Taylor 2017, arXiv 1708.04552.
    """
    count, _, height, width = images.shape
    inside = []
    for length in (height, width):
        centre = torch.randint(length, (count, 1), generator=rng, device=images.device)
        distance = torch.arange(length, device=images.device) - (centre - size // 2)
        inside.append((distance >= 0) & (distance < size))
    rows, columns = inside
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


class Loader:
    """Augmented training batches, the whole set lying on the device as uint8.

    The order and the augmentation of an epoch follow from (seed, epoch) alone, so that runs with
    different norms pair, and that no state is carried between epochs. The last partial batch is
    kept; a batch of one image is dropped.

    Args:
        images: uint8 [N, H, W, 3]. labels: int64 [N].
        mean, std: of the channels, in 0 .. 1.
        train: batch size and augmentation.
        seed: of order and augmentation.
        device: where the set lies and batches are made.
        memory_format: of the batches.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        train: Train,
        seed: int,
        device: torch.device,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        pad = train.crop_padding
        padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        self.images = torch.from_numpy(padded).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        self.size, self.mean, self.std, self.train = images.shape[1], mean, std, train
        self.seed, self.device, self.memory_format = seed, device, memory_format

    def __len__(self) -> int:
        """Batches an epoch."""
        whole, rest = divmod(len(self.labels), self.train.batch_size)
        return whole + (rest > 1)

    @property
    def images_per_epoch(self) -> int:
        """Images an epoch: all, but for a last batch of one."""
        return len(self.labels) - (len(self.labels) % self.train.batch_size == 1)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch: float32 [B, 3, H, W], int64 [B]."""
        # The order is drawn on the CPU, so that it is the same on every device.
        order_rng = torch.Generator().manual_seed(_mix(self.seed, epoch, 0))
        rng = torch.Generator(self.device).manual_seed(_mix(self.seed, epoch, 1))
        order = torch.randperm(len(self.labels), generator=order_rng).to(self.device)
        for index in order.split(self.train.batch_size)[: len(self)]:
            images = crop_and_flip(self.images, index, self.size, self.train.flip, rng)
            images = normalize(images, self.mean, self.std)
            if self.train.cutout:
                images = cutout(images, self.train.cutout, rng)
            yield images.contiguous(memory_format=self.memory_format), self.labels[index]


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
