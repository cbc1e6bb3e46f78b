"""`ltnorm sweep --dry-run`: which runs, what has become of them, and how long they would take."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltnorm.console import Output, grid

if TYPE_CHECKING:
    from ltnorm.sweep.estimate import Estimate
    from ltnorm.sweep.plan import Job


def show(
    planned: Sequence["Job"],
    places: Sequence[str | None],
    measure: bool,
    force: bool,
    output: Output,
) -> None:
    """What would be run, where, and how long it would take."""
    from ltnorm.sweep.progress import duration

    states = {job: "finished" if job.result() else str(job.state().state) for job in planned}
    for job in planned:
        if states[job] == "unfinished" and not job.status():
            states[job] = "new"
    missing = [job for job in planned if force or states[job] != "finished"]
    found = None
    if measure and missing:
        from ltnorm.sweep.estimate import estimate

        found = estimate(missing, places, output.note)
    output.product(_plan_table(planned, states, found))
    counts = ", ".join(f"{n} {state}" for state, n in sorted(Counter(states.values()).items()))
    repeated = "; finished ones would be repeated" if force and len(missing) else ""
    output.product(f"\n{len(planned)} runs: {counts}{repeated}")
    if found:
        output.product(
            f"about {duration(found.total)}, {len(places)} at a time; the longest run "
            f"{duration(found.longest)} (training steps timed on this machine)"
        )
        if found.unknown:
            output.product(f"without {found.unknown} runs whose time is not known")
    output.document(
        {
            "runs": [_planned(job, states[job], found) for job in planned],
            "at_a_time": len(places),
            "seconds": found.total if found else None,
            "longest_seconds": found.longest if found else None,
        }
    )


def _planned(job: "Job", state: str, found: "Estimate | None") -> dict[str, Any]:
    from ltnorm.sweep.grid import short

    return {
        "directory": str(job.directory),
        "state": state,
        "cell": {short(key): value for key, value in job.values.items()},
        "fingerprint": job.recipe.fingerprint(),
        "seconds": found.runs.get(job) if found else None,
    }


def _plan_table(
    planned: Sequence["Job"], states: Mapping["Job", str], found: "Estimate | None"
) -> Any:
    """A line for each setting, whose seeds are counted by their state."""
    from ltnorm.sweep.progress import duration

    settings: dict[Path, list[Job]] = {}
    for job in planned:
        settings.setdefault(job.directory.parent, []).append(job)
    lines = [["run", "seeds", "state", "each about"]]
    for directory, jobs in settings.items():
        counts = Counter(states[job] for job in jobs)
        state = ", ".join(f"{n} {s}" if len(counts) > 1 else s for s, n in counts.items())
        times = [found.runs.get(job) for job in jobs] if found else []
        known = [seconds for seconds in times if seconds is not None]
        time = duration(sum(known) / len(known)) if known else "–"
        seeds = _ranges(sorted(job.recipe.seed for job in jobs))
        lines.append([str(directory), seeds, state, time])
    columns = list(zip(*lines, strict=True))
    return grid(columns if found else columns[:-1], left=(0, 1, 2), text_width=None)


def _ranges(seeds: Sequence[int]) -> str:
    """Seeds as `--seeds` takes them: `0-4,7`."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and parts[-1][-1] == seed - 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
