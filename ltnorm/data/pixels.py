"""Crops of images that are decoded: all of them on the device, or read from disk batch by batch.

Both give the same batches, to the bit.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ltnorm.data import augment
from ltnorm.data.source import Pixels
from ltnorm.recipe import Train

AHEAD = 4  # batches that are read before they are asked for

# (images [N, H, W, 3] on the device, which of them [B], random numbers) -> crops [B, S, S, 3]
Crop = Callable[[Tensor, Tensor, torch.Generator], Tensor]


def _padding(train: Train) -> int:
    return train.crop_padding if train.cropped(files=False) == "padded" else 0


def _crop(train: Train, size: int) -> Crop:
    """What crops images that are padded by `_padding`."""

    def padded(images: Tensor, index: Tensor, rng: torch.Generator) -> Tensor:
        return augment.crop_and_flip(images, index, size, train.flip, rng)

    def resized(images: Tensor, index: Tensor, rng: torch.Generator) -> Tensor:
        return augment.resized_crop_and_flip(images, index, train.crop_scale, train.flip, rng)

    return padded if train.cropped(files=False) == "padded" else resized


class Resident:
    """All images on the device, as uint8: a batch is one gather.

    Args:
        pixels: the images.
        train: how they are cropped and flipped.
        device: where they lie.
    """

    def __init__(self, pixels: Pixels, train: Train, device: torch.device) -> None:
        pad = _padding(train)
        padded = np.pad(pixels.images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        self.images = torch.from_numpy(padded).to(device)
        self.crop = _crop(train, pixels.image_size)

    def batches(
        self, order: Tensor, batch_size: int, rng: torch.Generator, first: int = 0
    ) -> Iterator[Tensor]:
        """The crops of images `order`, int64 on the CPU, in batches uint8 [B, S, S, 3].

        (All of them: to leave out those before the `first` would save nothing.)
        """
        for index in order.to(self.images.device).split(batch_size):
            yield self.crop(self.images, index, rng)


class Mapped:
    """Images that stay on disk, in a memory map: one thread reads a few batches ahead.

    Args:
        pixels: the images.
        train: how they are cropped and flipped.
        device: where batches are made.
    """

    def __init__(self, pixels: Pixels, train: Train, device: torch.device) -> None:
        self.images, self.device, self.padding = pixels.images, device, _padding(train)
        self.crop = _crop(train, pixels.image_size)

    def batches(
        self, order: Tensor, batch_size: int, rng: torch.Generator, first: int = 0
    ) -> Iterator[Tensor]:
        """The crops of images `order`, int64 on the CPU, in batches uint8 [B, S, S, 3].

        Those before the `first` are not read.
        """
        reading: deque[Future[Tensor]] = deque()
        with ThreadPoolExecutor(1, "reader") as reader:
            for i, index in enumerate(order.split(batch_size)):
                reading.append(reader.submit(self._read if i >= first else self._rows, index))
                if len(reading) > AHEAD:
                    yield self._cropped(reading.popleft().result(), rng)
            while reading:
                yield self._cropped(reading.popleft().result(), rng)

    def _rows(self, index: Tensor) -> Tensor:
        """Where images are read to."""
        pinned = self.device.type == "cuda"
        shape = len(index), *self.images.shape[1:]
        return torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)

    def _read(self, index: Tensor) -> Tensor:
        rows = self._rows(index)
        # (mode="raise" would read into a buffer first, and copy that.)
        np.take(self.images, index.numpy(), axis=0, out=rows.numpy(), mode="clip")
        return rows

    def _cropped(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        rows = rows.to(self.device, non_blocking=True)
        padded = F.pad(rows, (0, 0, *[self.padding] * 4))
        return self.crop(padded, torch.arange(len(rows), device=self.device), rng)
