"""Prepared sets: one folder each, whole, checked and never half-written.

A prepared set holds uint8 arrays [N, H, W, 3] and int64 labels for each split, and a
`manifest.json` that says what they are: source checksums, profile, counts, the hash of the kept
indices, and a sha256 of every file.
"""

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ltnorm import registry
from ltnorm.data.datasets import MissingData
from ltnorm.data.longtail import Subset, choose, report_groups
from ltnorm.data.source import Images, Pixels, Raw, Source, Split
from ltnorm.errors import LtnormError, UsageError
from ltnorm.recipe import Dataset

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class PreparedSet:
    """A prepared set on disk."""

    path: Path
    manifest: dict[str, Any]
    fresh: bool = False  # made by this call

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
        """Height of an image in pixels."""
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
    def splits(self) -> list[str]:
        """The splits that it has: train, test, and perhaps val."""
        return sorted({name.split("_")[0] for name in self.manifest["sha256"]})

    def load(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """The images and labels of one split, checked; no other split's files are opened."""
        pixels = self.open(split)
        return pixels.images, pixels.labels

    def open(self, split: Split) -> Images:
        """The images of one split, checked; no other split's files are opened.

        Raises:
            LtnormError: a file is missing or damaged.
        """
        images, labels = (f"{split}_images.npy", f"{split}_labels.npy")
        if split not in self.splits:
            raise UsageError(
                f"{self.set_id} has no {split} split", "`ltnorm prepare --val N` holds out images"
            )
        for name in (images, labels):
            self._check(name)
        return Pixels(np.load(self.path / images), np.load(self.path / labels))

    def check(self) -> None:
        """Check every file against its sha256.

        Raises:
            LtnormError: a file is missing or damaged; the message names it.
        """
        for name in self.manifest["sha256"]:
            self._check(name)

    def _check(self, name: str) -> None:
        file = self.path / name
        if not file.is_file():
            raise damaged(self.path, f"{file} is missing")
        if _sha256(file) != self.manifest["sha256"][name]:
            raise damaged(self.path, f"{file} is damaged (its sha256 is not the manifest's)")


def damaged(path: Path, what: str) -> LtnormError:
    """The error for a prepared set that is not whole."""
    return LtnormError(what, f"`ltnorm prepare --force` with the same flags rebuilds {path.name}")


def set_id(spec: Dataset) -> str:
    """A readable name that differs whenever the images do, e.g. `cifar10-exp100-val50`."""
    parts = [spec.name, f"{spec.profile}{spec.ratio:.12g}"]
    parts += [f"n{spec.n_max}"] if spec.n_max else []
    parts += [f"val{spec.val}"] if spec.val else []
    parts += [spec.class_order] if spec.class_order != "label" else []
    parts += [f"d{spec.data_seed}"] if spec.data_seed else []
    defaults = registry.options_model("dataset", spec.name)().model_dump()
    parts += [f"{k}={v}" for k, v in spec.options.items() if v != defaults[k]]
    return "-".join(parts)


def find(spec: Dataset, data_dir: Path) -> PreparedSet | None:
    """The prepared set for `spec`, or None if it has not been made.

    Raises:
        LtnormError: the folder is there but its manifest is damaged, of another format, or says
            that it was made for another spec.
    """
    path = data_dir / set_id(spec)
    manifest = path / MANIFEST
    if not path.exists():
        return None
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        version, seal = content["format"], content.pop("seal")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, f"{manifest} is missing or damaged") from error
    if version != FORMAT:
        raise damaged(path, f"{path} has format {version}, this ltnorm reads {FORMAT}")
    if seal != _seal(content):
        raise damaged(path, f"{manifest} was changed after it was written")
    if content["spec"] != spec.model_dump(mode="json"):
        raise damaged(path, f"{path} was made from other settings")
    return PreparedSet(path, content)


def _seal(manifest: dict[str, Any]) -> str:
    """A hash of the manifest's own content: counts and groups decide what is reported."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def prepare(
    spec: Dataset, root: Path, data_dir: Path, *, download: bool = False, force: bool = False
) -> PreparedSet:
    """Make the prepared set for `spec`, or find it made already.

    Args:
        spec: which data set and how its classes are cut.
        root: where the raw data lies or is downloaded to (torchvision's meaning).
        data_dir: where prepared sets lie.
        download: whether raw data may be fetched over the network.
        force: make it anew even if it is there.

    Raises:
        LtnormError: damaged files, failed download, no permission.
        UsageError: a set that cannot be: an empty class, n_max above what the data has.
    """
    if not force and (found := find(spec, data_dir)):
        return found
    source = registry.load(registry.lookup("dataset", spec.name).target)(
        Raw(root, download), **spec.options
    )
    arrays, manifest = _cut(spec, source)
    path = data_dir / set_id(spec)
    try:
        _write(path, arrays, manifest, overwrite=force)
    except OSError as error:
        raise LtnormError(
            f"cannot write the prepared set to {data_dir}: {error.strerror or error}",
            "choose a writable folder with --data-dir DIR",
        ) from error
    made = find(spec, data_dir)
    assert made is not None
    return replace(made, fresh=True)


def preview(spec: Dataset, root: Path, data_dir: Path) -> tuple[list[int], int] | None:
    """The counts and the image size that the prepared set for `spec` has or would have.

    Nothing is written. None where neither it nor the raw data is there, and the registry does not
    know the size of the data set either.
    """
    if found := find(spec, data_dir):
        return found.counts, found.image_size
    entry = registry.lookup("dataset", spec.name)
    try:
        source = registry.load(entry.target)(Raw(root), **spec.options)
        labels, size = source.train.labels, int(source.train.images.shape[1])
    except MissingData:
        if entry.size is None:
            return None
        classes, images, size = entry.size
        labels = np.repeat(np.arange(classes), images)
    return _subset(spec, labels, int(labels.max()) + 1).counts, size


def _subset(spec: Dataset, labels: np.ndarray, classes: int) -> Subset:
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


def _cut(spec: Dataset, source: Source) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the manifest of the long-tailed set that `spec` asks for."""
    subset = _subset(spec, source.train.labels, len(source.classes))
    arrays = {
        "train_images": source.train.images[subset.train],
        "train_labels": source.train.labels[subset.train],
        "test_images": np.ascontiguousarray(source.test.images),
        "test_labels": source.test.labels,
    }
    if spec.val:
        arrays["val_images"] = source.train.images[subset.val]
        arrays["val_labels"] = source.train.labels[subset.val]
    scheme, groups = report_groups(subset.counts)
    indices = np.concatenate([subset.train, subset.val]).astype("<i8")
    manifest = {
        "format": FORMAT,
        "set_id": set_id(spec),
        "spec": spec.model_dump(mode="json"),
        "classes": source.classes,
        "counts": subset.counts,
        "group_scheme": scheme,
        "groups": groups,
        "val_per_class": spec.val,
        "image_size": int(source.train.images.shape[1]),
        "mean": list(source.mean),
        "std": list(source.std),
        "source_md5": source.checksums,
        "index_sha256": hashlib.sha256(indices.tobytes()).hexdigest(),
    }
    return arrays, manifest


def _write(
    path: Path, arrays: dict[str, np.ndarray], manifest: dict[str, Any], overwrite: bool
) -> None:
    """Write to a temporary folder beside `path`, then rename: it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)
    try:
        checksums = {}
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
            checksums[f"{name}.npy"] = _sha256(temporary / f"{name}.npy")
        manifest = manifest | {"sha256": checksums}
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
