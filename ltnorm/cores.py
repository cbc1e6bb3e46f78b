"""The cores that this process may use, and how processes side by side divide them."""

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
SELF = Path("/proc/self/cgroup")


def usable() -> list[int]:
    """The numbers of the cores that this process may run on, in ascending order."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores() -> int:
    """How many cores this process has: fewer than are usable where a container has less time."""
    return max(1, math.ceil(min(len(usable()), _quota())))


def divided(numbers: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Cores in `count` sets of neighbours, which differ by one core at most."""
    ends = [i * len(numbers) // count for i in range(count + 1)]
    return [tuple(numbers[a:b]) for a, b in pairwise(ends)]


def pin(process: int, numbers: Sequence[int]) -> None:
    """Keep a process that has just been started, and all that it will start, on some cores."""
    try:
        os.sched_setaffinity(process, numbers)
    except (AttributeError, OSError):  # not on this system, or it has ended
        return


def _quota() -> float:
    """The cores' worth of time that the cgroup of this process, or one above it, allows."""
    try:
        lines = SELF.read_text().splitlines()
    except OSError:
        return math.inf
    own = next((line[len("0::/") :] for line in lines if line.startswith("0::/")), None)
    if own is None:
        return math.inf
    groups = [CGROUPS / own, *(CGROUPS / own).parents]
    return min(_allowed(group / "cpu.max") for group in groups if group.is_relative_to(CGROUPS))


def _allowed(file: Path) -> float:
    """Of `cpu.max`: microseconds of time, or `max`, in a period of so many."""
    try:
        time, period = file.read_text().split()
        return math.inf if time == "max" else int(time) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
