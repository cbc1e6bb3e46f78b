"""Prepared sets on disk: one folder each, whole, checked and never half-written.

A prepared set holds for each split int64 labels and either `images`, uint8 [N, S, S, 3], or, where
images stay files, the `paths` of the files with what they were when they were checked: their
`sizes`, `times` and `digests`. Its `manifest.json` says what they are: source, profile, counts,
the hash of the kept indices, and a sha256 of every file.
"""

import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ltnorm import registry
from ltnorm.data.check import changed, shown
from ltnorm.data.source import Files, Images, Pixels, Split
from ltnorm.errors import LtnormError, UsageError
from ltnorm.recipe import Dataset

FORMAT = 2
MANIFEST = "manifest.json"
# What is known of the files that a set was made of.
RECORD = "source.npz"
ABANDONED = 24 * 3600  # seconds
# Larger files are mapped into memory, not read.
READ_WHOLE = 2 << 30
# Options of a data set that say which images it holds, and not how they are cut.
WHICH = ("title", "content", "cache_size")


@dataclass(frozen=True)
class PreparedSet:
    """A prepared set on disk.

    Attributes:
        path: its folder.
        manifest: what it is.
        fresh: whether this call has made it.
        root: where the files lie, if images stay files; None is where they lay when it was made.
        compared: the splits whose files were compared with what they were.
    """

    path: Path
    manifest: dict[str, Any]
    fresh: bool = False
    root: Path | None = None
    # Once a command is enough, since a copy is read whole.
    compared: set[Split] = field(default_factory=set, compare=False, repr=False)

    @property
    def spec(self) -> Dataset:
        """What it was made for, whole: the section of a recipe that names just these images."""
        return Dataset.model_validate(self.manifest["spec"])

    @property
    def set_id(self) -> str:
        """The name of the set: what was asked for, in words."""
        return self.manifest["set_id"]

    @property
    def index_sha256(self) -> str:
        """The hash of the kept indices: two sets with the same one hold the same images."""
        return self.manifest["index_sha256"]

    @property
    def counts(self) -> list[int]:
        """Training images a class."""
        return self.manifest["counts"]

    @property
    def classes(self) -> list[str]:
        """Class names."""
        return self.manifest["classes"]

    @property
    def image_size(self) -> int:
        """Height of an image in pixels, as the model sees it."""
        return self.manifest["image_size"]

    @property
    def mean(self) -> list[float]:
        """Of the channels of training images, in 0 .. 1."""
        return self.manifest["mean"]

    @property
    def std(self) -> list[float]:
        """Of the channels of training images, in 0 .. 1."""
        return self.manifest["std"]

    @property
    def decoded(self) -> bool:
        """Whether images are kept as pixels, not as files."""
        return self.manifest["decoded"]

    @property
    def sizes(self) -> dict[Split, int]:
        """Images of each split."""
        return self.manifest["images"]

    def record(self) -> Path | None:
        """The checked file of what is known of its source, where that is files; see `listing`.

        Raises:
            LtnormError: it is missing or damaged.
        """
        if RECORD not in self.manifest["sha256"]:
            return None
        self._check(RECORD)
        return self.path / RECORD

    @property
    def splits(self) -> list[Split]:
        """The splits that it has: train, test, and perhaps val."""
        return list(self.sizes)

    def open(self, split: Split) -> Images:
        """The images of one split, checked; no other split's files are opened.

        Raises:
            UsageError: no such split.
            LtnormError: a file is missing, damaged, or not what it was when it was checked.
        """
        if split not in self.splits:
            raise UsageError(
                f"{self.set_id} has no {split} split", "`ltnorm prepare --val N` holds out images"
            )
        labels = self._read(split, "labels")
        if self.decoded:
            return Pixels(self._read(split, "images"), labels)
        paths = self._read(split, "paths")
        root = self._root(paths)
        if split not in self.compared:
            self._compare(split, root, paths)
            self.compared.add(split)
        return Files(root, paths, labels, self.image_size, self.manifest["resize"])

    def check(self) -> None:
        """Check every file against its sha256, and those that stay outside for changes.

        Raises:
            LtnormError: a file is missing, damaged or changed; the message names it.
        """
        for name in self.manifest["sha256"]:
            self._check(name)
        if not self.decoded:
            for split in self.splits:
                self.open(split)

    def _compare(self, split: Split, root: Path, paths: np.ndarray) -> None:
        """Raise LtnormError where the files of a split are not what they were."""
        recorded = (self._read(split, name) for name in ("sizes", "times", "digests"))
        if wrong := changed(root, paths, *recorded):
            index, reason = min(wrong.items())
            raise LtnormError(
                f"{root}/{shown(paths[index])} {reason} since {self.set_id} was prepared"
                + (f" ({len(wrong):,} of {len(paths):,} files)" if len(wrong) > 1 else ""),
                "`ltnorm prepare --force` with the same flags makes a set of what is there now",
            )

    def _root(self, paths: np.ndarray) -> Path:
        """Where the files lie: where the user says, or where they lay."""
        before = Path(self.manifest["root"])
        if self.root and (self.root / os.fsdecode(paths[0])).is_file():
            return self.root
        if not before.is_dir():
            raise LtnormError(
                f"the images of {self.set_id} are not there: no {before}/{shown(paths[0])}",
                "--root DIR says where the folder lies now",
            )
        return before

    def _read(self, split: Split, name: str) -> np.ndarray:
        file = self.path / f"{split}_{name}.npy"
        large = file.is_file() and file.stat().st_size > READ_WHOLE
        if not large:  # hashing would take longer than a short training; `check` does it
            self._check(file.name)
        try:
            return np.load(file, mmap_mode="r" if large else None)
        except ValueError as error:
            raise damaged(self.path, f"{file} is damaged: {error}") from error

    def _check(self, name: str) -> None:
        file = self.path / name
        if not file.is_file():
            raise damaged(self.path, f"{file} is missing")
        if sha256(file) != self.manifest["sha256"][name]:
            raise damaged(self.path, f"{file} is damaged (its sha256 is not the manifest's)")


def damaged(path: Path, what: str) -> LtnormError:
    """The error for a prepared set that is not whole."""
    return LtnormError(what, f"`ltnorm prepare --force` with the same flags rebuilds {path.name}")


def set_id(spec: Dataset) -> str:
    """A readable name that differs whenever the images do, e.g. `cifar10-exp100-val50`.

    That of a set of files ends with the start of its content's hash.
    """
    defaults = registry.options_model("dataset", spec.name)().model_dump()
    options = spec.options
    parts = [spec.slug, spec.cut]
    parts += [f"n{spec.n_max}"] if spec.n_max else []
    parts += [f"val{spec.val}"] if spec.val else []
    usual = "frequency" if registry.lookup("dataset", spec.name).natural else "label"
    reordered = spec.profile != "natural" and spec.class_order != usual
    parts += [spec.class_order] if reordered else []
    parts += [f"d{spec.data_seed}"] if spec.data_seed else []
    parts += [f"{options['cache_size']}px"] if options.get("cache_size") else []
    parts += [f"{k}={v}" for k, v in options.items() if k not in WHICH and v != defaults[k]]
    parts += [options["content"][:8]] if options.get("content") else []
    return "-".join(parts)


def find(spec: Dataset, data_dir: Path) -> PreparedSet | None:
    """The prepared set for `spec`, or None if it has not been made.

    Raises:
        LtnormError: the folder is there but its manifest is damaged, of another format, or says
            that it was made for another spec.
    """
    path = data_dir / set_id(spec)
    if not path.exists():
        return None
    found = _open(path)
    if found.manifest["spec"] != spec.model_dump(mode="json"):
        raise damaged(path, f"{path} was made from other settings")
    return found


def _open(path: Path) -> PreparedSet:
    manifest = path / MANIFEST
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        version, seal = content["format"], content.pop("seal")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, f"{manifest} is missing or damaged") from error
    if version != FORMAT:
        raise damaged(path, f"{path} has format {version}, this ltnorm reads {FORMAT}")
    if seal != _seal(content):
        raise damaged(path, f"{manifest} was changed after it was written")
    return PreparedSet(path, content)


def of_title(spec: Dataset, data_dir: Path) -> list[PreparedSet]:
    """All prepared sets of the same data set and title, the newest first; damaged ones left out."""
    found = []
    for manifest in data_dir.glob(f"[!.]*/{MANIFEST}"):
        try:
            prepared = _open(manifest.parent)
        except LtnormError:
            continue
        if (prepared.spec.name, prepared.spec.title) == (spec.name, spec.title):
            found.append((manifest.stat().st_mtime_ns, prepared))
    return [prepared for _, prepared in sorted(found, key=lambda pair: -pair[0])]


def _seal(manifest: dict[str, Any]) -> str:
    """A hash of the manifest's own content: counts and groups decide what is reported."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


@contextmanager
def writing(path: Path, manifest: dict[str, Any], overwrite: bool) -> Iterator[Path]:
    """A folder beside `path` to write the files of a prepared set to.

    At the end it gets the manifest, with a sha256 of every file, and is renamed: the set is there
    whole or not at all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > ABANDONED:
            shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        manifest = manifest | {"sha256": {f.name: sha256(f) for f in sorted(temporary.iterdir())}}
        manifest["seal"] = _seal(manifest)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if overwrite:
            shutil.rmtree(path, ignore_errors=True)
        try:
            temporary.rename(path)
        except OSError:
            # Another process made the same set in the meantime; it holds the same images.
            if not (path / MANIFEST).is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
