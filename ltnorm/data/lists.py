"""Image sets by lists: a text file a split, a line `path label` an image.

The published long-tailed sets are lists over the images of balanced ones. A list is checked whole
before any image is looked for. To add a published set, describe it in `PUBLISHED` and give it one
line in the registry.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ltnorm.data.entries import FORM, Entries, more, parse, refuse_gaps, refuse_repeats
from ltnorm.data.longtail import GROUP_NAMES, report_groups
from ltnorm.data.source import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SPLITS,
    Content,
    Listing,
    Part,
    Raw,
    Size,
    Split,
    class_names,
    printable,
)
from ltnorm.errors import UsageError

PROBES = 48  # files that are looked for to find out how an archive was unpacked
Mean = tuple[float, float, float]


@dataclass(frozen=True)
class Published:
    """What is known of a published set.

    Attributes:
        title: what it is called.
        files: the lists, as they are called where they are published.
        archives: which images, and how they are expected to lie below the root.
        classes: how many.
        totals: images by split. Without test in them, the validation list is the test set.
        folder: a regular expression on the paths of the training list. Its groups belong to the
            class; `folder` is the folder that holds its images, with / or - between levels.
        places: templates of paths below the root, by the start of a file's name; the first start
            that fits. They know the groups of `folder`, `file`, and `nested`, the folder with /.
        prefixes: folders that may stand before a template, because the root is above them.
        groups: classes with many, medium and few training images, where that is published.
        mean, std: of the channels.
    """

    title: str
    files: str
    archives: str
    classes: int
    totals: Mapping[Split, int]
    folder: str
    places: Mapping[str, tuple[str, ...]]
    prefixes: tuple[str, ...] = ("",)
    groups: tuple[int, int, int] | None = None
    mean: Mean = IMAGENET_MEAN
    std: Mean = IMAGENET_STD


PUBLISHED = {
    "imagenet-lt": Published(
        "ImageNet-LT",
        "ImageNet_LT_train.txt, ImageNet_LT_val.txt and ImageNet_LT_test.txt",
        "ILSVRC2012_img_train.tar with its 1,000 tars unpacked as train/<wnid>/, and "
        "ILSVRC2012_img_val.tar as val/ or val/<wnid>/ (Kaggle's ILSVRC/Data/CLS-LOC/ holds both)",
        classes=1000,
        totals={"train": 115_846, "val": 20_000, "test": 50_000},
        folder=r"(?:^|/)(?P<folder>n\d{8})/[^/]+$",
        places={
            "ILSVRC2012_val_": ("val/{folder}/{file}", "val/{file}"),
            "": ("train/{folder}/{file}",),
        },
        prefixes=("", "ILSVRC/Data/CLS-LOC/", "Data/CLS-LOC/", "CLS-LOC/"),
        groups=(385, 479, 136),
    ),
    "places-lt": Published(
        "Places-LT",
        "Places_LT_train.txt, Places_LT_val.txt and Places_LT_test.txt",
        "places365standard_easyformat.tar unpacked as places365_standard/train/<class>/ and "
        "places365_standard/val/<class>/, or train_256_places365standard.tar as "
        "data_256/<letter>/<class>/ and val_256.tar as val_256/",
        classes=365,
        totals={"train": 62_500, "val": 7_300, "test": 36_500},
        folder=r"(?:^|/)(?:train|data_256(?:_standard)?/[a-z])/(?P<folder>.+)/[^/]+$",
        places={
            "Places365_val_": ("val/{folder}/{file}", "val_256/{file}"),
            "": (
                "train/{folder}/{file}",
                "data_256/{folder[0]}/{nested}/{file}",
                "data_256_standard/{folder[0]}/{nested}/{file}",  # torchvision's name for it
            ),
        },
        prefixes=("", "places365_standard/"),
        groups=(131, 163, 71),
    ),
    "inat2018": Published(
        "iNaturalist 2018",
        "iNaturalist18_train.txt and iNaturalist18_val.txt",
        "train_val2018.tar.gz unpacked as train_val2018/<group of species>/<class>/",
        classes=8142,
        totals={"train": 437_513, "val": 24_426},
        folder=r"(?:^|/)(?P<above>[A-Z][a-z]+)/(?P<folder>\d+)/[^/]+$",
        places={"": ("{above}/{folder}/{file}",)},
        prefixes=("train_val2018/", ""),
        mean=(0.466, 0.471, 0.380),
        std=(0.195, 0.194, 0.192),
    ),
}
# Of lists of one's own the class is the folder that holds its images, where that is so.
_PARENT = r"(?:^|/)(?P<folder>[^/]+)/[^/]+$"
_OWN = "lists of your own go with `--dataset lists`"


def lists(
    variant: str,
    raw: Raw,
    *,
    content: Content | None = None,
    cache_size: Size | None = None,
    image_size: Size = 224,
) -> Listing:
    """The images that the lists of `raw` name; the options are read by `prepare`.

    Args:
        variant: a key of `PUBLISHED`, or another name for lists of one's own.
        raw: the root that paths are relative to, and the lists.
        content: the hash of what the images are.
        cache_size: the side of images that are decoded once; None leaves them files.
        image_size: of training crops.

    Returns:
        A listing in an order of its own: by split, label and name of file. Neither the order of
        the lists nor the style of their paths changes it, or its `content`.

    Raises:
        UsageError: a list is missing, malformed or not the published one, or no root.
    """
    published = PUBLISHED.get(variant)
    entries, classes = _read(variant, published, raw)
    layout = published.archives if published else "the paths of the lists below the root"
    root = Path(os.path.abspath(raw.root))
    if not root.is_dir():
        what = "is no folder" if root.exists() else "is not there"
        raise UsageError(f"{printable(str(root))} {what}", f"--root DIR: {layout}")

    notes = _absent(entries, classes)
    if published and "test" not in raw.lists:
        notes.append(f"the validation list of {published.title} is its test set")
    table = _canonical(entries)
    fields = _fields(entries["train"], published.folder if published else _PARENT)
    paths = table.paths
    if published and fields:
        paths, found = _on_disk(published, root, table, fields)
        notes += found
    _refuse_links(root, paths)
    encoded = _encode(paths)
    return Listing(
        root=root,
        classes=class_names(
            [f["folder"] for f in fields] if fields else [str(i) for i in range(classes)]
        ),
        parts={
            split: Part(encoded[table.splits == i], table.labels[table.splits == i])
            for i, split in enumerate(SPLITS)
            if split in entries
        },
        notes=tuple(notes),
        # Names identify published images; of one's own only the files themselves can tell.
        content=_content(table) if published else None,
        layout=layout,
        mean=published.mean if published else IMAGENET_MEAN,
        std=published.std if published else IMAGENET_STD,
    )


def _read(variant: str, published: Published | None, raw: Raw) -> tuple[dict[Split, Entries], int]:
    """The lists, checked, and the number of classes."""
    entries = {split: parse(file) for split, file in _wanted(variant, published, raw).items()}
    refuse_repeats(entries)
    if published:
        _refuse_other_totals(published, entries)
    classes = refuse_gaps(entries)
    if published:
        _refuse_other_groups(published, entries["train"], classes)
    return entries, classes


def _wanted(variant: str, published: Published | None, raw: Raw) -> dict[Split, Path]:
    """The list of each split; where a published set has no test list, that of validation is it."""
    given = dict(raw.lists)
    stands_in = published is not None and "test" not in published.totals
    if stands_in and "test" not in given and "val" in given:
        given["test"] = given.pop("val")
    for split in ("train", "test"):
        if split not in given:
            flag = "--list-val" if stands_in and split == "test" else f"--list-{split}"
            what = f"the published lists are {published.files}" if published else FORM
            raise UsageError(
                f"{variant} needs {flag} FILE",
                f"`ltnorm prepare --dataset {variant} --root DIR --list-train FILE ...`; {what}",
            )
    return {split: given[split] for split in SPLITS if split in given}


def _refuse_other_totals(published: Published, entries: Mapping[Split, Entries]) -> None:
    expected = dict(published.totals)
    if "test" not in expected:
        expected["test"] = expected.pop("val")
    for split, listed in entries.items():
        if len(listed.paths) != expected.get(split):
            there = f"has {expected[split]:,}" if split in expected else "does not exist"
            raise UsageError(
                f"{listed.file} has {len(listed.paths):,} images, the {split} list of "
                f"{published.title} {there}",
                f"the published lists are {published.files}; {_OWN}",
            )


def _refuse_other_groups(published: Published, train: Entries, classes: int) -> None:
    hint = f"the published lists are {published.files}; {_OWN}"
    if classes != published.classes:
        raise UsageError(
            f"{train.file} has {classes:,} classes, {published.title} has {published.classes:,}",
            hint,
        )
    if published.groups:
        _, groups = report_groups(np.bincount(train.labels).tolist(), "shots")
        sizes = tuple(groups.count(name) for name in GROUP_NAMES)
        if sizes != published.groups:
            found, expected = (" / ".join(map(str, s)) for s in (sizes, published.groups))
            raise UsageError(
                f"{train.file} has {found} classes of many, medium and few images, "
                f"{published.title} has {expected}",
                hint,
            )


def _absent(entries: Mapping[Split, Entries], classes: int) -> list[str]:
    notes = []
    for split in ("val", "test"):
        if split in entries:
            absent = np.flatnonzero(np.bincount(entries[split].labels, minlength=classes) == 0)
            if len(absent):
                notes.append(
                    f"{split} has no images of label {absent[0]}{more(absent)}: no accuracy there"
                )
    return notes


@dataclass(frozen=True)
class _Table:
    """All entries in their own order. `splits` indexes `SPLITS`; `keys` tell the images of one
    split and label apart, whatever the style of the paths."""

    paths: list[str]
    labels: np.ndarray
    splits: np.ndarray
    keys: np.ndarray


def _canonical(entries: Mapping[Split, Entries]) -> _Table:
    paths = [path for listed in entries.values() for path in listed.paths]
    labels = np.concatenate([listed.labels for listed in entries.values()])
    splits = np.repeat(
        [SPLITS.index(split) for split in entries], [len(e.paths) for e in entries.values()]
    )
    for depth in (1, 2, 0):  # the name; with the folder that holds it; the path, unique in all
        keys = _encode(["/".join(path.rsplit("/", depth)[-depth:]) for path in paths])
        order = np.lexsort((keys, labels, splits))
        rows = [column[order] for column in (splits, labels, keys)]
        if not np.logical_and.reduce([row[1:] == row[:-1] for row in rows]).any():
            break
    splits, labels, keys = rows
    return _Table([paths[i] for i in order.tolist()], labels, splits, keys)


def _encode(paths: list[str]) -> np.ndarray:
    """`os.fsencode`d, all at once: paths of lists hold no ends of lines."""
    return np.array(os.fsencode("\n".join(paths)).split(b"\n"), dtype=bytes)


def _content(table: _Table) -> str:
    """The sha256 of which images are in which split and class."""
    rows = zip(table.splits.tolist(), table.labels.tolist(), table.keys.tolist(), strict=True)
    lines = [b"%s %d %s\n" % (SPLITS[split].encode(), label, key) for split, label, key in rows]
    return hashlib.sha256(b"".join(lines)).hexdigest()


def _fields(train: Entries, pattern: str) -> list[dict[str, str]] | None:
    """What the paths of each class have in common, by label.

    None where a class has images in several folders, or two classes share one.
    """
    compiled = re.compile(pattern)
    found = {
        (label, match and match.groups())
        for label, match in zip(
            train.labels.tolist(), map(compiled.search, train.paths), strict=True
        )
    }
    common = dict(found)
    if len(common) < len(found) or None in common.values():
        return None
    names = list(compiled.groupindex)
    fields = [dict(zip(names, common[label], strict=True)) for label in range(len(common))]
    for field in fields:
        field["folder"] = field["folder"].replace("/", "-")
        field["nested"] = field["folder"].replace("-", "/")
    if len({field["folder"] for field in fields}) < len(fields):
        return None
    return fields


def _on_disk(
    published: Published, root: Path, table: _Table, fields: list[dict[str, str]]
) -> tuple[list[str], list[str]]:
    """The paths as the files lie: of all known ways the one in which most of a spread exist.

    The lists' own where nothing is better. With notes on what differs from the lists.
    """
    names = [path.rpartition("/")[2] for path in table.paths]
    labels, paths, notes = table.labels.tolist(), list(table.paths), []
    rest = list(range(len(names)))

    def at(template: str | None, i: int) -> str:
        return template.format(file=names[i], **fields[labels[i]]) if template else table.paths[i]

    for start, templates in published.places.items():
        members = [i for i in rest if names[i].startswith(start)]
        rest = [i for i in rest if not names[i].startswith(start)]
        if not members:
            continue
        probes = [members[i * len(members) // PROBES] for i in range(PROBES)]
        ways = [None, *(prefix + t for prefix in published.prefixes for t in templates)]
        found = [sum(os.path.exists(root / at(way, i)) for i in probes) for way in ways]
        way = ways[found.index(max(found))]  # the lists' own are the first
        if way:
            for i in members:
                paths[i] = at(way, i)
            i = members[0]
            notes.append(f"images lie as {paths[i]}, listed as {table.paths[i]}")
    return paths, [printable(note) for note in notes]


def _refuse_links(root: Path, paths: list[str]) -> None:
    """Refuse folders that are links and leave the root; those of files are seen when opened."""
    real = os.path.realpath(root)
    folders = sorted({path.rpartition("/")[0] for path in paths})
    above = real.rstrip(os.sep) + os.sep
    leaving = [f for f in folders if not f"{os.path.realpath(root / f)}{os.sep}".startswith(above)]
    if leaving:
        raise UsageError(
            f"{printable(str(root / leaving[0]))} is a link that leaves "
            f"{printable(str(root))}{more(leaving)}",
            "give --root the folder that the links point to, or one that holds both",
        )
