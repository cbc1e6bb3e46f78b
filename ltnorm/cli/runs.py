"""`ltnorm runs`."""

import os
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ltnorm.cli import options
from ltnorm.console import Output, grid

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ltnorm.reporting.state import RunState

# The largest unit of time that fits at least once: its seconds, and its name.
AGES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def command(
    paths: Annotated[list[Path] | None, typer.Argument(help="Folders of runs (results).")] = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="Only failed, unfinished and damaged runs, and why.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """List runs: state, progress, age and size.

    A run is finished, running (a process is making it), failed, unfinished (interrupted or
    killed) or damaged.

    `ltnorm runs results/`
    """
    from ltnorm.errors import NothingFound
    from ltnorm.reporting import schema, state

    output = Output(quiet=quiet, json=json)
    paths = paths or [options.OUT]
    found = schema.find_runs(paths)
    if not found:
        raise NothingFound(
            f"no runs in {' '.join(map(str, paths))}",
            "`ltnorm train --norm bn --norm compound` makes some",
        )
    runs = state.states(found, size=True)
    if failed:
        good = (state.State.finished, state.State.running)
        runs = [run for run in runs if run.state not in good]
    output.product(_shown(runs, paths, len(found)))
    output.document({"runs": [vars(run) | {"directory": str(run.directory)} for run in runs]})


def _shown(runs: Sequence["RunState"], paths: Sequence[Path], found: int) -> "RenderableType":
    """The table, the reasons of what is not finished, and how many there are of each state."""
    from rich.console import Group
    from rich.text import Text

    if not runs:
        return f"none of {_runs(found)} is failed, unfinished or damaged"
    top = paths[0] if len(paths) == 1 and paths[0].is_dir() else Path()
    names = [os.path.relpath(run.directory, top) for run in runs]
    parts: list[Any] = [_table(runs, names)]
    reasons = [(name, run) for name, run in zip(names, runs, strict=True) if run.error]
    parts += [Text()] if reasons else []
    for name, run in reasons:
        parts += [Text(f"{name}: {run.error}"), Text(f"  {run.hint}", style="dim")]
    counts = Counter(run.state for run in runs)
    told = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    total = sum(run.size or 0 for run in runs)
    return Group(*parts, Text(), Text(f"{_runs(len(runs))}: {told} · {_mebibytes(total)}"))


def _table(runs: Sequence["RunState"], names: Sequence[str]) -> "RenderableType":
    now = datetime.now(UTC)
    columns = [
        ["run", *names],
        ["state", *(run.state for run in runs)],
        ["epochs", *map(_epochs, runs)],
        ["done", *map(_done, runs)],
        ["age", *(_age(run.updated, now) for run in runs)],
        ["size", *(_mebibytes(run.size or 0) for run in runs)],
    ]
    return grid(columns, left=(0, 1), text_width=None)


def _runs(number: int) -> str:
    return f"{number:,} run" + ("s" if number != 1 else "")


def _epochs(run: "RunState") -> str:
    if run.epoch is None:
        return "–"
    return f"{run.epoch}/{run.epochs}" if run.epochs else str(run.epoch)


def _done(run: "RunState") -> str:
    return "–" if run.fraction is None else f"{int(100 * run.fraction)} %"


def _age(updated: str | None, now: datetime) -> str:
    """The time since then, in its largest unit."""
    if updated is None:
        return "–"
    seconds = max(0, int((now - datetime.fromisoformat(updated)).total_seconds()))
    size, unit = next((size, unit) for size, unit in AGES if seconds >= size or size == 1)
    return f"{seconds // size} {unit}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB"
