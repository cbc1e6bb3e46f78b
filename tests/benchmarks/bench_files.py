"""Images/s of files decoded by workers against a bare DataLoader, and of a map against memory.

uv run python tests/benchmarks/bench_files.py [WORKERS]

The bare DataLoader does what users write: of each file decode, RandomResizedCrop, flip, and
normalize. Its decoder is torchvision's, as ours, or Pillow, as ImageFolder's.
"""

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from ltnorm.data.loader import Loader
from ltnorm.data.pixels import Mapped, Resident
from ltnorm.data.source import IMAGENET_MEAN, IMAGENET_STD, Files, Pixels
from ltnorm.recipe import Train

IMAGES, BATCH, ROUNDS = 256, 32, 7
CPU = torch.device("cpu")


def main() -> None:
    """Print images/s, the median of rounds that take turns, and the ratio to the first of each."""
    workers = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    with tempfile.TemporaryDirectory() as folder:
        paths = _photographs(Path(folder))
        print(f"{IMAGES} JPEGs of 500x375, {workers} workers, batch {BATCH}")
        same = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]
        normalized = [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
        loader = _loader(Files(Path(folder), paths, np.zeros(IMAGES, np.int64)), workers)
        order, rng = torch.arange(IMAGES), torch.Generator().manual_seed(0)
        _compare(
            {
                "bare DataLoader": _bare(Bare(folder, paths, same), workers),
                "ltnorm": lambda: loader.crops.batches(order, BATCH, rng),
                "bare DataLoader, normalized": _bare(
                    Bare(folder, paths, [*same, *normalized]), workers
                ),
                "ltnorm, normalized": lambda: loader.epoch(1),
                "bare DataLoader of Pillow, normalized": _bare(
                    BarePillow(folder, paths, [*same, v2.PILToTensor(), *normalized]), workers
                ),
            }
        )
        _compare_maps(Path(folder))


def _compare_maps(folder: Path, count: int = 20000, size: int = 64) -> None:
    print(f"{count} images of {size}x{size}, batch 128")
    random = np.random.default_rng(0)
    np.save(folder / "map.npy", random.integers(256, size=(count, size, size, 3), dtype=np.uint8))
    labels, order, rng = np.zeros(count, np.int64), torch.randperm(count), torch.Generator()
    held = Pixels(np.load(folder / "map.npy"), labels)
    mapped = Pixels(np.load(folder / "map.npy", mmap_mode="r"), labels)
    for crop in ("padded", "resized"):
        train = Train(crop=crop)
        kinds = {"resident": Resident(held, train, CPU), "mapped": Mapped(mapped, train, CPU)}
        _compare(
            {
                f"{name}, {crop}": partial(kind.batches, order, 128, rng)
                for name, kind in kinds.items()
            }
        )


def _compare(subjects) -> None:
    speeds = {name: [] for name in subjects}
    for _ in range(1 + ROUNDS):
        for name, batches in subjects.items():
            start, images = time.perf_counter(), 0
            for batch in batches():
                images += len(batch[0] if isinstance(batch, tuple) else batch)
            speeds[name].append(images / (time.perf_counter() - start))
    first, *_ = speeds.values()  # (without the round that warms up)
    for name, values in speeds.items():
        ratio = np.median(np.array(values[1:]) / np.array(first[1:]))
        print(f"  {name:40s} {np.median(values[1:]):9.0f} images/s   {ratio:6.3f}")


def _loader(files: Files, workers: int) -> Loader:
    return Loader(
        files,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        train=Train(batch_size=BATCH),
        seed=0,
        device=CPU,
        workers=workers,
    )


def _photographs(folder: Path) -> np.ndarray:
    """JPEGs of smooth shapes and noise, about as large as photographs are."""
    rng = np.random.default_rng(0)
    paths = np.array([f"{i}.jpg".encode() for i in range(IMAGES)])
    for path in paths:
        smooth = Image.fromarray(rng.integers(256, size=(12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(smooth.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
        pixels += rng.integers(-20, 20, size=(375, 500, 1))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / path.decode(), quality=85)
    return paths


class Bare(Dataset):
    """What users write, with torchvision's decoder."""

    def __init__(self, folder, paths, transforms):
        self.paths = [f"{folder}/{path.decode()}" for path in paths]
        self.transform = v2.Compose(transforms)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(decode_image(self.paths[index], ImageReadMode.RGB))


class BarePillow(Bare):
    """What users write, with ImageFolder's decoder."""

    def __getitem__(self, index):
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


def _bare(dataset: Bare, workers: int):
    loader = DataLoader(
        dataset, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda: loader


if __name__ == "__main__":
    main()
