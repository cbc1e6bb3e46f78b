"""What a training tells TensorBoard: files of events in the run's directory, written at once.

The records are tensorboard's own. Its writer is not used, nor torch's around it: there a thread
writes later, and what goes wrong in it ends neither quietly nor where it can be caught.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ltnorm.console import Output
from ltnorm.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from ltnorm.reporting.schema import Result
    from ltnorm.training.loop import Epoch

LOGS = ("tensorboard",)
FOLDER = "tensorboard"
EPOCH = {
    "loss": "train/loss",
    "lr": "train/lr",
    "images_per_second": "train/images_per_second",
    "accuracy": "eval/accuracy",
}
FINAL = ("all", "head", "medium", "tail", "nll", "ece")


def check(name: str | None) -> None:
    """Check, before work starts, that a log can be written; None is none.

    Raises:
        UsageError: no such log, or its package is missing.
    """
    if name is None:
        return
    if name not in LOGS:
        raise UsageError(f"unknown log '{name}'", did_you_mean(name, LOGS))
    try:
        import tensorboard.compat.proto.event_pb2
        import tensorboard.summary.writer.record_writer  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--log tensorboard needs tensorboard: {error}", 'pip install "ltnorm[tensorboard]"'
        ) from error


class Log:
    """Nothing is logged."""

    def epoch(self, row: "Epoch") -> None:
        """An epoch is over."""

    def result(self, row: "Result", epochs: int) -> None:
        """The run is finished, after so many epochs of its last stage."""


class TensorBoard(Log):
    """Scalars an epoch, the step being the epoch, and the final metrics at the last one.

    The files are opened when the first epoch is told: with epoch 1 those of an earlier training
    go. With a later one, of a run that goes on, a new file says that what is there from this epoch
    on is void. What goes wrong is told once, and the run goes on without a log.
    """

    def __init__(self, directory: Path, output: Output) -> None:
        self.directory, self.output = directory / FOLDER, output
        self.file: BinaryIO | None = None
        self.failed = False

    def epoch(self, row: "Epoch") -> None:
        """Write what an epoch has measured."""
        self._write(row.epoch, row.epoch, {tag: getattr(row, key) for key, tag in EPOCH.items()})

    def result(self, row: "Result", epochs: int) -> None:
        """Write the final metrics; an empty group has none."""
        self._write(epochs, epochs + 1, {f"final/{key}": getattr(row, key) for key in FINAL})

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # told before
                self.file.close()

    def _write(self, step: int, first: int, scalars: Mapping[str, float | None]) -> None:
        """Write scalars; a file that has to be opened for it goes on from the epoch `first`."""
        if self.failed:
            return
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=t, simple_value=v) for t, v in scalars.items() if v is not None]
        try:
            if self.file is None:
                self._open(first)
            self._add(Event(step=step, summary=Summary(value=values)))
        except OSError as error:
            self.failed = True
            reason = error.strerror or str(error)
            self.output.warn(f"the log in {self.directory} ends here, the run goes on: {reason}")

    def _open(self, first: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self.directory.mkdir(exist_ok=True)
        files = sorted(self.directory.glob("events.out.tfevents.*"))
        if first == 1:
            for file in files:
                file.unlink()
            files = []
        # Files are read by name: a clock that was set back must not put this one first.
        number = max([int(time.time()), *(_number(file) + 1 for file in files)])
        name = f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}"
        self.file = (self.directory / name).open("xb")
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def _add(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        event.wall_time = time.time()
        RecordWriter(self.file).write(event.SerializeToString())
        self.file.flush()


def _number(file: Path) -> int:
    """The time in the name of an event file, as TensorBoard sorts them."""
    digits = file.name.split(".")[3]
    return int(digits) if digits.isdecimal() else 0


@contextlib.contextmanager
def logged(directory: Path, output: Output) -> Iterator[Log]:
    """The log that `output.log` names, of the run in `directory`; closed however the run ends."""
    if output.log is None:
        yield Log()
        return
    log = TensorBoard(directory, output)
    try:
        yield log
    finally:
        log.close()
