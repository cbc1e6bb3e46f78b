"""A list as a text file: a line `path label` an image; what can be wrong in one, and between lists.

No image is looked for here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ltnorm.data.source import Split, printable
from ltnorm.errors import UsageError

FORM = "a line is `path label`: a path below --root, a space, tab or comma, a number from 0"


@dataclass(frozen=True)
class Entries:
    """A list as it was read: paths with / between folders, int64 labels, and line numbers."""

    file: str
    paths: list[str]
    labels: np.ndarray
    lines: list[int]


def parse(file: Path) -> Entries:
    """Read a list.

    The last field of a line is the label, so that paths may hold spaces. Empty lines and those
    that begin with # are skipped.

    Raises:
        UsageError: the file cannot be read, or a line is malformed, which it names.
    """
    shown = printable(str(file))
    try:
        text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise UsageError(f"cannot read {shown}: {error.strerror or error}", FORM) from error
    paths, labels, lines = [], [], []
    wrong: list[tuple[int, str]] = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip(" \t\r")
        if not line or line[0] == "#":
            continue
        path = line.rstrip("0123456789")
        label = line[len(path) :]
        path, mistake = _path(path) if label else ("", "has no number as its last field")
        if mistake is None and len(label) > 9:
            mistake = f"has a label of {len(label)} digits"
        if mistake is not None:
            wrong.append((number, mistake))
        paths.append(path)
        labels.append(label)
        lines.append(number)
    if wrong:
        raise UsageError(f"{shown}:{wrong[0][0]}: {wrong[0][1]}{more(wrong)}", FORM)
    if not paths:
        raise UsageError(f"{shown} lists no images", FORM)
    return Entries(shown, paths, np.array(labels, dtype=np.int64), lines)


def _path(field: str) -> tuple[str, str | None]:
    """What stands before the label as a path in normal form, and what is wrong with it."""
    if not field.endswith((" ", "\t", ",")):
        return "", "has no number as its last field"
    path = field.rstrip(" \t,").replace("\\", "/")
    if path.startswith("/") or path[1:3] == ":/":
        return "", f"'{printable(path)}' is an absolute path"
    if "\0" in path:
        return "", "holds a zero byte (the list must be UTF-8)"
    if "/." in path or "//" in path or path[:1] == ".":
        steps = [step for step in path.split("/") if step not in ("", ".")]
        if ".." in steps:
            return "", f"'{printable(path)}' leaves the root by .."
        path = "/".join(steps) + ("/" if path.endswith("/") else "")
    if not path or path[-1] == "/":
        return "", "has no file before its label"
    return path, None


def refuse_repeats(entries: Mapping[Split, Entries]) -> None:
    """Refuse a path that stands twice in a list, or in two lists."""
    for listed in entries.values():
        if len(set(listed.paths)) < len(listed.paths):
            first: dict[str, int] = {}
            again = [i for i, p in enumerate(listed.paths) if first.setdefault(p, i) != i]
            path = listed.paths[again[0]]
            raise UsageError(
                f"{listed.file}:{listed.lines[again[0]]}: {printable(path)} stands in line "
                f"{listed.lines[first[path]]} already{more(again)}",
                "remove the lines that repeat an image",
            )
    for one, two in (("train", "test"), ("val", "test"), ("train", "val")):
        if one in entries and two in entries:
            a, b = entries[one], entries[two]
            known = set(a.paths)
            if both := [i for i, path in enumerate(b.paths) if path in known]:
                raise UsageError(
                    f"{b.file}:{b.lines[both[0]]}: {printable(b.paths[both[0]])} is in {a.file} as "
                    f"well{more(both)}",
                    f"an image is in {one} or in {two}: check which lists --list-{one} and "
                    f"--list-{two} name",
                )


def refuse_gaps(entries: Mapping[Split, Entries]) -> int:
    """The number of classes, after the labels of all lists were checked."""
    train = entries["train"]
    labels = np.unique(train.labels)
    classes = len(labels)
    if labels[-1] != classes - 1:
        gap = int(np.flatnonzero(labels != np.arange(classes))[0])
        raise UsageError(
            f"{train.file} has no image of label {gap}, and labels up to {labels[-1]}",
            "number the classes from 0 without gaps",
        )
    if classes < 2:
        raise UsageError(f"{train.file} has 1 class, and 2 are the least", "add classes")
    for listed in entries.values():
        if beyond := np.flatnonzero(listed.labels >= classes).tolist():
            raise UsageError(
                f"{listed.file}:{listed.lines[beyond[0]]}: label {listed.labels[beyond[0]]} is not "
                f"in {train.file}, which has 0 to {classes - 1}{more(beyond)}",
                "all lists number the same classes alike",
            )
    return classes


def more(found: Sequence[Any]) -> str:
    """The number of those after the first, which is named: ` (and 3 more)`."""
    return f" (and {len(found) - 1:,} more)" if len(found) > 1 else ""
