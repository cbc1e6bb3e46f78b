"""The training set on the device, in augmented batches: indexing instead of worker processes."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ltnorm.data import augment
from ltnorm.data.augment import Batch
from ltnorm.data.sampling import Sampler, draw
from ltnorm.recipe import Train


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in channels_last, (x / 255 - mean) / std."""
    mean_, std_ = (torch.tensor(v, device=images.device) * 255 for v in (mean, std))
    return images.to(torch.float32).sub_(mean_).div_(std_).permute(0, 3, 1, 2)


class Loader:
    """Augmented training batches, the whole set lying on the device as uint8.

    The order and the augmentation of an epoch follow from (seed, epoch) alone, so that runs with
    different norms pair, and that no state is carried between epochs. Order, crops (with
    cutout), policy and mixing have random numbers of their own: none changes with another. The
    last partial batch is kept; a batch of one image is dropped.

    Args:
        images: uint8 [N, H, W, 3]. labels: int64 [N].
        mean, std: of the channels, in 0 .. 1.
        train: batch size and augmentation.
        seed: of order and augmentation.
        device: where the set lies and batches are made.
        memory_format: of the batches.
        sampler: progress -> the probability of each class, [C] (see `ltnorm.data.sampling`);
            None is every image once an epoch.
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
        sampler: Sampler | None = None,
    ) -> None:
        pad = train.crop_padding
        padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        self.images = torch.from_numpy(padded).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        self.size, self.mean, self.std, self.train = images.shape[1], mean, std, train
        self.seed, self.device, self.memory_format = seed, device, memory_format
        self.sampler = sampler
        self.policy = None if train.auto_augment == "none" else augment.policy(train.auto_augment)

    def __len__(self) -> int:
        """Batches an epoch."""
        whole, rest = divmod(len(self.labels), self.train.batch_size)
        return whole + (rest > 1)

    @property
    def images_per_epoch(self) -> int:
        """Images an epoch: all, but for a last batch of one."""
        return len(self.labels) - (len(self.labels) % self.train.batch_size == 1)

    def epoch(self, epoch: int, progress: float = 0.0) -> Iterator[Batch]:
        """The batches of an epoch; `progress`, the part of training done, is for the sampler."""
        rng = torch.Generator(self.device).manual_seed(_seed(self.seed, epoch, 1))
        mixing = np.random.default_rng(_seed(self.seed, epoch, 2))
        order = self._order(epoch, progress).to(self.device)
        for i, index in enumerate(order.split(self.train.batch_size)[: len(self)]):
            images = augment.crop_and_flip(self.images, index, self.size, self.train.flip, rng)
            if self.policy:
                seed = _seed(self.seed, epoch, 3, i)
                images = augment.auto_augment(images, self.policy, seed)
            images = normalize(images, self.mean, self.std)
            if self.train.cutout:
                images = augment.cutout(images, self.train.cutout, rng)
            images = images.contiguous(memory_format=self.memory_format)
            batch = Batch(images, self.labels[index])
            yield augment.mix(batch, self.train.mixup, self.train.cutmix, mixing)

    def _order(self, epoch: int, progress: float) -> Tensor:
        """The images of an epoch, int64 [N]; drawn on the CPU, to be the same on every device."""
        rng = torch.Generator().manual_seed(_seed(self.seed, epoch, 0))
        if self.sampler is None:
            return torch.randperm(len(self.labels), generator=rng)
        return draw(self.labels.cpu(), self.sampler(progress), rng)


def _seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
