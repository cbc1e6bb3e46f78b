"""The clock of training: what is no training stops it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds of this process that were spent on training.

    Of trainings that go step by step together (see `training.together`) each has an equal share
    of its time, and evaluating or saving one of them is not charged to the others.
    """

    def __init__(self) -> None:
        self._stopped, self._depth, self._since = 0.0, 0, 0.0

    def now(self) -> float:
        """Its time; differences of it mean something."""
        return (self._since if self._depth else time.perf_counter()) - self._stopped

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Inside, it stands still."""
        if not self._depth:
            self._since = time.perf_counter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._stopped += time.perf_counter() - self._since


CLOCK = Clock()
