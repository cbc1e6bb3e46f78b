"""Prepared sets: found, or made of what a data set's function gives."""

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ltnorm import registry
from ltnorm.data import listing
from ltnorm.data.datasets import MissingData
from ltnorm.data.decode import BadImage, decode
from ltnorm.data.listing import Known
from ltnorm.data.longtail import split_test
from ltnorm.data.making import Making, decoded_size, from_files, from_memory, subset_of
from ltnorm.data.prepared import PreparedSet, find, of_title, set_id
from ltnorm.data.source import Listing, Raw, Source, Split, printable
from ltnorm.errors import LtnormError, UsageError
from ltnorm.recipe import Dataset

AS_USUAL = Making()
PROBES = 16  # images by which it is guessed whether all have one size


def prepare(spec: Dataset, root: Path, data_dir: Path, making: Making = AS_USUAL) -> PreparedSet:
    """Make the prepared set for `spec`, or find it made already.

    Args:
        spec: which data set and how its classes are cut.
        root: where the raw data lies or is downloaded to (torchvision's meaning).
        data_dir: where prepared sets lie.
        making: how it is made.

    Raises:
        LtnormError: damaged files, failed download, no permission.
        UsageError: a set that cannot be: an empty class, n_max above what the data has.
    """
    if making.lists and "--list-" not in registry.lookup("dataset", spec.name).needs:
        raise UsageError(
            f"{spec.name} takes no lists of images",
            "leave out --list-..., or take --dataset lists",
        )
    _refuse_inside(spec, root, data_dir)
    raw = Raw(root, making.download, making.lists)
    source: Source | Listing | Known | None = None
    repeated = is_keyed(spec) and not is_open(spec)  # by the recipe of a run
    if is_open(spec):
        spec, source = _identify(spec, raw, data_dir, making)
    if not is_open(spec) and not making.force and (found := find(spec, data_dir)):
        if not isinstance(source, Known) and not repeated:
            _tell_changes(found, making)
        return _at(found, root, source)
    source = source or load(spec, raw)
    _check_data_dir(data_dir)
    try:
        if isinstance(source, Source):
            from_memory(spec, source, data_dir, making)
        else:
            source = _sound(spec, source, data_dir, making)
            spec = _with_content(spec, source)
            if making.force or not find(spec, data_dir):
                from_files(spec, source, data_dir, making)
    except OSError as error:
        raise _unwritable(data_dir, error) from error
    made = find(spec, data_dir)
    assert made is not None
    return replace(_at(made, root, source), fresh=True)


def _check_data_dir(data_dir: Path) -> None:
    """Check, before work starts, that prepared sets can be written."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=data_dir):
            pass
    except OSError as error:
        raise _unwritable(data_dir, error) from error


def _unwritable(data_dir: Path, error: OSError) -> LtnormError:
    return LtnormError(
        f"cannot write the prepared set to {data_dir}: {error.strerror or error}",
        "choose a writable folder with --data-dir DIR",
    )


def _refuse_inside(spec: Dataset, root: Path, data_dir: Path) -> None:
    """What is prepared must not become a part of the folder that it is made of."""
    if "title" in spec.options and data_dir.resolve().is_relative_to(root.resolve()):
        raise UsageError(
            f"--data-dir {data_dir} lies inside the folder of images, {root}",
            "choose a folder elsewhere with --data-dir DIR",
        )


def _at(prepared: PreparedSet, root: Path, source: Source | Listing | Known | None) -> PreparedSet:
    """The set, its files looked for below `root` first. Those that are known were compared."""
    compared = set(prepared.splits) if isinstance(source, Known) else set()
    return replace(prepared, root=root, compared=compared)


def load(spec: Dataset, raw: Raw) -> Source | Listing:
    """What the data set's function gives."""
    entry = registry.lookup("dataset", spec.name)
    function = registry.load(entry.target)
    if entry.variant:
        function = partial(function, entry.variant)
    return function(raw, **spec.options)


def is_keyed(spec: Dataset) -> bool:
    """Whether it takes the content to say which images are meant: a name alone does not."""
    return "content" in spec.options


def is_open(spec: Dataset) -> bool:
    """Whether its content is still to be found out."""
    return is_keyed(spec) and not spec.options["content"]


def _with(spec: Dataset, **options: Any) -> Dataset:
    return Dataset.model_validate(spec.model_dump() | options)


def _identify(
    spec: Dataset, raw: Raw, data_dir: Path, making: Making
) -> tuple[Dataset, Listing | Known | None]:
    """The spec with its title, and with its content if that can be had without reading the files.

    Where the user does not say where the images are, but a set of that title was prepared, that
    is the one.
    """
    untold = raw.root == registry.DEFAULT_ROOT
    if "title" in spec.options and not spec.options["title"] and not untold:
        spec = _with(spec, title=_title(raw.root.resolve().name))
    by_name = not raw.lists and ("title" not in spec.options or untold)
    if by_name and (prepared := of_title(spec, data_dir)):
        return _by_name(spec, prepared, data_dir, making)
    found = load(spec, raw)
    assert isinstance(found, Listing)
    if found.content and not making.force:
        whole = _with(spec, content=found.content)
        if find(whole, data_dir):
            return whole, None
    known = _recognise(spec, found, data_dir, making)
    return (_with(spec, content=known.content), known) if known else (spec, found)


def _title(folder: str) -> str:
    """The name of a folder, as far as it can be a title."""
    return printable(folder).replace("\\", "-").lstrip(".")[:100] or "folder"


def _by_name(
    spec: Dataset, prepared: Sequence[PreparedSet], data_dir: Path, making: Making
) -> tuple[Dataset, Known | None]:
    """The set of a title that was prepared, perhaps with another cut; the newest one first."""
    contents = {made.spec.options["content"]: made for made in reversed(prepared)}
    if len(contents) > 1:
        sets = "; ".join(f"{made.path.name} ({content})" for content, made in contents.items())
        raise UsageError(
            f"several sets called '{spec.title}' are prepared: {sets}",
            "say which: --root DIR, or --set dataset.content=..., the hash in brackets",
        )
    [(content, newest)] = contents.items()
    spec = _with(spec, content=content)
    record = newest.record()
    if record is None or (find(spec, data_dir) and not making.force):
        return spec, None
    root = Path(newest.manifest["root"])
    if changes := listing.changes(root, record):
        raise UsageError(
            f"{root} has changed since {newest.set_id} was prepared: {changes}",
            "--root DIR prepares what is there now",
        )
    return spec, listing.restore(root, newest.classes, newest.manifest["listing"], record)


def _tell_changes(prepared: PreparedSet, making: Making) -> None:
    record = prepared.record()
    root = Path(prepared.manifest.get("root", ""))
    if record and root.is_dir() and (changes := listing.changes(root, record)):
        making.tell(
            f"{root} has changed since {prepared.set_id} was prepared: {changes}; "
            "--force prepares it anew"
        )


def _recognise(spec: Dataset, found: Listing, data_dir: Path, making: Making) -> Known | None:
    """What an earlier preparation knows of the same files, so that they need not be read again."""
    changes = ""
    for prepared in [] if making.force else of_title(spec, data_dir):
        try:
            record = prepared.record()
        except LtnormError:  # a damaged one can tell nothing
            continue
        known = listing.recognise(found, record) if record else ""
        if isinstance(known, Known):
            return known
        if known and not changes:
            changes = f"{found.root} has changed since {prepared.set_id} was prepared: {known}"
    if changes:
        making.tell(changes)
    return None


def _sound(spec: Dataset, source: Listing | Known, data_dir: Path, making: Making) -> Known:
    """The files of a data set, read unless they are known, and whole unless that may be skipped."""
    if isinstance(source, Known):
        if making.on_bad == "fail":  # another set may have skipped some
            checked = source.listing, source.paths, source.checked
            listing.refuse_bad(*checked, spec.slug, data_dir)
        return source
    return listing.read(
        source,
        spec.slug,
        data_dir,
        on_bad=making.on_bad,
        workers=making.workers,
        counting=making.counting,
        size=_likely_size(spec, source),
        resize=bool(spec.options["cache_size"]),
    )


def _with_content(spec: Dataset, known: Known) -> Dataset:
    """The spec completed by the content that was found.

    Raises:
        UsageError: it names another content.
    """
    if not is_keyed(spec):
        return spec
    wanted = spec.options["content"]
    if wanted and wanted != known.content:
        raise UsageError(
            f"{known.listing.root} does not hold the images of {set_id(spec)}: their content is "
            f"{known.content[:8]}, not {wanted[:8]}",
            "name the folder of those images with --root DIR",
        )
    return _with(spec, content=known.content)


@dataclass(frozen=True)
class Preview:
    """What a prepared set is or would be: see `PreparedSet`."""

    spec: Dataset
    counts: list[int]
    image_size: int
    splits: list[Split]
    decoded: bool


def preview(spec: Dataset, root: Path, data_dir: Path) -> Preview | None:
    """What the prepared set for `spec` is or would be. Nothing is written.

    None where neither it nor the raw data is there, and the registry does not know the size of the
    data set either. Of files that are not known yet no more than the first one is read.
    """
    source: Source | Listing | Known | None = None
    if is_open(spec):
        try:
            spec, source = _identify(spec, Raw(root), data_dir, AS_USUAL)
        except UsageError:
            if root != registry.DEFAULT_ROOT:  # the user has said where the images are
                raise
            return None
    if not is_open(spec) and (found := find(spec, data_dir)):
        return Preview(found.spec, found.counts, found.image_size, found.splits, found.decoded)
    splits: list[Split] = ["train", "test", *(["val"] if spec.val else [])]
    try:
        source = source or load(spec, Raw(root))
    except MissingData:
        size = registry.lookup("dataset", spec.name).size
        if size is None:
            return None
        classes, images, height = size
        labels = np.repeat(np.arange(classes), images)
        cached = spec.options.get("cache_size")
        decoded = bool(cached) or "cache_size" not in spec.options
        height = cached or spec.options.get("image_size") or height
        return Preview(spec, subset_of(spec, labels, classes).counts, height, splits, decoded)
    if isinstance(source, Source):
        counts = subset_of(spec, source.train.labels, len(source.classes)).counts
        return Preview(spec, counts, source.train.image_size, splits, True)
    found = source.listing if isinstance(source, Known) else source
    part = found.parts["train"]
    labels, classes = part.labels, len(found.classes)
    if "test" not in found.parts:
        kept, _ = split_test(labels, classes, spec.options.get("test_per_class"), spec.data_seed)
        labels = labels[kept]
    width, height = _first_size(found)
    small = decoded_size(spec, np.array([width]), np.array([height]))
    size = small or spec.options["image_size"]
    splits = sorted({*splits, *found.parts})
    return Preview(spec, subset_of(spec, labels, classes).counts, size, splits, bool(small))


def _likely_size(spec: Dataset, found: Listing) -> int | None:
    """The size at which images will be decoded if all are as a few; None: they stay files."""
    if spec.options["cache_size"]:
        return spec.options["cache_size"]
    paths = found.parts["train"].paths
    sizes = []
    for path in paths[:: -(-len(paths) // PROBES)]:
        with suppress(BadImage):  # which will be named with all others
            sizes.append(decode(found.root / os.fsdecode(path)).size)
    widths, heights = np.array(sizes or [(0, 1)]).T
    return decoded_size(spec, widths, heights)


def _first_size(found: Listing) -> tuple[int, int]:
    path = found.root / os.fsdecode(found.parts["train"].paths[0])
    try:
        return decode(path).size
    except BadImage as error:
        raise LtnormError(f"{path} {error}", "`ltnorm prepare` checks all images") from error
