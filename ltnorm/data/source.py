"""What a data set's function gives: images in memory (`Source`), or files on disk (`Listing`).

Such a function takes `Raw`, and its own options by keyword. `ltnorm.data.prepare` makes a prepared
set of what it gives.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

Split = Literal["train", "val", "test"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Raw:
    """Where the raw data of a set lies, and what may be done to get it.

    Attributes:
        root: torchvision's meaning, or the folder of images.
        download: whether it may be fetched over the network.
        lists: files that list the images of a split.
        title: what a folder is called; None is the folder's own name.
    """

    root: Path
    download: bool = False
    lists: Mapping[Split, Path] = field(default_factory=dict)
    title: str | None = None


@dataclass(frozen=True)
class Pixels:
    """Decoded images, uint8 [N, S, S, 3], a memory map where they are many; labels int64 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> int:
        """Height of an image."""
        return int(self.images.shape[1])


@dataclass(frozen=True)
class Files:
    """Images that stay files.

    Attributes:
        root: the folder that `paths` are relative to.
        paths: `os.fsencode`d, fixed-width bytes [N]: one array, which workers share.
        labels: int64 [N].
        image_size: of training crops, and of the centre crop that is evaluated.
        resize: the shorter side that an image is resized to before the centre crop.
    """

    root: Path
    paths: np.ndarray
    labels: np.ndarray
    image_size: int = 224
    resize: int = 256

    def __len__(self) -> int:
        return len(self.labels)


Images = Pixels | Files


@dataclass(frozen=True)
class Source:
    """A whole data set in memory."""

    train: Pixels
    test: Pixels
    classes: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    checksums: dict[str, str]  # source file -> md5


@dataclass(frozen=True)
class Part:
    """The files of one split: paths below the root as in `Files`, labels int64 [N]."""

    paths: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Listing:
    """A whole data set as files; none of them has been opened.

    Attributes:
        root: the folder that holds them, absolute.
        classes: names, by label.
        parts: train, and where the data has them val and test. Without test it is split off train.
        notes: what users should know: what was skipped, which folder serves as what.
        content: the identity of the images, 64 hexadecimal digits, where a list gives it; None
            leaves it to the files' bytes.
        layout: what is expected to lie where, for the message about missing files.
        mean, std: of the channels.
    """

    root: Path
    classes: list[str]
    parts: Mapping[Split, Part]
    notes: tuple[str, ...] = ()
    content: str | None = None
    layout: str = ""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
