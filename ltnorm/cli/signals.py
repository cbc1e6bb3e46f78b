"""SIGTERM as an exception, so that what is open is closed and one line says what happened."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt, nothing may take it for an error of its own."""


@contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` where the main thread is when SIGTERM arrives."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _on_terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _on_terminate(*_: Any) -> None:
    raise Terminated
