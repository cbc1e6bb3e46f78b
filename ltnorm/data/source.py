"""What a data set's function gives: images in memory (`Source`), or files on disk (`Listing`).

Such a function takes `Raw`, and its own options by keyword. `ltnorm.data.prepare` makes a prepared
set of what it gives.
"""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
# Options of sets of files.
Content = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # sha256 of what the images are
Size = Annotated[int, Field(ge=8, le=4096)]  # the side of a square image in pixels
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Raw:
    """Where the raw data of a set lies, and what may be done to get it.

    Attributes:
        root: torchvision's meaning, or the folder of images.
        download: whether it may be fetched over the network.
        lists: files that list the images of a split.
    """

    root: Path
    download: bool = False
    lists: Mapping[Split, Path] = field(default_factory=dict)


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
        mean, std: of the channels; None are those of the training images where they are decoded
            once and for all, and ImageNet's where they stay files.
    """

    root: Path
    classes: list[str]
    parts: Mapping[Split, Part]
    notes: tuple[str, ...] = ()
    content: str | None = None
    layout: str = ""
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


def printable(name: str) -> str:
    """`name` as users see it, on one line: what is no text is the replacement character.

    Names of files hold any bytes but two; `os.fsdecode` makes surrogates of those that are no text.
    """
    unseen = ("Cc", "Cs", "Zl", "Zp")  # control characters, surrogates, ends of lines
    return "".join("\ufffd" if unicodedata.category(c) in unseen else c for c in name)


def class_names(names: list[str]) -> list[str]:
    """Names for classes: printable, and as different from each other as `names` are."""
    shown: dict[str, None] = {}  # keeps its order
    for name in names:
        new, count = printable(name), 1
        while new in shown:
            count += 1
            new = f"{printable(name)} ({count})"
        shown[new] = None
    return list(shown)
