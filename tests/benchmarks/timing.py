"""Interleaved timing: machines are noisy, so only ratios within one run mean anything."""

import statistics
import time
from collections.abc import Callable


def medians(steps: dict[str, Callable[[], object]], rounds: int, warm_up: int = 3) -> dict:
    """The median seconds of each step, all steps taking turns `rounds` times."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(warm_up + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(title: str, seconds: dict[str, float], peer: str) -> str:
    """Milliseconds, and the ratio to the peer."""
    lines = [title]
    for name, value in seconds.items():
        lines.append(f"  {name:24s} {1000 * value:9.2f} ms   {value / seconds[peer]:6.3f} x {peer}")
    return "\n".join(lines)
