"""What prepared sets are made of: the long-tailed cut, of images in memory or of known files."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ltnorm import registry
from ltnorm.data import check, listing
from ltnorm.data.listing import Counting, Known, OnBad
from ltnorm.data.longtail import Subset, choose, report_groups, split_test
from ltnorm.data.prepared import FORMAT, RECORD, set_id, writing
from ltnorm.data.source import IMAGENET_MEAN, IMAGENET_STD, Source, Split
from ltnorm.errors import LtnormError, UsageError
from ltnorm.recipe import Dataset

# Square images of one size up to this are decoded once and for all.
SMALL = 64
# Standard practice: the shorter side is resized to 256 before the centre crop of 224.
RESIZE = 256 / 224
# Images that are handled at a time, so that memory does not grow with their number.
PART = 1000


def _uncounted(label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)


@dataclass(frozen=True)
class Making:
    """How a set is made: nothing that changes what it is.

    Attributes:
        download: whether raw data may be fetched over the network.
        force: make it anew even if it is there.
        lists: the files that list the images of each split.
        on_bad: what is done about images that do not decode.
        workers: processes that decode; None is one a core.
        tell: hears what the user should know.
        counting: label and total -> a context in which a function is told how far it is.
    """

    download: bool = False
    force: bool = False
    lists: Mapping[Split, Path] = field(default_factory=dict)
    on_bad: OnBad = "fail"
    workers: int | None = None
    tell: Callable[[str], None] = lambda text: None
    counting: Counting = _uncounted


def subset_of(spec: Dataset, labels: np.ndarray, classes: int) -> Subset:
    """The training images that `spec` keeps of those with `labels`, and the held-out ones."""
    return choose(
        labels,
        classes,
        spec.ratio,
        profile=spec.profile,
        n_max=spec.n_max,
        val=spec.val,
        order=spec.class_order,
        data_seed=spec.data_seed,
    )


def decoded_size(spec: Dataset, widths: np.ndarray, heights: np.ndarray) -> int | None:
    """The size at which images are decoded once and for all; None where they stay files."""
    if spec.options.get("cache_size"):
        return spec.options["cache_size"]
    size = int(widths[0])
    alike = (widths == size).all() and (heights == size).all()
    return size if alike and size <= SMALL else None


def _manifest(
    spec: Dataset, classes: list[str], subset: Subset, source: Mapping[str, Any]
) -> dict[str, Any]:
    scheme, groups = report_groups(subset.counts)
    return {
        "format": FORMAT,
        "set_id": set_id(spec),
        "spec": spec.model_dump(mode="json"),
        "classes": classes,
        "counts": subset.counts,
        "group_scheme": scheme,
        "groups": groups,
        "val_per_class": spec.val,
        "notes": [],
        **source,
    }


def from_memory(spec: Dataset, source: Source, data_dir: Path, making: Making) -> None:
    """Write the long-tailed set that `spec` asks for, from images in memory."""
    subset = subset_of(spec, source.train.labels, len(source.classes))
    arrays = {
        "train_images": source.train.images[subset.train],
        "train_labels": source.train.labels[subset.train],
        "test_images": np.ascontiguousarray(source.test.images),
        "test_labels": source.test.labels,
    }
    if spec.val:
        arrays["val_images"] = source.train.images[subset.val]
        arrays["val_labels"] = source.train.labels[subset.val]
    indices = np.concatenate([subset.train, subset.val]).astype("<i8")
    about = {
        "images": {n.split("_")[0]: len(a) for n, a in arrays.items() if n.endswith("labels")},
        "decoded": True,
        "image_size": source.train.image_size,
        "mean": list(source.mean),
        "std": list(source.std),
        "source_md5": source.checksums,
        "index_sha256": hashlib.sha256(indices.tobytes()).hexdigest(),
    }
    manifest = _manifest(spec, source.classes, subset, about)
    with writing(data_dir / set_id(spec), manifest, overwrite=making.force) as folder:
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)


def from_files(spec: Dataset, known: Known, data_dir: Path, making: Making) -> None:
    """Write the long-tailed set that `spec` asks for, from files that were read.

    Raises:
        UsageError: it cannot be: a class without images, two val splits.
        LtnormError: the disk has no room for it.
    """
    found, (subset, indices) = known.listing, cut(spec, known)
    used = np.concatenate(list(indices.values()))
    size = decoded_size(spec, known.checked.width[used], known.checked.height[used])
    if size:
        _refuse_unused(spec, size)
        _check_room(data_dir, len(used) * 3 * size**2)
    kept = hashlib.sha256(known.content.encode())
    for index in indices.values():
        kept.update(index.astype("<i8").tobytes())
        kept.update(np.ascontiguousarray(known.checked.digest[index]))
    image_size = size or spec.options["image_size"]
    about = {
        "images": {split: len(index) for split, index in indices.items()},
        "decoded": bool(size),
        "image_size": image_size,
        "resize": round(image_size * RESIZE),
        "mean": list(found.mean or IMAGENET_MEAN),
        "std": list(found.std or IMAGENET_STD),
        "root": str(found.root),
        "content": known.content,
        "index_sha256": kept.hexdigest(),
        "listing": {key: getattr(found, key) for key in listing.KEPT_ABOUT},
        "notes": [*found.notes, *_notes(spec, known, indices, size)],
    }
    manifest = _manifest(spec, found.classes, subset, about)
    with writing(data_dir / set_id(spec), manifest, overwrite=making.force) as folder:
        listing.record(known, folder / RECORD)
        for split, index in indices.items():
            np.save(folder / f"{split}_labels.npy", known.labels[index])
            if size:
                _decode(known, index, size, folder / f"{split}_images.npy", making)
            else:
                _index(known, index, folder, split)
        if size and not found.mean:
            manifest["mean"], manifest["std"] = moments(folder / "train_images.npy")


def _refuse_unused(spec: Dataset, size: int) -> None:
    """An option without an effect would be a second name of one set."""
    defaults = registry.options_model("dataset", spec.name)()
    if spec.options["image_size"] != defaults.image_size:
        raise UsageError(
            f"dataset.image_size: has no effect, these images are decoded at {size} pixels",
            "leave it out",
        )


def cut(spec: Dataset, known: Known) -> tuple[Subset, dict[Split, np.ndarray]]:
    """Which files are in which split: indices into `known`."""
    found, train = known.listing, known.of("train")
    own: dict[Split, np.ndarray] = {
        split: known.of(split) for split in ("val", "test") if split in found.parts
    }
    if "val" in own and spec.val:
        raise UsageError(
            f"--val {spec.val}: the data has a val split of its own", "leave out --val"
        )
    if "test" in own and spec.options.get("test_per_class"):
        raise UsageError(
            "dataset.test_per_class: the data has a test set of its own", "leave it out"
        )
    if "test" not in own:
        per_class = spec.options.get("test_per_class")
        labels = known.labels[train]
        kept, held = split_test(labels, len(found.classes), per_class, spec.data_seed)
        train, own["test"] = train[kept], train[held]
    subset = subset_of(spec, known.labels[train], len(found.classes))
    if spec.val:
        own["val"] = train[subset.val]
    for split, index in own.items():
        if not len(index):
            raise UsageError(
                f"{found.root} has no {split} images to measure by",
                "each class needs two images where there is no test set, or give it one of its own",
            )
    return subset, {"train": train[subset.train], **own}


def _check_room(data_dir: Path, needed: int) -> None:
    free = shutil.disk_usage(data_dir).free
    if needed > free:
        raise LtnormError(
            f"the decoded images take {needed / 2**30:.1f} GiB, and {data_dir} has "
            f"{free / 2**30:.1f} GiB left",
            "choose a smaller --cache-size, or another disk with --data-dir DIR",
        )


def _decode(known: Known, index: np.ndarray, size: int, file: Path, making: Making) -> None:
    """Write the images of files as one array, those that were kept when they were read."""
    shape = (len(index), size, size, 3)
    images = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    if known.images is not None and known.images.shape[1] == size:
        for start in range(0, len(index), PART):
            images[start : start + PART] = known.images[index[start : start + PART]]
        return
    name = file.name.split("_")[0]
    with making.counting(f"decoding {name} images at {size} pixels", len(index)) as tell:
        check.pixels(known.listing.root, known.paths[index], size, images, making.workers, tell)
    images.flush()


def _index(known: Known, index: np.ndarray, folder: Path, split: Split) -> None:
    """Write which files there are, and what they were."""
    checked = known.checked
    for name, array in (
        ("paths", known.paths),
        ("sizes", checked.size),
        ("times", checked.mtime_ns),
        ("digests", checked.digest),
    ):
        np.save(folder / f"{split}_{name}.npy", array[index])


def moments(file: Path) -> tuple[list[float], list[float]]:
    """The mean and standard deviation of each channel of an array of images, in 0 .. 1."""
    images = np.load(file, mmap_mode="r")
    total, squares, count = np.zeros(3), np.zeros(3), 0
    for start in range(0, len(images), PART):
        part = images[start : start + PART].reshape(-1, 3).astype(np.float64) / 255
        total, squares = total + part.sum(0), squares + (part**2).sum(0)
        count += len(part)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-4))  # of images of one colour, too
    return [round(float(m), 4) for m in mean], [round(float(s), 4) for s in std]


def _notes(
    spec: Dataset, known: Known, indices: Mapping[Split, np.ndarray], size: int | None
) -> Iterator[str]:
    """What users should know of a set, beyond what its listing says."""
    if bad := int((~known.good).sum()):
        images = "image that does not decode is" if bad == 1 else "images that do not decode are"
        yield f"{bad:,} {images} left out"
    names, classes = known.listing.classes, len(known.listing.classes)
    test = np.bincount(known.labels[indices["test"]], minlength=classes)
    if "test" not in known.listing.parts:
        yield f"the test set was split off by data seed {spec.data_seed}"
    if test.min() < test.max():
        fewer = int((test < test.max()).sum())
        yield (
            f"the test set is not balanced: {test.min():,} to {test.max():,} images a class, "
            f"{fewer:,} of {classes:,} classes below the most"
        )
    if not test.all():
        first, more = names[int(test.argmin())], int((test == 0).sum()) - 1
        others = f" and {more:,} other classes" if more else ""
        yield f"no test image of '{first}'{others}: no accuracy of it can be measured"
    if twice := _leaks(known, indices):
        count, first = twice
        yield f"{count:,} test images have the bytes of a training image, such as {first}"
    widths, heights = (getattr(known.checked, side) for side in ("width", "height"))
    most = int(max(widths[known.good].max(), heights[known.good].max()))
    if not size and most <= 2 * SMALL:
        yield (
            f"images of up to {most} pixels stay files, which are decoded in every epoch: "
            f"--cache-size {min(most, SMALL)} does it once"
        )


def _leaks(known: Known, indices: Mapping[Split, np.ndarray]) -> tuple[int, str] | None:
    """How many test images are training images as well, byte by byte, and the first of them."""
    digests = np.ascontiguousarray(known.checked.digest).view("S32").reshape(-1)
    leaked = np.isin(digests[indices["test"]], digests[indices["train"]])
    if not leaked.any():
        return None
    return int(leaked.sum()), check.shown(known.paths[indices["test"][leaked.argmax()]])
