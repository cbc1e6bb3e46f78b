"""Several trainings step by step together: the seeds of one configuration, on one device.

A small network leaves most of a GPU idle. Steps of several trainings that are replayed as one
graph (see `training.graph`) run beside each other there. Each training keeps its own weights,
batches and random numbers, so that its result is that of training it alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ltnorm.errors import LtnormError
from ltnorm.training.graph import Graphs
from ltnorm.training.loop import Made, Steps, Update
from ltnorm.training.stop import deferred

T = TypeVar("T")


def alone(steps: Steps[T]) -> T:
    """Make the steps of one training, and return what it comes to."""
    graphs = Graphs()
    try:
        update = next(steps)
        while True:
            try:
                [loss] = graphs.make([update]) if update.train.graph else [update.make()]
            except BaseException as error:  # the training knows what to do about it
                update = steps.throw(error)
            else:
                update = steps.send(Made(loss))
    except StopIteration as end:
        return end.value


@dataclass
class _Lane(Generic[T]):
    """One of the trainings: the step that it waits for, or what has become of it.

    What draws from torch's global generators, as dropout does, goes on where this training left
    them.
    """

    steps: Steps[T]
    update: Update | None = None
    outcome: T | LtnormError | None = None
    random: list[Tensor] | None = None

    @contextmanager
    def own_numbers(self) -> Iterator[None]:
        if self.random is not None:
            _set_generators(self.random)
        try:
            yield
        finally:
            self.random = _generators()

    def make(self) -> Tensor:
        with self.own_numbers():
            return self.update.make()

    def begin(self) -> None:
        self._advance(lambda: next(self.steps))

    def go_on(self, made: Made) -> None:
        self._advance(lambda: self.steps.send(made))

    def fail(self, error: Exception) -> None:
        self._advance(lambda: self.steps.throw(error))

    def _advance(self, on: Callable[[], Update]) -> None:
        """To the next step, or to the end."""
        self.update = None
        with self.own_numbers():
            try:
                self.update = on()
            except StopIteration as end:
                self.outcome = end.value
            except LtnormError as error:
                self.outcome = error


def together(trainings: Sequence[Steps[T]]) -> list[T | LtnormError]:
    """Make the steps of several trainings, one of each in turn. One that fails ends alone.

    Returns:
        What each comes to: its result, or why it failed.
    """
    lanes = [_Lane(steps) for steps in trainings]
    graphs = Graphs()
    try:
        with deferred() as stop:
            for lane in lanes:
                lane.begin()
            while going := [lane for lane in lanes if lane.update]:
                ending = stop.asked
                _round(going, graphs)
                if ending:  # each has kept its state by now
                    stop.deliver()
    finally:
        for lane in lanes:
            lane.steps.close()
    return [lane.outcome for lane in lanes]


def _round(lanes: Sequence[_Lane], graphs: Graphs) -> None:
    """A step of each."""
    updates, share = [lane.update for lane in lanes], 1 / len(lanes)
    at_once = all(update.train.graph for update in updates)
    try:
        losses = graphs.make(updates) if at_once else [None] * len(lanes)
    except Exception as error:  # each training knows what to do about it
        for lane in lanes:
            lane.fail(error)
        return
    for lane, loss in zip(lanes, losses, strict=True):
        try:
            loss = lane.make() if loss is None else loss
        except Exception as error:
            lane.fail(error)
        else:
            lane.go_on(Made(loss, share))


def _generators() -> list[Tensor]:
    """Where torch's global generators are: that of the CPU, and of the GPU that is in use."""
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def _set_generators(states: list[Tensor]) -> None:
    cpu, *cuda = states
    torch.set_rng_state(cpu)
    for state in cuda:
        torch.cuda.set_rng_state(state)
