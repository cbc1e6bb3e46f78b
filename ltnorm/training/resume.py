"""What is kept of a training that is under way, so that it goes on where it was, to the bit.

    resume-<epochs>-<steps>-<hash>.pt    in the run's directory, the last two of them

Each is written whole or not at all, and its name has the hash of its content: what was damaged
since is known, and the one before it is taken. Loading it runs no code. Order and augmentation
follow from seed, epoch and step (see `ltnorm.data.loader`), so that their state is the place.
"""

import dataclasses
import hashlib
import io
import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ltnorm import __version__, parallel, pickled
from ltnorm.console import Output
from ltnorm.errors import LtnormError
from ltnorm.reporting.schema import write_bytes
from ltnorm.training import distributed
from ltnorm.training.optim import Average, Optimizer
from ltnorm.training.position import Epoch, Position
from ltnorm.training.stop import Stop, deferred

FORMAT = 1
KEPT = 2
# After an epoch a state is kept unless the last one took more than a part in so many of the time
# since: epochs of a small network on a GPU are shorter than writing what they have come to.
EACH = 20
PROCESSES = "number of processes"
NAME = re.compile(r"resume-(\d+)-(\d+)-([0-9a-f]{16})\.pt")


@dataclass(frozen=True)
class Keeping:
    """How a training is kept: after epochs (see `EACH`), and after so many steps if it is given.

    `anew` forgets what was kept, and repeats what is finished; so it does with the first of two
    stages unless `anew_first` is off.
    """

    steps: int | None = None
    anew: bool = False
    anew_first: bool = True


KEEPING = Keeping()


class Keeper:
    """Keeps nothing: every training starts anew.

    Attributes:
        machines: that have had a part in the training, each a device and a version of torch, in
            their order.
    """

    machines: Sequence[tuple[str, str]] = ()

    @contextmanager
    def training(
        self, objective: nn.Module, optimizer: Optimizer, average: Average | None
    ) -> Iterator[Position]:
        """Around a training; gives the position from which it goes on, its parts set to it."""
        yield Position()

    def due(self, at: Position) -> bool:
        """After a step: whether to keep where the training is."""
        return False

    def keep(self, at: Position) -> None:
        """Keep a position: when it is due, and after each epoch."""


class FileKeeper(Keeper):
    """Keeps the state of a training in its run's directory.

    Args:
        directory: of the run.
        run: what the state belongs to, plain values by name; another's is not taken.
        machine: that this process trains on.
        keeping: how often.
        output: told what is taken, and what cannot be read or written.
    """

    def __init__(
        self,
        directory: Path,
        run: dict[str, Any],
        machine: tuple[str, str],
        keeping: Keeping,
        output: Output,
    ) -> None:
        self.directory, self.output, self.keeping = directory, output, keeping
        self.run = run | {
            "version": __version__,
            "format": FORMAT,
            PROCESSES: parallel.world_size(),
        }
        self.machines = [machine]
        self._parts: _Parts | None = None
        self._stop = Stop()
        self._place: tuple[int, int] | None = None
        self._files: list[Path] = []  # that this training can go back to, the last one last
        self._failed = False
        self._next = 0.0  # the time from which another state is worth what it takes

    @contextmanager
    def training(
        self, objective: nn.Module, optimizer: Optimizer, average: Average | None
    ) -> Iterator[Position]:
        """As `Keeper`. Inside, Ctrl-C and SIGTERM wait until the state is kept."""
        self._parts = _Parts(objective, optimizer, average)
        if self.keeping.anew and parallel.rank() == 0:
            forget(self.directory)
        with deferred() as self._stop:
            yield self._restored() or Position()

    def due(self, at: Position) -> bool:
        """After a step: whether it is time, or the training is to end."""
        every = self.keeping.steps
        return self._stop.asked or bool(every and at.steps % every == 0)

    def keep(self, at: Position) -> None:
        """Keep a position; this is where a training ends that was told to."""
        if parallel.rank() == 0 and (self.due(at) or time.monotonic() >= self._next):
            start = time.monotonic()
            self._save(at)
            now = time.monotonic()
            self._next = now + EACH * (now - start)
        # (Other ranks may have heard of it before.)
        if distributed.from_first(lambda: self._stop.asked):
            self._stop.deliver()

    def _save(self, at: Position) -> None:
        if (place := (len(at.epochs), at.steps)) == self._place:
            return
        content = io.BytesIO()
        torch.save(self._state(at), content)
        epochs, steps = place
        name = f"resume-{epochs:05}-{steps:08}-{_hash(content.getbuffer())}.pt"
        try:
            write_bytes(self.directory / name, content.getbuffer())
        except OSError as error:  # it can go well the next time, and training needs it not
            if not self._failed:
                self.output.warn(
                    f"cannot keep the state of {self.directory}: {error.strerror or error}; "
                    "training goes on"
                )
            self._failed = True
            return
        self._place, self._failed = place, False
        self._files = [*self._files, self.directory / name][-KEPT:]
        # What was not taken goes, too: it may be of epochs that this training has not come to.
        forget(self.directory, self._files)

    def _state(self, at: Position) -> dict[str, Any]:
        assert self._parts
        return {
            "run": self.run,
            "machines": self.machines,
            "position": {
                "epochs": [dataclasses.astuple(epoch) for epoch in at.epochs],
                "losses": torch.stack(at.losses).cpu() if at.losses else None,
                "images": at.images,
                "seconds": at.seconds,
                "lr": at.lr,
            },
            "parts": self._parts.state(),
            "random": _random_state(),
        }

    def _restored(self) -> Position | None:
        """Set the parts to the last state that can be read; None where there is none."""
        assert self._parts
        state = distributed.from_first(self._last)
        if state is None:
            return None
        self._parts.restore(state["parts"])
        if parallel.rank() == 0:  # the others draw anew at each step
            _set_random_state(state["random"])
        before = [tuple(machine) for machine in state["machines"]]
        self.machines = list(dict.fromkeys([*before, *self.machines]))
        known = state["position"]
        losses = [] if known["losses"] is None else list(known["losses"].to(self._parts.device))
        epochs = [Epoch(*values) for values in known["epochs"]]
        at = Position(epochs, losses, known["images"], known["seconds"], known["lr"])
        self._place = len(at.epochs), at.steps
        self.output.note(f"{self.directory} goes on after {_words(at)}")
        return at

    def _last(self) -> dict[str, Any] | None:
        """The last state that can be read.

        Raises:
            LtnormError: it is of another number of processes.
        """
        for file in _kept(self.directory):
            if state := self._read(file):
                self._files = [file]
                return state
        return None

    def _read(self, file: Path) -> dict[str, Any] | None:
        """The state in a file; None, and why, where it cannot be taken."""
        why = None
        try:
            if _hash(file.read_bytes()) != NAME.fullmatch(file.name)[3]:
                why = "is damaged"
            else:
                state = pickled.read(file)
                found = _checked(state, self.run, self._parts)
        except OSError as error:
            why = f"cannot be read ({error.strerror or error})"
        except pickled.Refused as refused:
            why = str(refused)
        except (KeyError, TypeError, ValueError, AttributeError):
            why = "is not the state of this training"
        if why:
            self.output.warn(f"{file} {why}: going back to the one before it, if there is one")
            return None
        if found != self.run:
            self._check_processes(found)
            differs = [key for key in self.run if found.get(key) != self.run[key]]
            self.output.warn(f"{file} is of another {' and '.join(differs)}: not taken")
            return None
        return state

    def _check_processes(self, found: dict[str, Any]) -> None:
        """Raises LtnormError where a state is this run's but for the number of processes."""
        if found == self.run | {PROCESSES: (before := found.get(PROCESSES))}:
            raise LtnormError(
                f"{self.directory} was begun by {before} processes, and these are "
                f"{self.run[PROCESSES]}: its numbers would not be the same",
                "go on with as many (torchrun --nproc-per-node), or begin anew with --force",
            )


def _words(at: Position) -> str:
    step = f"step {len(at.losses)} of epoch {len(at.epochs) + 1}"
    return step if at.losses else f"epoch {len(at.epochs)}"


def forget(directory: Path, but: Sequence[Path] = ()) -> None:
    """Remove what was kept of a training, as far as it can be, `but` some of it."""
    for file in _kept(directory):
        if file not in but:
            with suppress(OSError):
                file.unlink()


def _checked(state: Any, mine: dict[str, Any], parts: "_Parts") -> dict[str, Any]:
    """What a state belongs to.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is not all there, or it is said to
            be of this run, `mine`, and does not fit its parts.
    """
    run, position, random_ = dict(state["run"]), state["position"], state["random"]
    [Epoch(*values) for values in position["epochs"]]
    [tuple(machine) for machine in state["machines"]]
    float(position["seconds"]), int(position["images"]), float(position["lr"])
    if position["losses"] is not None:
        list(position["losses"])
    if not {"torch", "cuda", "numpy", "python"} <= random_.keys():
        raise KeyError("random")
    now, then = parts.state(), state["parts"]
    fits = all(_shapes(then[name]) == _shapes(now[name]) for name in ("objective", "average"))
    # (An optimizer knows nothing of weights before its first step.)
    if run == mine and not (fits and len(then["optimizer"]) == len(now["optimizer"])):
        raise ValueError("other weights")
    return run


def _shapes(value: Any) -> Any:
    """The structure of a state, with shapes in place of tensors."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: _shapes(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_shapes(part) for part in value]
    return type(value)


def _kept(directory: Path) -> list[Path]:
    """The files of a run, the last first."""
    names = [path for path in directory.glob("resume-*.pt") if NAME.fullmatch(path.name)]
    return sorted(names, key=lambda path: path.name, reverse=True)


def _hash(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@dataclass(frozen=True)
class _Parts:
    """What training changes."""

    objective: nn.Module
    optimizer: Optimizer
    average: Average | None

    @property
    def device(self) -> torch.device:
        return next(self.objective.parameters()).device

    def state(self) -> dict[str, Any]:
        return {
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["average"])


def _random_state() -> dict[str, Any]:
    """The state of all global generators, from which a model or a loss may draw."""
    kind, numbers, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": (kind, torch.from_numpy(numbers.astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    with suppress(RuntimeError):  # another number of devices: then it is another machine
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
    kind, numbers, *rest = state["numpy"]
    np.random.set_state((kind, numbers.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
