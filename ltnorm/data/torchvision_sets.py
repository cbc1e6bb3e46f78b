"""The data sets that torchvision reads: `arrays` for those that it decodes, `files` for the others.

A set is one line of `ARRAYS` or `FILES`, named by torchvision's class, and one of the registry.
torchvision downloads, checks and knows the layout on disk; paths and labels are taken from its
classes, and no image file is opened.
"""

import hashlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ltnorm import registry
from ltnorm.data.datasets import MissingData
from ltnorm.data.source import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Listing,
    Part,
    Pixels,
    Raw,
    Size,
    Source,
    Split,
)
from ltnorm.errors import LtnormError

DIGITS = tuple("0123456789")
_TRAIN_TEST = {"train": {"split": "train"}, "test": {"split": "test"}}
_TRAIN_VAL_TEST = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}
_MNIST = {"train": {"train": True}, "test": {"train": False}}
_WHOLE: dict[str, dict[str, Any]] = {"train": {}}


@dataclass(frozen=True)
class ArraySet:
    """A class of torchvision that keeps its images decoded.

    Attributes:
        splits: what the class is called with for each split.
        images: how many each split has.
        files: what is read, below the root; the first one missing is named.
        mean, std: of the channels of the training images.
        classes: their names; empty leaves them to the class.
    """

    splits: Mapping[Split, Mapping[str, Any]]
    images: Mapping[Split, int]
    files: Sequence[str]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    classes: Sequence[str] = ()


@dataclass(frozen=True)
class FileSet:
    """A class of torchvision that keeps its images as files.

    Attributes:
        folder: where it lies below the root.
        splits: what the class is called with for each split; without test, all is train.
        images: how many each split has.
        pairs: the path and label of every image of the class.
        classes: their names, from the class.
    """

    folder: str
    splits: Mapping[Split, Mapping[str, Any]]
    images: Mapping[Split, int]
    pairs: Callable[[Any], list[tuple[str, int]]] = list
    classes: Callable[[Any], Sequence[str]] = field(default=lambda dataset: dataset.classes)


def _idx(folder: str, train: str = "train", test: str = "t10k") -> tuple[str, ...]:
    """The unpacked files of a set like MNIST."""
    kinds = ("images-idx3", "labels-idx1")
    return tuple(f"{folder}/raw/{part}-{kind}-ubyte" for part in (train, test) for kind in kinds)


ARRAYS = {
    "SVHN": ArraySet(
        splits=_TRAIN_TEST,
        images={"train": 73257, "test": 26032},
        files=("train_32x32.mat", "test_32x32.mat"),
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        classes=DIGITS,
    ),
    "MNIST": ArraySet(
        splits=_MNIST,
        images={"train": 60000, "test": 10000},
        files=_idx("MNIST"),
        mean=(0.1307,) * 3,
        std=(0.3081,) * 3,
        classes=DIGITS,
    ),
    "KMNIST": ArraySet(
        splits=_MNIST,
        images={"train": 60000, "test": 10000},
        files=_idx("KMNIST"),
        mean=(0.1918,) * 3,
        std=(0.3483,) * 3,
    ),
    "EMNIST": ArraySet(
        splits={k: {"split": "balanced", **v} for k, v in _MNIST.items()},
        images={"train": 112800, "test": 18800},
        files=_idx("EMNIST", "emnist-balanced-train", "emnist-balanced-test"),
        mean=(0.1751,) * 3,
        std=(0.3332,) * 3,
    ),
    "STL10": ArraySet(
        splits=_TRAIN_TEST,
        images={"train": 5000, "test": 8000},
        files=tuple(f"stl10_binary/{part}_{x}.bin" for part in ("train", "test") for x in "Xy"),
        mean=(0.4467, 0.4398, 0.4066),
        std=(0.2603, 0.2566, 0.2713),
        classes=(
            *("airplane", "bird", "car", "cat", "deer"),
            *("dog", "horse", "monkey", "ship", "truck"),
        ),
    ),
}


# What the signs mean, by label.
_SIGNS = (
    *(f"Speed limit {speed}" for speed in (20, 30, 50, 60, 70, 80)),
    *("End of speed limit 80", "Speed limit 100", "Speed limit 120"),
    *("No passing", "No passing for trucks", "Right-of-way at next intersection"),
    *("Priority road", "Yield", "Stop", "No vehicles", "No trucks", "No entry"),
    *("General caution", "Dangerous curve left", "Dangerous curve right", "Double curve"),
    *("Bumpy road", "Slippery road", "Road narrows right", "Road work", "Traffic signals"),
    *("Pedestrians", "Children crossing", "Bicycles crossing", "Ice or snow", "Wild animals"),
    *("End of all limits", "Turn right ahead", "Turn left ahead", "Ahead only"),
    *("Straight or right", "Straight or left", "Keep right", "Keep left", "Roundabout"),
    *("End of no passing", "End of no passing for trucks"),
)


def _gtsrb(dataset: Any) -> list[tuple[str, int]]:
    return dataset._samples  # it has no loader and no public list


def _pets(dataset: Any) -> list[tuple[str, int]]:
    return list(zip(map(str, dataset._images), dataset._labels, strict=True))


def _caltech(folder: str, name: str) -> Callable[[Any], list[tuple[str, int]]]:
    """The files of a Caltech set, whose class has only numbers; `name` is that of a file."""

    def pairs(dataset: Any) -> list[tuple[str, int]]:
        found = zip(dataset.index, dataset.y, strict=True)
        return [
            (
                os.path.join(
                    dataset.root, folder, dataset.categories[y], name.format(index=i, label=y + 1)
                ),
                y,
            )
            for i, y in found
        ]

    return pairs


def _categories(dataset: Any) -> list[str]:
    return dataset.categories


FILES = {
    "GTSRB": FileSet(
        folder="gtsrb",
        splits=_TRAIN_TEST,
        images={"train": 26640, "test": 12630},
        pairs=_gtsrb,
        classes=lambda dataset: _SIGNS,
    ),
    "Caltech101": FileSet(
        folder="caltech101",
        splits=_WHOLE,
        images={"train": 8677},
        pairs=_caltech("101_ObjectCategories", "image_{index:04d}.jpg"),
        classes=_categories,
    ),
    "Caltech256": FileSet(
        folder="caltech256",
        splits=_WHOLE,
        images={"train": 30607},
        pairs=_caltech("256_ObjectCategories", "{label:03d}_{index:04d}.jpg"),
        classes=_categories,
    ),
    "SUN397": FileSet(folder="SUN397", splits=_WHOLE, images={"train": 108754}),
    "EuroSAT": FileSet(folder="eurosat", splits=_WHOLE, images={"train": 27000}),
    "Food101": FileSet(
        folder="food-101", splits=_TRAIN_TEST, images={"train": 75750, "test": 25250}
    ),
    "DTD": FileSet(
        folder="dtd", splits=_TRAIN_VAL_TEST, images={"train": 1880, "val": 1880, "test": 1880}
    ),
    "Flowers102": FileSet(
        folder="flowers-102",
        splits=_TRAIN_VAL_TEST,
        images={"train": 1020, "val": 1020, "test": 6149},
    ),
    "FGVCAircraft": FileSet(
        folder="fgvc-aircraft-2013b",
        splits=_TRAIN_VAL_TEST,
        images={"train": 3334, "val": 3333, "test": 3333},
    ),
    "OxfordIIITPet": FileSet(
        folder="oxford-iiit-pet",
        splits={"train": {"split": "trainval"}, "test": {"split": "test"}},
        images={"train": 3680, "test": 3669},
        pairs=_pets,
    ),
    # Its second split is called val, and is what results on it are reported on.
    "Imagenette": FileSet(
        folder="imagenette2",
        splits={"train": {"split": "train"}, "test": {"split": "val"}},
        images={"train": 9469, "test": 3925},
        classes=lambda dataset: [names[0] for names in dataset.classes],
    ),
}


def arrays(variant: str, raw: Raw) -> Source:
    """A set that torchvision keeps decoded, `variant` of `ARRAYS`; grey is repeated to RGB.

    Raises:
        MissingData: not there, or not whole, and not to be downloaded.
        LtnormError: it cannot be downloaded or read, or is not whole.
    """
    spec = ARRAYS[variant]
    name, root = _name(variant), raw.root.expanduser().absolute()
    places = [root / file for file in spec.files]
    _check_there(name, raw, places)
    datasets = _open(variant, raw, root, spec.splits, place=root)
    parts = {split: _pixels(dataset) for split, dataset in datasets.items()}
    _check_whole(name, root, {k: len(v) for k, v in parts.items()}, spec.images)
    return Source(
        train=parts["train"],
        test=parts["test"],
        classes=list(spec.classes or datasets["train"].classes),
        mean=spec.mean,
        std=spec.std,
        checksums={place.name: _md5(place) for place in places},
    )


def files(
    variant: str,
    raw: Raw,
    *,
    cache_size: Size | None = None,
    image_size: Size = 224,
) -> Listing:
    """A set that torchvision keeps as files, `variant` of `FILES`; none of them is opened.

    The order is that of the paths: some classes of torchvision list a folder as the disk has it.
    `cache_size` and `image_size` are for `ltnorm.data.prepare`.

    Raises:
        MissingData: not there, or not whole, and not to be downloaded.
        LtnormError: it cannot be downloaded or read, or is not whole.
    """
    spec = FILES[variant]
    name, root = _name(variant), raw.root.expanduser().absolute()
    folder = root / spec.folder
    _check_there(name, raw, [folder])
    datasets = _open(variant, raw, root, spec.splits, place=folder)
    pairs = {split: spec.pairs(dataset) for split, dataset in datasets.items()}
    _check_whole(name, folder, {k: len(v) for k, v in pairs.items()}, spec.images)
    return Listing(
        root=root,
        classes=list(spec.classes(datasets["train"])),
        parts={split: _part(root, found) for split, found in pairs.items()},
        layout=f"{folder} as torchvision.datasets.{variant} unpacks it",
    )


def _name(variant: str) -> str:
    """What users call the set of a torchvision class."""
    return next(name for name, entry in registry.DATASETS.items() if entry.variant == variant)


def _check_there(name: str, raw: Raw, places: Sequence[Path]) -> None:
    """Before torchvision is asked: its classes may make the folder that they do not find."""
    missing = [place for place in places if not place.exists()]
    if missing and not raw.download:
        raise MissingData(name, missing[0])


def _open(
    variant: str,
    raw: Raw,
    root: Path,
    splits: Mapping[Split, Mapping[str, Any]],
    *,
    place: Path,
) -> dict[Split, Any]:
    """torchvision's object for each split; what takes a loader gives paths instead of images."""
    import torchvision.datasets

    of = getattr(torchvision.datasets, variant)
    common: dict[str, Any] = {"root": str(root), "download": raw.download}
    if "loader" in inspect.signature(of).parameters:
        common["loader"] = str
    try:
        return {split: of(**common, **arguments) for split, arguments in splits.items()}
    except Exception as error:  # whatever torchvision meets in files that it does not check
        raise _failed(variant, raw, place, error) from error


def _failed(variant: str, raw: Raw, place: Path, error: Exception) -> LtnormError:
    """What a failure of torchvision means to the user."""
    name, why = _name(variant), " ".join(str(error).split())
    if raw.download:
        return LtnormError(
            f"{name} could not be downloaded into {raw.root}: {why}",
            f"check the network, or put the files of {variant} under {raw.root} yourself",
        )
    if isinstance(error, FileNotFoundError) or "not found" in why:
        why = f"no {error.filename}" if getattr(error, "filename", None) else why.split(".")[0]
        return MissingData(name, place, f"{name} in {place} is not whole: {why}")
    return _damaged(name, place, f"torchvision cannot read it ({why})")


def _damaged(name: str, place: Path, why: str) -> LtnormError:
    return LtnormError(
        f"{name} in {place} is damaged: {why}",
        "delete its files there and run `ltnorm prepare` again",
    )


def _check_whole(
    name: str, place: Path, found: Mapping[Split, int], expected: Mapping[Split, int]
) -> None:
    """An archive that was unpacked in part gives a smaller set without a word."""
    for split, images in expected.items():
        if found[split] != images:
            raise _damaged(name, place, f"{found[split]:,} {split} images, not {images:,}")


def _pixels(dataset: Any) -> Pixels:
    """uint8 [N, S, S] or [N, 3, S, S] as torchvision has it -> Pixels."""
    images = np.asarray(dataset.data)
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=3)
    else:
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    return Pixels(images, np.asarray(labels, dtype=np.int64))


def _part(root: Path, pairs: Sequence[tuple[str, int]]) -> Part:
    """Paths and labels -> paths below `root` and labels, in the order of the paths."""
    paths, labels = zip(*sorted(pairs), strict=True)
    start = len(os.fspath(root)) + 1
    return Part(
        np.array([os.fsencode(path[start:]) for path in paths]), np.array(labels, dtype=np.int64)
    )


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
