"""Images that stay files: decoded, cropped and changed in worker processes.

Everything is decided by (file, seed) pairs that the main process hands out, so that batches do
not depend on how many workers there are.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ltnorm import parallel
from ltnorm.cores import cores
from ltnorm.data import augment
from ltnorm.data.decode import THINNEST, BadImage, decode_bytes, read, torchvision_agrees
from ltnorm.data.source import Files
from ltnorm.errors import LtnormError
from ltnorm.recipe import Train

# How torch, and `_next`, say that a worker has died.
KILLED = ("killed by signal", "exited unexpectedly", "worker is gone")
AHEAD = 2  # batches that each worker makes before they are asked for

Item = tuple[int, int]  # which file, and the seed of what happens to it
Change = Callable[[Tensor], Tensor]  # of an image, uint8 [3, H, W]


class Unreadable(NamedTuple):
    """What a worker gives in place of a batch with a file that does not decode."""

    path: str
    reason: str


class Decoded:
    """Training crops of files, made in workers that live as long as this.

    Of each image: RandomResizedCrop, flip, ColorJitter, and the policy of `auto_augment`.

    Args:
        files: the images.
        train: how they are cropped and changed.
        device: where batches go.
        workers: see `worker_count`.

    Its `batches` can be taken once at a time.
    """

    def __init__(
        self, files: Files, train: Train, device: torch.device, workers: int | None = None
    ) -> None:
        self.device, self.plan, self.image_size = device, _Plan(), files.image_size
        count = min(worker_count(workers, device), -(-len(files) // train.batch_size))
        dataset = _Images(files, _Training(train, files.image_size))
        pinned = device.type == "cuda"
        self.loader = _loader(dataset, self.plan, count, pinned=pinned, lasting=True)

    def batches(
        self, order: Tensor, batch_size: int, rng: torch.Generator, first: int = 0
    ) -> Iterator[Tensor]:
        """The crops of files `order`, int64 on the CPU, in batches uint8 [B, S, S, 3].

        On several ranks they are this rank's part of each batch.

        Of `rng` only the seed is used. What happens to an image follows from it and from the
        place in `order`. Those before the `first` batch are blank, and not read.

        Raises:
            LtnormError: a file does not decode.
            RuntimeError: a worker was killed; see `workers_watched`.
        """
        seeds = np.random.default_rng(rng.initial_seed()).integers(2**63, size=len(order))
        self.plan.set(order, torch.from_numpy(seeds), batch_size, first)
        for index in order.split(batch_size)[:first]:
            size = self.image_size
            yield torch.zeros(
                len(parallel.own(index)), size, size, 3, dtype=torch.uint8, device=self.device
            )
        for images in _decoded(self.loader):
            yield images.to(self.device, non_blocking=True)


def evaluated(files: Files, parts: Sequence[np.ndarray], workers: int) -> Iterator[Tensor]:
    """The centre crops of files, uint8 [B, S, S, 3] for each of `parts`, which are indices.

    Raises:
        LtnormError: a file does not decode.
        RuntimeError: a worker was killed; see `workers_watched`.
    """
    from torchvision.transforms import v2

    change = v2.Compose([_thick, v2.Resize(files.resize), v2.CenterCrop(files.image_size)])
    plan = [[(int(i), 0) for i in part] for part in parts]
    yield from _decoded(_loader(_Images(files, change), plan, min(workers, len(parts))))


def _thick(image: Tensor) -> Tensor:
    """An image without the ends that make it thinner than 1 : 64, as `decode.square` has it.

    Resized by its shorter side, the longer one could be larger than memory.
    """
    height, width = image.shape[1:]
    most = THINNEST * min(height, width)
    if max(height, width) <= most:
        return image
    from torchvision.transforms.v2 import functional

    return functional.center_crop(image, [min(height, most), min(width, most)])


def worker_count(asked: int | None, device: torch.device) -> int:
    """How many processes decode: as asked, or as many as there are cores for them.

    On the CPU those are half of the cores, at least one: training needs the others, and of a
    network that is worth files it takes far longer than decoding.
    """
    if asked is not None:
        return asked
    return max(1, cores() // 2) if device.type == "cpu" else cores()


def image_of(path: str) -> Tensor:
    """The image of a file, uint8 [3, H, W], RGB and upright.

    JPEGs are decoded by torchvision, which is faster than Pillow, where it agrees with it.

    Raises:
        BadImage: there is no such file, or it does not decode.
    """
    content, _ = read(path)
    if torchvision_agrees(content):
        # It is to lose its decoder, and cannot decode rare kinds: then it is Pillow's turn.
        with suppress(ImportError, RuntimeError):
            encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            return _torchvision_decoder()(encoded)
    return torch.from_numpy(np.array(decode_bytes(content))).permute(2, 0, 1)


@cache
def _torchvision_decoder() -> Callable[[Tensor], Tensor]:
    from torchvision.io import ImageReadMode, decode_image

    # That it is deprecated is said for every image.
    warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)
    return partial(decode_image, mode=ImageReadMode.RGB, apply_exif_orientation=True)


@contextmanager
def workers_watched() -> Iterator[None]:
    """Explains what torch raises, wherever the main process is then, where a worker was killed.

    Frames that the error has left are cleared: torch raises it again with every child process
    that ends, until nothing holds the workers.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in KILLED):
            raise
        traceback.clear_frames(error.__traceback__)
        raise LtnormError(
            "a process that decodes images was killed, most often for want of memory",
            "lower --workers or --batch-size; a container may need more shared memory (--shm-size)",
        ) from error


class _Plan:
    """The batches of items of an epoch, which change under workers that live on."""

    def set(self, order: Tensor, seeds: Tensor, batch_size: int, first: int) -> None:
        batches = zip(order.split(batch_size), seeds.split(batch_size), strict=True)
        parts = [(parallel.own(index), parallel.own(seed)) for index, seed in batches]
        self.parts = parts[first:]

    def __iter__(self) -> Iterator[list[Item]]:
        for index, seeds in self.parts:
            yield list(zip(index.tolist(), seeds.tolist(), strict=True))


class _Images(Dataset):
    """Item -> its image, read and changed, uint8 [H, W, 3]."""

    def __init__(self, files: Files, change: Change) -> None:
        self.root, self.paths, self.change = os.fspath(files.root), files.paths, change

    def __getitem__(self, item: Item) -> Tensor | Unreadable:
        index, seed = item
        path = os.path.join(self.root, os.fsdecode(self.paths[index]))
        try:
            image = image_of(path)
        except BadImage as error:  # raised in a worker it would lose its type
            return Unreadable(path, str(error))
        # torchvision draws from the global generator, which is the main process's without workers.
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            return self.change(image).permute(1, 2, 0)


class _Training:
    """What becomes of a training image: RandomResizedCrop, flip, colours.

    RandomResizedCrop gives its boxes, and its values, but a copy of the crop is resized. As
    decoders leave images, channels last, that takes a third less time, and batches are so too.
    """

    def __init__(self, train: Train, size: int) -> None:
        from torchvision.transforms import v2  # takes long to import, and pixels need it not

        self.boxes = v2.RandomResizedCrop(size, train.crop_scale)
        self.resize = v2.Resize((size, size))
        self.flip = train.flip
        self.colours = augment.of_one_image(train.color_jitter, train.auto_augment)

    def __call__(self, image: Tensor) -> Tensor:
        box = self.boxes.make_params([image])
        rows = slice(box["top"], box["top"] + box["height"])
        columns = slice(box["left"], box["left"] + box["width"])
        crop = image[None, :, rows, columns].contiguous(memory_format=torch.channels_last)
        image = self.resize(crop)[0]
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return self.colours(image) if self.colours else image


def _loader(
    images: _Images,
    plan: Iterable[list[Item]],
    workers: int,
    *,
    pinned: bool = False,
    lasting: bool = False,
) -> DataLoader:
    more = {"prefetch_factor": AHEAD, "persistent_workers": lasting} if workers else {}
    return DataLoader(
        images,
        batch_sampler=plan,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pinned,
        worker_init_fn=_leave_ending_to_the_main_process,
        generator=torch.Generator(),  # else it draws from the global one
        **more,
    )


def _collate(images: list[Tensor | Unreadable]) -> Tensor | Unreadable:
    broken = [image for image in images if isinstance(image, Unreadable)]
    return broken[0] if broken else default_collate(images)


def _leave_ending_to_the_main_process(worker: int) -> None:
    """Ctrl-C, and what a scheduler sends, reach all processes; the main one ends the workers.

    What a worker was sending when the main process went is no error of its own to be printed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print_error = sys.excepthook

    def unless_gone(kind: type[BaseException], *error: Any) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            print_error(kind, *error)

    sys.excepthook = unless_gone


def _end_workers() -> None:
    """As the main process exits: those that are left, because another was killed, or a signal came.

    Python would send them SIGTERM, and wait for ever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _decoded(loader: DataLoader) -> Iterator[Tensor]:
    batches = iter(loader)
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)  # what is registered last comes first: torch waits seconds
    try:
        while (images := _next(batches)) is not None:
            if isinstance(images, Unreadable):
                raise LtnormError(
                    f"{images.path} {images.reason}",
                    "`ltnorm prepare` checks all files of a set and names those that are broken",
                )
            yield images
    finally:
        del batches  # (which ends workers that are not to last; an error would hold this frame)


def _next(batches: Iterator[Tensor | Unreadable]) -> Tensor | Unreadable | None:
    try:
        return next(batches, None)
    except (OSError, EOFError) as error:  # a batch is fetched from a worker that is dying
        time.sleep(1)  # until the signal comes, whose error tells more
        raise RuntimeError("a DataLoader worker is gone") from error
