"""Which of several processes this one is: what torchrun says in the environment."""

import os
from dataclasses import dataclass

from ltnorm.errors import LtnormError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class Place:
    """The place of a process among those that torchrun started.

    Attributes:
        rank: which it is of all, from 0.
        world_size: how many there are.
        local_rank: which it is on its machine: the number of its GPU.
        local_world_size: how many there are on its machine.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


class RankLost(LtnormError):
    """One of several processes is gone, or failed alone: the others cannot go on."""


def place() -> Place | None:
    """The place of this process; None where it is the only one."""
    try:
        rank, world_size, local_rank = (int(os.environ[key]) for key in VARIABLES)
    except (KeyError, ValueError):  # schedulers set some of them for purposes of their own
        return None
    if world_size < 2:
        return None
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return Place(rank, world_size, local_rank, local)


def is_first() -> bool:
    """Whether this process is the one that writes: the only one, or rank 0."""
    here = place()
    return here is None or here.rank == 0


_took_over = False


def take_over() -> None:
    """Rank 0 is gone: this process says so in its place."""
    global _took_over
    _took_over = True


def speaks() -> bool:
    """Whether this process prints."""
    return is_first() or _took_over
