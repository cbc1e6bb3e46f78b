"""The runs of a results tree: the finished ones to compare, and what has become of the others."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ltnorm.errors import LtnormError, NothingFound
from ltnorm.reporting import labels, schema, state
from ltnorm.reporting.schema import Run

if TYPE_CHECKING:
    import pandas


def load(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """All finished runs below `paths`, and warnings.

    Warned of are runs that are not finished, files left out, and runs that contradict each other.
    The same run found twice counts once.

    Raises:
        NothingFound: no result at all.
        LtnormError: results were found, but none can be read.
    """
    folders = schema.find_runs(paths)
    runs: dict[tuple[str, str, int], Run] = {}
    problems: list[LtnormError] = []
    warnings = [str(one) for one in state.unfinished(folders)]
    for folder in folders:
        if folder.result is None:
            continue
        try:
            run = Run(schema.read_result(folder.result), folder.directory)
        except LtnormError as error:
            problems.append(error)
            continue
        warnings += _told_twice(run, folder.result, runs)
    if not runs:
        _nothing(paths, problems, warnings)
    warnings += [f"left out: {problem.message}" for problem in problems]
    return list(runs.values()), warnings


def frame(*paths: Path | str) -> "pandas.DataFrame":
    """The finished runs below folders as a data frame: the columns of result.csv, and `directory`.

    Raises:
        NothingFound: no finished run.
        LtnormError: results were found, but none can be read.
    """
    import pandas  # half a second, which `compare` does without

    runs, _ = load([Path(path) for path in paths])
    rows = [dataclasses.asdict(run.result) | {"directory": str(run.directory)} for run in runs]
    return pandas.DataFrame(rows)


def _told_twice(run: Run, file: Path, runs: dict[tuple[str, str, int], Run]) -> list[str]:
    """Add a run, unless it is there already; a warning where it is there with other numbers."""
    key = (run.result.fingerprint, labels.shared(run.result, ("norm",)), run.result.seed)
    kept = runs.setdefault(key, run)
    if all(getattr(kept.result, m) == getattr(run.result, m) for m in schema.METRICS):
        return []
    first = kept.directory
    return [f"{file} repeats {first} with other numbers: only {first} is used"]


def _nothing(paths: Sequence[Path], problems: Sequence[LtnormError], others: Sequence[str]) -> None:
    if problems:
        more = f" ({len(problems)} such files)" if len(problems) > 1 else ""
        raise LtnormError(problems[0].message + more, problems[0].hint)
    named = " ".join(map(str, paths))
    if others:
        raise NothingFound(f"no finished run in {named}: {others[0]}", "`ltnorm runs` lists them")
    raise NothingFound(
        f"no results in {named}", "run `ltnorm train --norm bn --norm compound` first"
    )
