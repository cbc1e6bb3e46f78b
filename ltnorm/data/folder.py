"""A folder of images, a folder a class: the walk, and the rules by which it reads a tree.

Either `train/`, `val/` and `test/` hold the class folders, or one tree does. Nothing is opened.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, Field, PositiveInt

from ltnorm.data.decode import SUFFIXES
from ltnorm.data.source import Content, Listing, Part, Raw, Size, Split, class_names, printable
from ltnorm.errors import UsageError

SPLITS: dict[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
LAYOUTS = (
    "expected are DIR/train/CLASS/IMAGE, with DIR/test/CLASS/IMAGE and DIR/val/... where there are "
    "such, or DIR/CLASS/IMAGE"
)
_SYSTEM = frozenset(("__macosx", "thumbs.db", "desktop.ini"))

# What is skipped, and how a note calls it.
HIDDEN, OTHER = "hidden files and folders", "files that are no images by their suffix"
BESIDE, ASIDE = "images that lie beside class folders", "folders that lie beside train"
LOOPS = "links to a folder that they lie in"


def _titled(title: str) -> str:
    if not title or title[0] == "." or set(title) & set("/\\") or title != printable(title):
        raise ValueError("a title has no / or \\, and does not begin with a dot")
    return title


Title = Annotated[str, Field(max_length=100), AfterValidator(_titled)]
# The files of each class folder, by its name: paths below the root.
Classes = dict[str, list[str]]


def folder(
    raw: Raw,
    *,
    title: Title | None = None,
    content: Content | None = None,
    cache_size: Size | None = None,
    image_size: Size = 224,
    test_per_class: PositiveInt | None = None,
) -> Listing:
    """The images of `raw.root`, a folder a class; the options are read by `prepare`.

    Args:
        raw: where they lie.
        title: what the set is called; None is the folder's own name.
        content: the hash of what the images are.
        cache_size: the side of images that are decoded once; None leaves them files.
        image_size: of training crops.
        test_per_class: test images a class where the folder has no test set of its own.
    """
    return walk(raw.root)


def walk(root: Path) -> Listing:
    """The images below `root`, by split and class.

    Classes are sorted by name, as Python sorts text, and the images of a class by path, so that a
    tree gives the same listing on every file system.

    Raises:
        UsageError: no such tree, a class without images, names that differ by case alone, links
            that leave the root.
    """
    root = Path(os.path.abspath(root))
    if not root.is_dir():
        what = "is no folder" if root.exists() else "is not there"
        raise UsageError(f"{printable(str(root))} {what}", f"--root DIR: {LAYOUTS}")
    tree = _Tree(root)
    trees, notes = _splits(tree)
    found: dict[Split, Classes] = {split: tree.classes(path) for split, path in trees.items()}
    tree.refuse_links()
    names = _names(root, trees, found)
    parts = {split: _part(names, classes) for split, classes in found.items()}
    notes += [note for split in parts if split != "train" for note in _absent(names, found, split)]
    notes += [_counted(kind, tree.skipped[kind], tree.first[kind]) for kind in tree.skipped]
    return Listing(root, class_names(names), parts, tuple(notes))


@dataclass
class _Tree:
    """A tree that is being read: what was skipped, and the links that leave it."""

    root: Path
    skipped: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    leaving: list[str] = field(default_factory=list)
    read: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.real = os.path.realpath(self.root)
        self.above = self.real.rstrip(os.sep) + os.sep

    def skip(self, kind: str, path: str) -> None:
        """Count something that is left out."""
        self.skipped[kind] += 1
        self.first.setdefault(kind, path)

    def entries(self, path: str) -> Iterator[tuple[os.DirEntry[str], str]]:
        """What lies in the folder `path` and is not hidden, each with its path below the root."""
        try:
            with os.scandir(self.root / path) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise UsageError(
                f"cannot read {printable(str(self.root / path))}: {error.strerror or error}",
                "make the folder readable, or move it out of the tree",
            ) from error
        below = f"{path}/" if path else ""
        for entry in found:
            if entry.name[0] == "." or entry.name.lower() in _SYSTEM:
                self.skip(HIDDEN, below + entry.name)
            else:
                yield entry, below + entry.name

    def folders(self, path: str) -> dict[str, str]:
        """The folders in `path`, name -> path below the root. Images beside them are counted."""
        if path not in self.read:  # the root may be asked for twice, and is counted once
            inside = self.read[path] = {}
            for entry, below in self.entries(path):
                if _is_folder(entry):
                    inside[entry.name] = below
                elif self.is_image(entry, below):
                    self.skip(BESIDE, below)
        return self.read[path]

    def is_image(self, entry: os.DirEntry[str], path: str) -> bool:
        """Whether a file is an image by its suffix; others are counted.

        A link whose target is not there is one: to leave it out would hide that an image is gone.
        """
        if os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
            self.skip(OTHER, path)
            return False
        if not entry.is_symlink() and not entry.is_file():  # a pipe, which would never be read
            self.skip(OTHER, path)
            return False
        return True

    def classes(self, path: str) -> Classes:
        """The images of each class folder in `path`, in its subfolders as well."""
        if not self.inside(self._real(path)):
            self.leaving.append(path)
            return {}
        return {name: sorted(self.images(below)) for name, below in self.folders(path).items()}

    def images(self, path: str) -> Iterator[str]:
        """The images at any depth below the folder `path`."""
        # A folder with the real folders on the way to it: only links lead back to one of them.
        waiting = [(path, frozenset((self.real, self._real(os.path.dirname(path)))))]
        while waiting:
            inner, way = waiting.pop()
            real = self._real(inner)
            if not self.inside(real):
                self.leaving.append(inner)
                continue
            if real in way:
                self.skip(LOOPS, inner)
                continue
            for entry, below in self.entries(inner):
                if _is_folder(entry):
                    waiting.append((below, way | {real}))
                elif self.is_image(entry, below):
                    if entry.is_symlink() and not self.inside(self._real(below)):
                        self.leaving.append(below)
                    yield below

    def inside(self, real: str) -> bool:
        """Whether a real path is the root's or below it."""
        return real == self.real or real.startswith(self.above)

    def refuse_links(self) -> None:
        """Raise UsageError if a link leaves the root."""
        if self.leaving:
            first = printable(str(self.root / self.leaving[0]))
            more = f", as do {len(self.leaving) - 1:,} more" if self.leaving[1:] else ""
            raise UsageError(
                f"{first} is a link that leaves {printable(str(self.root))}{more}",
                "copy what it points to into the folder, or give --root a folder that holds both",
            )

    def _real(self, path: str) -> str:
        return os.path.realpath(self.root / path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _splits(tree: _Tree) -> tuple[dict[Split, str], list[str]]:
    """The folder that holds the class folders of each split, and what should be said of it."""
    top, shown = tree.folders(""), printable(str(tree.root))
    found: dict[Split, str] = {}
    for name in sorted(top):
        if (split := SPLITS.get(name.lower())) is None:
            continue
        if split in found:
            raise UsageError(
                f"{shown} has two folders for {split}: {found[split]} and {name}",
                "keep one, or merge them",
            )
        found[split] = name
    if not found:
        return {"train": ""}, []
    if "train" not in found:
        raise UsageError(f"{shown} has {' and '.join(found.values())} without train", LAYOUTS)
    for name in sorted(top):
        if name not in found.values():
            tree.skip(ASIDE, name)
    if "val" in found and "test" not in found:
        return {"train": found["train"], "test": found["val"]}, [
            f"{found['val']} is the test set: there is no test"
        ]
    return {split: found[split] for split in ("train", "val", "test") if split in found}, []


def _names(root: Path, trees: dict[Split, str], found: dict[Split, Classes]) -> list[str]:
    """The names of the class folders, sorted, after all that can be wrong with them."""
    train = found["train"]
    place = printable(str(root / trees["train"]))
    _refuse_twins(root, sorted(set().union(*found.values())))
    if not any(train.values()):
        raise UsageError(f"{place} has no images in class folders", LAYOUTS)
    empty = [printable(name) for name in sorted(train) if not train[name]]
    if empty:
        raise UsageError(
            f"class '{empty[0]}' has no images in {place}{_more(empty, 'class', 'classes')}",
            "remove the empty folder, or put images into it",
        )
    if len(train) < 2:
        raise UsageError(f"{place} has 1 class, and 2 are the least", LAYOUTS)
    for split, classes in found.items():
        inside = printable(str(root / trees[split]))
        if not any(classes.values()):
            raise UsageError(
                f"{inside} has no images in class folders",
                f"{LAYOUTS}; or move {trees[split]} away",
            )
        new = [printable(n) for n in sorted(classes) if classes[n] and n not in train]
        if new:
            raise UsageError(
                f"class '{new[0]}' is in {inside} but not in {place}"
                f"{_more(new, 'class', 'classes')}",
                "give it training images, or remove its folder",
            )
    return sorted(train)


def _refuse_twins(root: Path, names: Iterable[str]) -> None:
    """Refuse names that are one on some file systems: equal but for case, or once normalized."""
    seen: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFC", name.casefold())
        if key in seen:
            pair = f"'{printable(seen[key])}' and '{printable(name)}'"
            raise UsageError(
                f"class folders {pair} in {printable(str(root))} differ by case or by how accents "
                "are written alone",
                "rename one of them, or merge them: on other file systems they are one folder",
            )
        seen[key] = name


def _part(names: list[str], classes: Classes) -> Part:
    paths = [os.fsencode(path) for name in names for path in classes.get(name, ())]
    counts = [len(classes.get(name, ())) for name in names]
    return Part(np.array(paths, dtype=bytes), np.repeat(np.arange(len(names)), counts))


def _absent(names: list[str], found: dict[Split, Classes], split: Split) -> list[str]:
    absent = [printable(name) for name in names if not found[split].get(name)]
    if not absent:
        return []
    more = _more(absent, "class", "classes")
    return [f"{split} has no images of '{absent[0]}'{more}: no accuracy there"]


def _more(names: list[str], one: str, many: str) -> str:
    """The rest of what has its first named: ` (and 3 more classes)`."""
    rest = len(names) - 1
    return f" (and {rest:,} more {one if rest == 1 else many})" if rest else ""


def _counted(kind: str, count: int, first: str) -> str:
    return f"skipped {kind}: {count:,} (first: {printable(first)})"
