"""Batches of images on the device: augmented ones of a training set, and a split in order."""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ltnorm import parallel
from ltnorm.data import augment
from ltnorm.data.augment import Batch
from ltnorm.data.files import Decoded, evaluated
from ltnorm.data.pixels import Mapped, Resident
from ltnorm.data.sampling import Sampler, draw
from ltnorm.data.source import Files, Images
from ltnorm.recipe import Train

# Images of more bytes than this stay on disk.
RESIDENT_CPU, RESIDENT = 2 << 30, 4 << 30


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in channels_last, (x / 255 - mean) / std."""
    mean_, std_ = (_row(tuple(v), images.shape[2], images.device) for v in (mean, std))
    return images.to(torch.float32).sub_(mean_).div_(std_).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=16)
def _row(values: tuple[float, ...], width: int, device: torch.device) -> Tensor:
    """255 times what each channel has, for a row of pixels: [width, 3].

    So long, because broadcasting over lines of three numbers is four times slower; and kept,
    because a copy to a GPU would wait for all that it has to do.
    """
    with torch.inference_mode(False):  # for training, whoever asks first
        return torch.tensor(values, device=device).mul(255).repeat(width, 1)


def crops(
    images: Images, train: Train, device: torch.device, workers: int | None = None
) -> Resident | Mapped | Decoded:
    """What makes the cropped images of training batches: decoded by workers, mapped, or resident.

    Its `batches(order, batch_size, rng, first)` are uint8 [B, S, S, 3] on the device; those
    before the `first` are blank, but take their random numbers.
    """
    if isinstance(images, Files):
        return Decoded(images, train, device, workers)
    limit = RESIDENT_CPU if device.type == "cpu" else RESIDENT
    return (Resident if images.images.nbytes <= limit else Mapped)(images, train, device)


def batches(images: Images, size: int, workers: int) -> Iterator[Tensor]:
    """All images in order, without augmentation: uint8 [B, S, S, 3] on the CPU.

    Memory is constant in their number where they are files or a memory map.

    Args:
        images: files are resized and cropped in the centre.
        size: at least so many images a batch, and less than twice as many; or all in one.
        workers: processes that decode files.

    Raises:
        LtnormError: a file does not decode.
        RuntimeError: a worker was killed; see `files.workers_watched`.
    """
    count = max(1, len(images) // size)
    if isinstance(images, Files):
        yield from evaluated(images, np.array_split(np.arange(len(images)), count), workers)
    else:
        for part in np.array_split(images.images, count):
            yield torch.from_numpy(np.array(part))  # a copy: a memory map is read here


def batches_per_epoch(images: int, batch_size: int) -> int:
    """The last partial batch counts; one of a single image is dropped."""
    whole, rest = divmod(images, batch_size)
    return whole + (rest > 1)


class Loader:
    """Augmented training batches.

    The order and the augmentation of an epoch follow from (seed, epoch) alone, so that runs with
    different norms pair, and that no state is carried between epochs. Order, crops (with
    cutout), colours and mixing have random numbers of their own: none changes with another. (Of
    files an image's colours follow its crop, and cutout has numbers of its own.) The last partial
    batch is kept; a batch of one image is dropped. On several ranks each draws the same
    numbers for the whole batch, and keeps its part of the images (see `ltnorm.parallel`).

    Args:
        images: with labels, int64 [N]. Pixels lie on the device where they fit (see `crops`).
        mean, std: of the channels, in 0 .. 1.
        train: batch size and augmentation.
        seed: of order and augmentation.
        device: where batches are made.
        memory_format: of the batches.
        sampler: progress -> the probability of each class, [C] (see `ltnorm.data.sampling`);
            None is every image once an epoch.
        workers: processes that decode files; None is as many as `worker_count` has.
    """

    def __init__(
        self,
        images: Images,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        train: Train,
        seed: int,
        device: torch.device,
        memory_format: torch.memory_format = torch.channels_last,
        sampler: Sampler | None = None,
        workers: int | None = None,
    ) -> None:
        self.crops = crops(images, train, device, workers)
        self.labels = torch.from_numpy(images.labels).to(device)
        self.mean, self.std, self.train = mean, std, train
        self.seed, self.device, self.memory_format = seed, device, memory_format
        self.sampler = sampler
        self.colours = None  # of files: workers change them
        if not isinstance(images, Files):
            self.colours = augment.of_one_image(train.color_jitter, train.auto_augment)
        # A rank decodes its own files alone. Others' images come in where they are mixed, or where
        # something is drawn for the whole batch.
        self.together = bool(train.mixup or train.cutmix or train.cutout)

    def __len__(self) -> int:
        """Batches an epoch."""
        return batches_per_epoch(len(self.labels), self.train.batch_size)

    @property
    def images_per_epoch(self) -> int:
        """Images an epoch: all, but for a last batch of one."""
        return len(self.labels) - (len(self.labels) % self.train.batch_size == 1)

    def epoch(self, epoch: int, progress: float = 0.0, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from the `first`, which counts from 0.

        `progress` is the part of training done when the epoch begins, for the sampler.
        """
        rng = torch.Generator(self.device).manual_seed(one_seed(self.seed, epoch, 1))
        mixing = np.random.default_rng(one_seed(self.seed, epoch, 2))
        order = self._order(epoch, progress)[: self.images_per_epoch]
        size = self.train.images_per_step
        if self.train.views > 1:
            parts = order.split(self.train.batch_size)
            order = torch.cat([part.repeat(self.train.views) for part in parts])
        places = order.to(self.device).split(size)
        made = self.crops.batches(order, size, rng, first)
        decoded = isinstance(self.crops, Decoded)
        for i, (index, images) in enumerate(zip(places, made, strict=True)):
            # (A batch before the first goes its way, blank, for the random numbers that it takes.)
            if decoded and self.together:
                images = parallel.whole(images, len(index))
            if self.colours and i >= first:
                seed = one_seed(self.seed, epoch, 3, i)
                images = augment.auto_augment(images, self.colours, seed)
            if not decoded and not self.together:
                images = parallel.own(images)
            images = normalize(images, self.mean, self.std)
            if self.train.cutout:
                images = augment.cutout(images, self.train.cutout, rng)
            images = images.contiguous(memory_format=self.memory_format)
            batch = Batch(images, self.labels[index])
            batch = augment.mix(batch, self.train.mixup, self.train.cutmix, mixing)
            if self.together:
                batch = batch._replace(images=parallel.own(batch.images))
            if i >= first:
                yield batch

    def _order(self, epoch: int, progress: float) -> Tensor:
        """The images of an epoch, int64 [N]; drawn on the CPU, to be the same on every device."""
        rng = torch.Generator().manual_seed(one_seed(self.seed, epoch, 0))
        if self.sampler is None:
            return torch.randperm(len(self.labels), generator=rng)
        return draw(self.labels.cpu(), self.sampler(progress), rng)


def one_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
