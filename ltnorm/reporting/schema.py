"""The results tree: one directory a run, one row a run in its result.csv.

    <out>/<dataset>-<profile><ratio>/<setting>/seed<k>/
        recipe.yaml      the resolved recipe; running it repeats the run
        epochs.csv       one row an epoch
        per_class.csv    one row a class
        predictions.npz  prediction and probability of the true class for each image
        checkpoint.pt    the trained model
        result.csv       one row, written last: the mark of a finished run
        lock, status.json  while it is made, see `state`
        resume-*.pt      until it is finished: the state of its training, see `training.resume`
        log.txt, sweep.lock  of a sweep, see `sweep.plan`

A setting is `<model>-<norm>-<loss>[-drw][-<sampler>][-<method>[-<norm mode>]][-<tag>]`. Its
directory belongs to one fingerprint, which lies in it; another recipe of the same names gets a
directory of its own, with the start of its fingerprint added.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ltnorm.errors import LtnormError, NothingFound, UsageError
from ltnorm.recipe import BUDGETS, Recipe
from ltnorm.reporting import cells

SCHEMA = 2
RESULT, RECIPE, OWNER, PER_CLASS = "result.csv", "recipe.yaml", "fingerprint", "per_class.csv"
EPOCHS, PREDICTIONS = "epochs.csv", "predictions.npz"


@dataclass(frozen=True)
class Result:
    """One finished run. Accuracies are in percent; an empty group is an empty cell."""

    schema: int
    fingerprint: str
    dataset: str
    profile: str
    ratio: float | None
    data_seed: int
    set_id: str
    index_sha256: str
    model: str
    norm: str
    norm_options: str  # those that are not the defaults, as one would --set them
    loss: str
    loss_options: str
    sampler: str
    retrain: str | None  # the method of a second stage
    tau: float | None  # of tau-norm and logit-adjust, given or tuned
    first_stage: str | None  # the sha256 of the checkpoint that a second stage started from
    tag: str | None
    seed: int
    epochs: float
    steps: int
    batch_size: int
    lr: float
    precision: str
    eval_split: str
    group_scheme: str
    head_classes: int
    medium_classes: int
    tail_classes: int
    all: float
    head: float | None
    medium: float | None
    tail: float | None
    macro_f1: float
    gmean: float
    worst_class: float
    nll: float
    ece: float
    train_loss: float | None
    parameters: int
    images_processed: int
    images_backpropagated: int
    train_seconds: float
    images_per_second: float | None
    device: str
    torch: str
    ltnorm: str
    finished: str
    settings: str


@dataclass(frozen=True)
class Run:
    """A finished run and the directory that it lies in."""

    result: Result
    directory: Path


COLUMNS = tuple(f.name for f in dataclasses.fields(Result))
METRICS = ("all", "head", "medium", "tail", "macro_f1", "gmean", "worst_class", "nll", "ece")


def settings_json(recipe: Recipe) -> str:
    """What identifies the experiment (see `Recipe.settings`) as one JSON cell."""
    return json.dumps(recipe.settings(), sort_keys=True)


def _setting_name(recipe: Recipe) -> Path:
    data = recipe.dataset
    parts = [recipe.model.name.replace("/", "_"), recipe.norm.name, recipe.loss.name]
    parts += ["drw"] if recipe.loss.schedule == "drw" else []
    parts += [recipe.sampler.name] if recipe.sampler.name != "instance" else []
    if recipe.retrain:
        parts += [recipe.retrain.method]
        parts += [recipe.retrain.norm] if recipe.retrain.norm != "frozen" else []
        parts += [recipe.retrain.tag] if recipe.retrain.tag else []
    parts += [recipe.tag] if recipe.tag else []
    return Path(f"{data.slug}-{data.cut}") / "-".join(parts)


def check_out(out: Path) -> None:
    """Check, before work starts, that results can be written to `out`.

    Raises:
        UsageError: it is a file, or not writable.
    """
    hint = "choose another folder with --out DIR"
    try:
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out} is a file, not a folder", hint)
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--out {out} is not writable: {error.strerror or error}", hint) from error


def check_file(path: Path, flag: str) -> None:
    """Check, before work starts, that the file of a flag can be written.

    Raises:
        UsageError: it is a folder, or its folder is missing or not writable.
    """
    hint = f"choose another file with {flag} FILE"
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder, not a file", hint)
    try:
        if not path.exists() or path.is_file():  # a device needs no room in its folder
            probe = path.with_name(f".probe.{os.getpid()}")
            probe.touch()
            probe.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{flag} {path} is not writable: {reason}", hint) from error


def run_directory(recipe: Recipe, out: Path, *, claim: bool = True) -> Path:
    """The directory of a run, claimed for its fingerprint.

    The claim is the exclusive creation of a file, so that of several processes with different
    recipes each ends up with its own directory. Without `claim` nothing is created: it is the
    directory that the run would have now.

    Raises:
        LtnormError: the directory cannot be made, or both names are taken.
    """
    fingerprint = recipe.fingerprint()
    plain = out / _setting_name(recipe)
    own = plain.with_name(f"{plain.name}-{fingerprint[:6]}")
    # A run that is there stays where it is, though the plain name has become free.
    for directory in (own,) if own.is_dir() else (plain, own):
        try:
            owner = _owner(directory, fingerprint, claim)
        except OSError as error:
            raise LtnormError(
                f"cannot use {directory}: {error.strerror or error}",
                "choose another folder with --out DIR",
            ) from error
        if owner == fingerprint:
            return directory / f"seed{recipe.seed}"
    raise LtnormError(
        f"{own} belongs to another recipe", "give the run a --tag, or another --out folder"
    )


def _owner(directory: Path, fingerprint: str, claim: bool) -> str:
    """Who owns a directory, or would, after claiming it if it is free."""
    file = directory / OWNER
    if file.is_file():
        return file.read_text().strip()
    # A tree may have been copied without its marks; its results still say whose they are.
    for result in directory.glob(f"*/{RESULT}"):
        with contextlib.suppress(LtnormError):
            fingerprint = read_result(result).fingerprint
            break
    if not claim:
        return fingerprint
    directory.mkdir(parents=True, exist_ok=True)
    # Written aside and linked, so that nobody ever reads a half-written claim.
    temporary = directory / f".{OWNER}.{os.getpid()}"
    temporary.write_text(f"{fingerprint}\n")
    try:
        os.link(temporary, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        with contextlib.suppress(FileExistsError), file.open("x") as claimed:
            claimed.write(f"{fingerprint}\n")
    finally:
        temporary.unlink()
    return file.read_text().strip()


def finished(directory: Path) -> bool:
    """Whether the run in a directory is finished."""
    return (directory / RESULT).is_file()


def write_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Write a file whole or not at all, see `write_bytes`."""
    write_bytes(path, text.encode(), sync=sync)


def write_bytes(path: Path, content: bytes | memoryview, *, sync: bool = True) -> None:
    """Write a file whole or not at all; a link or a device is written through, not replaced.

    Without `sync` that holds of the end of the process alone, not of the machine's.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(content)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if sync:
                _sync(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A folder for all files of a finished run, which then take the place of earlier ones.

    While it is filled an earlier run stays as it is, also if there is no room for the new one.
    """
    aside = directory / f".{secrets.token_hex(4)}.tmp"
    aside.mkdir()
    try:
        yield aside
        (directory / RESULT).unlink(missing_ok=True)  # void from here on
        for file in sorted(aside.iterdir(), key=lambda file: file.name == RESULT):
            file.replace(directory / file.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_unwritten(directory: Path) -> None:
    """Remove what processes left that were killed while they wrote files of a run."""
    for path in directory.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV whole or not at all; None becomes an empty cell, see `cells` for text."""
    write_text(path, cells.text([header, *rows]))


def write_result(directory: Path, result: Result) -> None:
    """Write result.csv: this ends a run."""
    write_rows(directory / RESULT, COLUMNS, [dataclasses.astuple(result)])


def read_result(path: Path) -> Result:
    """Read one result.csv.

    Raises:
        LtnormError: not a result of this schema, or damaged.
    """
    hint = "delete or move the file, or compare with the version of ltnorm that wrote it"
    header, *rows = cells.read(path, hint)
    if "schema" not in header or "fingerprint" not in header:
        raise LtnormError(f"{path} is not a result of ltnorm", hint)
    if len(rows) != 1 or len(rows[0]) != len(header):
        raise LtnormError(f"{path} is damaged: it must hold one whole row", hint)
    row = dict(zip(header, rows[0], strict=True))
    if row["schema"] != str(SCHEMA) or tuple(header) != COLUMNS:
        raise LtnormError(
            f"{path} has schema {row['schema'] or '?'} with other columns than this ltnorm "
            f"(schema {SCHEMA})",
            hint,
        )
    try:
        result = Result(**{f.name: _parse(row[f.name], f.type) for f in dataclasses.fields(Result)})
        settings = json.loads(result.settings)
        if not _are_settings(settings):
            raise ValueError("its settings are not those of a recipe")
    except (ValueError, RecursionError) as error:
        raise LtnormError(f"{path} is damaged: {error}", hint) from error
    return result


def _are_settings(settings: Any) -> bool:
    """Whether settings have the names and the budget that every recipe has."""
    if not isinstance(settings, dict):
        return False
    sections = [settings.get(key) for key in ("norm", "loss", "model", "dataset", "train")]
    if not all(isinstance(section, dict) for section in sections):
        return False
    *named, train = sections
    budgets = [train.get(unit) for unit in BUDGETS if isinstance(train.get(unit), int | float)]
    return len(budgets) == 1 and all(isinstance(one.get("name"), str) for one in named)


@functools.cache  # asked for each cell of thousands of files
def _kind(kind: Any) -> tuple[bool, bool]:
    """Whether a column may be empty, and whether it has floats."""
    return "None" in str(kind), "float" in str(kind)


def _parse(cell: str, kind: Any) -> Any:
    """A cell by the type of its column: int, float, str, or one of them or None."""
    optional, number = _kind(kind)
    if optional and cell == "":
        return None
    if number:
        value = float(cell)
        if not math.isfinite(value):
            raise ValueError(f"{cell} is not a finite number")
        return value
    return int(cell) if kind is int else cells.unescape(cell)


@dataclass(frozen=True)
class ClassRow:
    """One row of per_class.csv: a class, its images, and its accuracy in percent.

    The accuracy is None where no image of the class was evaluated.
    """

    class_: int
    name: str
    train_images: int
    group: str
    eval_images: int
    accuracy: float | None


CLASS_COLUMNS = tuple(f.name.rstrip("_") for f in dataclasses.fields(ClassRow))


def write_per_class(directory: Path, rows: Iterable[ClassRow]) -> None:
    """Write per_class.csv."""
    write_rows(directory / PER_CLASS, CLASS_COLUMNS, map(dataclasses.astuple, rows))


def read_per_class(path: Path) -> list[ClassRow]:
    """Read one per_class.csv, in its order.

    Raises:
        LtnormError: it is missing, damaged, or has other columns.
    """
    hint = "`ltnorm train --force` makes the run anew"
    header, *rows = cells.read(path, hint)
    if tuple(header) != CLASS_COLUMNS or not rows:
        raise LtnormError(f"{path} is damaged: it has no rows of {', '.join(CLASS_COLUMNS)}", hint)
    kinds = [f.type for f in dataclasses.fields(ClassRow)]
    if any(len(row) != len(kinds) for row in rows):
        raise LtnormError(f"{path} is damaged: it is cut off", hint)
    try:
        return [ClassRow(*(_parse(c, k) for c, k in zip(row, kinds, strict=True))) for row in rows]
    except ValueError as error:
        raise LtnormError(f"{path} is damaged: {error}", hint) from error


@dataclass(frozen=True)
class RunFolder:
    """A run's directory, the names of what lies in it, and its result row where it has one."""

    directory: Path
    files: frozenset[str]
    result: Path | None


def find_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """All runs below `paths`: folders with recipe.yaml or result.csv directly in them.

    A path can also be a result row itself, by whatever name.

    Raises:
        NothingFound: a path does not exist.
    """
    found: list[RunFolder] = []
    for path in paths:
        if path.is_file():
            found.append(RunFolder(path.parent, frozenset(os.listdir(path.parent)), path))
        elif path.is_dir():
            found += sorted(_below(path), key=lambda run: run.directory)
        else:
            raise NothingFound(
                f"no such file or folder: {path}",
                "`ltnorm train --norm bn --norm compound` writes results into results/",
            )
    return list({run.result or run.directory: run for run in found}.values())


def _below(path: Path) -> Iterator[RunFolder]:
    for place, _, names in os.walk(path):
        if RECIPE in names or RESULT in names:
            directory = Path(place)
            result = directory / RESULT if RESULT in names else None
            yield RunFolder(directory, frozenset(names), result)
