"""From a listing of files to files that are known: read, sound, and identified by their content."""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ltnorm.data import check
from ltnorm.data.check import Checked, shown
from ltnorm.data.source import SPLITS, Listing, Part, Split
from ltnorm.errors import LtnormError, UsageError

# Images of so many bytes are kept in memory when they are read, which spares decoding them twice.
KEPT = 1 << 30
# So many bad files are named in a message; a file names all.
NAMED = 10
# What a prepared set keeps of a listing besides.
KEPT_ABOUT = ("notes", "layout", "mean", "std")
# By what it is noticed that a file has changed: what `check.changed` takes.
COMPARED = ("size", "mtime_ns", "digest")

Counting = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
OnBad = Literal["fail", "skip"]


@dataclass(frozen=True)
class Known:
    """The files of a listing, all splits one after the other, after they were read.

    Attributes:
        listing: as it was found.
        paths: bytes [N]. labels: int64 [N]. splits: indices into SPLITS, int8 [N].
        checked: what each file was.
        good: whether it decodes, bool [N].
        content: the identity of the good images, 64 hexadecimal digits.
        images: those that were kept when they were read, uint8 [N, S, S, 3].
    """

    listing: Listing
    paths: np.ndarray
    labels: np.ndarray
    splits: np.ndarray
    checked: Checked
    good: np.ndarray
    content: str
    images: np.ndarray | None = None

    def of(self, split: Split) -> np.ndarray:
        """The indices of the good files of a split, int64."""
        return np.flatnonzero((self.splits == SPLITS.index(split)) & self.good)


def _entries(listing: Listing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """paths, labels and split indices of all files, in the order of SPLITS."""
    parts = [(i, listing.parts[s]) for i, s in enumerate(SPLITS) if s in listing.parts]
    return (
        np.concatenate([part.paths for _, part in parts]),
        np.concatenate([part.labels for _, part in parts]),
        np.concatenate([np.full(len(part.labels), i, np.int8) for i, part in parts]),
    )


def read(
    listing: Listing,
    title: str,
    data_dir: Path,
    *,
    on_bad: OnBad,
    workers: int | None,
    counting: Counting,
    size: int | None = None,
    resize: bool = False,
) -> Known:
    """Read every file of a listing.

    Args:
        listing: of a data set.
        title: what it is called.
        data_dir: where the list of bad files is written.
        on_bad: what is done about images that do not decode.
        workers, counting: processes that decode, and who is told how far they are.
        size, resize: at which images are kept, unless they are too many, and whether all are
            resized to that; None keeps none.

    Raises:
        UsageError: files are missing, or do not decode.
    """
    paths, labels, splits = _entries(listing)
    if listing.layout:
        _refuse_missing(listing, paths)
    images = None
    if size and len(paths) * 3 * size**2 <= KEPT:
        images = np.zeros((len(paths), size, size, 3), np.uint8)
    with counting(f"reading the images of {title}", len(paths)) as tell:
        checked = check.check(listing.root, paths, workers, tell, images, resize)
    leaving = [i for i, reason in checked.errors.items() if reason == check.LEAVES]
    if leaving:
        raise UsageError(
            f"{listing.root}/{shown(paths[leaving[0]])} is a link that leaves {listing.root} "
            f"(1 of {len(leaving):,})",
            "copy what it points to, or give --root a folder that holds both",
        )
    good = np.ones(len(paths), bool)
    good[list(checked.errors)] = False
    if on_bad == "fail":
        refuse_bad(listing, paths, checked, title, data_dir)
    for label, name in enumerate(listing.classes):
        if not (good & (labels == label) & (splits == 0)).any():
            raise UsageError(
                f"no training image of class '{name}' decodes", "replace its images, or remove it"
            )
    content = _content(listing.content, paths, labels, splits, good, checked.digest)
    return Known(listing, paths, labels, splits, checked, good, content, images)


def _refuse_missing(listing: Listing, paths: np.ndarray) -> None:
    """Lists name files: where some are missing, the archive or the folder is another one."""
    size, _ = check.stat(listing.root, paths)
    missing = np.flatnonzero(size < 0)
    if len(missing):
        first = f"{listing.root}/{shown(paths[missing[0]])}"
        raise UsageError(
            f"{len(missing):,} of {len(paths):,} listed files are missing; the first is {first}",
            f"expected below --root: {listing.layout}",
        )


def refuse_bad(
    listing: Listing, paths: np.ndarray, checked: Checked, title: str, data_dir: Path
) -> None:
    """Raise LtnormError if images do not decode, with the name of a file that lists them.

    Where all do, such a file of an earlier time is removed.
    """
    file = data_dir / f"{title}-bad-images.txt"
    if not checked.errors:
        file.unlink(missing_ok=True)  # from before they were mended
        return
    bad = [f"{shown(paths[i])} ({reason})" for i, reason in sorted(checked.errors.items())]
    file.write_text("".join(f"{line}\n" for line in bad), encoding="utf-8", errors="replace")
    more = f" and {len(bad) - NAMED:,} more" if len(bad) > NAMED else ""
    raise LtnormError(
        f"{len(bad):,} of {len(paths):,} images under {listing.root} cannot be used: "
        f"{'; '.join(bad[:NAMED])}{more}",
        f"`ltnorm prepare --on-bad skip` leaves them out; {file} lists all of them",
    )


def _content(
    listed: str | None,
    paths: np.ndarray,
    labels: np.ndarray,
    splits: np.ndarray,
    good: np.ndarray,
    digests: np.ndarray,
) -> str:
    """The identity of the good files, from their split, label, path and bytes.

    Published lists have one of their own, as long as none of their images is left out.
    """
    if listed and good.all():
        return listed
    whole = hashlib.sha256((listed or "").encode())
    for i in np.flatnonzero(good).tolist():
        whole.update(b"%d %d %b\0%b" % (splits[i], labels[i], paths[i], digests[i].tobytes()))
    return whole.hexdigest()


def record(known: Known, file: Path) -> None:
    """Write down what is known, so that `recognise` need not read the files again."""
    arrays = {f.name: getattr(known.checked, f.name) for f in fields(Checked)}
    bad = arrays.pop("errors")
    np.savez(
        file,
        paths=known.paths,
        labels=known.labels,
        splits=known.splits,
        good=known.good,
        content=np.array(known.content),
        listed=np.array(known.listing.content or ""),
        bad=np.array(sorted(bad), np.int64),
        reasons=np.array([bad[i] for i in sorted(bad)], str),
        **arrays,
    )


def recognise(listing: Listing, file: Path) -> Known | str:
    """What was recorded of a listing, if its files are still the same; else what has changed."""
    recorded = _recorded(file)
    paths, labels, splits = _entries(listing)
    if not np.array_equal(paths, recorded["paths"]):
        added = len(np.setdiff1d(paths, recorded["paths"]))
        gone = len(np.setdiff1d(recorded["paths"], paths))
        return f"{added:,} files added, {gone:,} gone"
    same = (listing.content or "") == str(recorded["listed"])
    for name, ours in (("labels", labels), ("splits", splits)):
        same = same and np.array_equal(ours, recorded[name])
    if not same:
        return "other labels or splits"
    return _changes(recorded, listing.root) or _known(listing, recorded)


def restore(root: Path, classes: list[str], about: Mapping[str, Any], file: Path) -> Known:
    """What was recorded, with the listing that it was recorded of. No file is looked at.

    Args:
        root: where the files lie.
        classes: their names.
        about: the fields KEPT_ABOUT of the listing.
        file: the record.
    """
    recorded = _recorded(file)
    parts = {
        split: Part(recorded["paths"][member], recorded["labels"][member])
        for i, split in enumerate(SPLITS)
        if (member := recorded["splits"] == i).any()
    }
    known = {key: tuple(v) if isinstance(v, list) else v for key, v in about.items()}
    content = str(recorded["listed"]) or None
    return _known(Listing(root, classes, parts, content=content, **known), recorded)


def changes(root: Path, file: Path) -> str:
    """What has changed of the recorded files below `root`, in words; empty if nothing has."""
    return _changes(_recorded(file), root)


def _recorded(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as saved:
        return {name: saved[name] for name in saved.files}


def _known(listing: Listing, recorded: Mapping[str, np.ndarray]) -> Known:
    arrays = {f.name: recorded[f.name] for f in fields(Checked) if f.name != "errors"}
    errors = dict(zip(recorded["bad"].tolist(), recorded["reasons"].tolist(), strict=True))
    return Known(
        listing,
        *(recorded[name] for name in ("paths", "labels", "splits")),
        Checked(**arrays, errors=errors),
        recorded["good"],
        str(recorded["content"]),
    )


def _changes(recorded: Mapping[str, np.ndarray], root: Path) -> str:
    missing = recorded["size"] < 0  # or not to be read
    paths, *known = (recorded[name][~missing] for name in ("paths", *COMPARED))
    changed = [(shown(paths[i]), why) for i, why in check.changed(root, paths, *known).items()]
    gone = recorded["paths"][recorded["bad"][recorded["reasons"] == check.MISSING]]
    there, _ = check.stat(root, gone)
    changed += [(shown(path), "is there now") for path in gone[there >= 0]]
    if not changed:
        return ""
    first, reason = changed[0]
    more = f", and {len(changed) - 1:,} other files" if len(changed) > 1 else ""
    return f"{first} {reason}{more}"
