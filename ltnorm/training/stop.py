"""Ctrl-C and SIGTERM while a training is under way: the step that runs ends, and its state is kept.

Schedulers send SIGTERM and kill a while later, so that no step is waited for longer than `GRACE`.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

GRACE = 3.0  # seconds until a signal is delivered though the step has not ended
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """A signal that waits."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}

    @property
    def asked(self) -> bool:
        """Whether the training is to end."""
        return self._number is not None

    def deliver(self) -> None:
        """What the signal would have done at once: its handler raises."""
        if self._number is not None:
            number, self._number = self._number, None
            self._handlers[number](number, None)

    def _ask(self, number: int, _: FrameType | None) -> None:
        again, self._number = self.asked, number
        if again:  # who asks twice does not want to wait
            self.deliver()
        signal.setitimer(signal.ITIMER_REAL, GRACE)

    def _hurry(self, *_: Any) -> None:
        self.deliver()


class Within(Stop):
    """The signal that another `Stop` has, who delivers it."""

    def __init__(self, outer: Stop) -> None:
        super().__init__()
        self._outer = outer

    @property
    def asked(self) -> bool:
        """Whether the training is to end."""
        return self._outer.asked

    def deliver(self) -> None:
        """Left to the outer one."""


_outer: Stop | None = None


@contextmanager
def deferred() -> Iterator[Stop]:
    """Inside, Ctrl-C and SIGTERM wait for `Stop.deliver`, for GRACE seconds, or for the end.

    Only where they have handlers in Python, which raise; what they ignore or what ends the
    process stays so. Inside another `deferred` they wait for that one.
    """
    global _outer
    if _outer:
        yield Within(_outer)
        return
    with _waiting() as _outer:
        try:
            yield _outer
        finally:
            _outer = None


@contextmanager
def _waiting() -> Iterator[Stop]:
    stop = Stop()
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer"):
        yield stop
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    stop._handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    alarm = signal.signal(signal.SIGALRM, stop._hurry)
    for number in stop._handlers:
        signal.signal(number, stop._ask)
    try:
        yield stop
    finally:
        for number, handler in stop._handlers.items():
            signal.signal(number, handler)
        signal.setitimer(signal.ITIMER_REAL, 0)  # only now can nothing start it again
        signal.signal(signal.SIGALRM, alarm)
        stop.deliver()
