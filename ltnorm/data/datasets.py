"""The balanced data sets that fit in memory: each is a function of `Raw` that returns a `Source`.

torchvision downloads and checks; the files are then read here with numpy alone, since importing
torchvision takes longer than reading them.
"""

import gzip
import hashlib
import io
import pickle
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ltnorm.data.source import Pixels, Raw, Source
from ltnorm.errors import LtnormError, UsageError

FASHION_CLASSES = [
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "boot"),
]
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class MissingData(UsageError):
    """The raw files are not there, or not all of them, and may not be fetched."""

    def __init__(self, name: str, missing: Path, message: str = "") -> None:
        super().__init__(
            message or f"{name} is not there: no {missing}",
            f"`ltnorm prepare --dataset {name}` downloads it; --root DIR says where it lies",
        )


_ARRAY_PICKLES = {
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _PlainUnpickler(pickle.Unpickler):
    """Reads the pickled arrays of CIFAR and refuses everything else: pickles can run code."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) in _ARRAY_PICKLES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def _files(
    name: str, torchvision_class: str, raw: Raw, folder: Path, files: Iterable[str]
) -> list[Path]:
    """The raw files of a data set; where some are missing torchvision downloads them."""
    paths = [folder / file for file in files]
    missing = [path for path in paths if not path.is_file()]
    if not missing:
        return paths
    if not raw.download:
        raise MissingData(name, missing[0])
    import torchvision.datasets

    try:
        getattr(torchvision.datasets, torchvision_class)(str(raw.root), download=True)
    except (OSError, RuntimeError) as error:
        raise LtnormError(
            f"{name} could not be downloaded into {raw.root}: {error}",
            f"check the network, or put the files of {torchvision_class} under {raw.root} yourself",
        ) from error
    return paths


def _read(path: Path, expected_md5: str) -> bytes:
    """A file, checked against its published md5."""
    content = path.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected_md5:
        raise LtnormError(
            f"{path} is damaged: md5 {found}, expected {expected_md5}",
            "delete the file and run `ltnorm prepare` again",
        )
    return content


def _cifar_arrays(pickles: list[dict[str, Any]], label: str) -> Pixels:
    flat = np.concatenate([p["data"] for p in pickles])
    images = flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = np.concatenate([np.asarray(p[label], dtype=np.int64) for p in pickles])
    return Pixels(images, labels)


def _cifar(name: str, raw: Raw, folder: str, md5s: dict[str, str], keys: tuple[str, str]) -> Source:
    """`md5s` lists the training files, then the test file, then the one with the class names."""
    paths = _files(name, name.upper(), raw, raw.root / folder, md5s)
    *train, test, meta = [
        _PlainUnpickler(io.BytesIO(_read(path, md5s[path.name])), encoding="latin1").load()
        for path in paths
    ]
    label, names = keys
    return Source(
        train=_cifar_arrays(train, label),
        test=_cifar_arrays([test], label),
        classes=list(meta[names]),
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
        checksums=md5s,
    )


def cifar10(raw: Raw) -> Source:
    """CIFAR-10: 5,000 training and 1,000 test images a class, 32x32 (Krizhevsky 2009)."""
    md5s = {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    }
    keys = ("labels", "label_names")
    return _cifar("cifar10", raw, "cifar-10-batches-py", md5s, keys)


def cifar100(raw: Raw) -> Source:
    """CIFAR-100: 500 training and 100 test images a class, 32x32 (Krizhevsky 2009)."""
    md5s = {
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    }
    keys = ("fine_labels", "fine_label_names")
    return _cifar("cifar100", raw, "cifar-100-python", md5s, keys)


def fashion_mnist(raw: Raw) -> Source:
    """Fashion-MNIST: 6,000 training and 1,000 test images a class, 28x28 grey.

    The grey channel is repeated to three (Xiao et al. 2017, arXiv 1708.07747).
    """
    md5s = {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    }
    folder = raw.root / "FashionMNIST" / "raw"
    paths = _files("fashion-mnist", "FashionMNIST", raw, folder, md5s)
    train_images, train_labels, test_images, test_labels = (
        _read_idx(gzip.decompress(_read(path, md5s[path.name]))) for path in paths
    )
    return Source(
        train=Pixels(np.repeat(train_images[..., None], 3, axis=3), train_labels.astype(np.int64)),
        test=Pixels(np.repeat(test_images[..., None], 3, axis=3), test_labels.astype(np.int64)),
        classes=FASHION_CLASSES,
        mean=(0.2860,) * 3,
        std=(0.3530,) * 3,
        checksums=md5s,
    )


def _read_idx(content: bytes) -> np.ndarray:
    """An array in the idx format of MNIST: two zeros, type, rank, big-endian sizes, the data."""
    rank = content[3]
    shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
