"""Several trainings step by step together: the seeds of one configuration, on one device.

A small network leaves most of a GPU idle. Steps of several trainings that are replayed as one
graph (see `training.graph`) run beside each other there. Each training keeps its own weights,
batches and random numbers, so that its result is that of training it alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ltnorm.errors import LtnormError
from ltnorm.training.clock import CLOCK
from ltnorm.training.graph import Graphs
from ltnorm.training.loop import Made, Steps, Update
from ltnorm.training.stop import deferred

T = TypeVar("T")


def alone(steps: Steps[T]) -> T:
    """Make the steps of one training, and return what it comes to."""
    graphs = Graphs()
    with closing(steps):
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
    them. (A graph draws for all of its trainings from one, which goes on from step to step.)
    """

    steps: Steps[T]
    update: Update | None = None
    outcome: T | LtnormError | None = None
    random: list[Tensor] | None = None
    graphed: bool = False

    @contextmanager
    def own_numbers(self) -> Iterator[None]:
        if self.graphed:
            yield
            return
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
                self.graphed = self.update.train.graph
            except StopIteration as end:
                self.outcome = end.value
            except LtnormError as error:
                self.outcome = error


def together(
    trainings: Sequence[Steps[T]],
    ended: Sequence[Callable[[T | LtnormError], None]] = (),
) -> list[T | LtnormError]:
    """Make the steps of several trainings, one of each in turn. One that fails ends alone.

    Args:
        trainings: which.
        ended: for each what is told what it comes to, as soon as it has ended.

    Returns:
        What each comes to: its result, or why it failed.
    """
    lanes = [_Lane(steps) for steps in trainings]
    graphs, left = Graphs(), dict(enumerate(lanes))

    def tell() -> None:
        for number in [number for number, lane in left.items() if not lane.update]:
            outcome = left.pop(number).outcome
            if ended:
                ended[number](outcome)

    with ExitStack() as stack:
        for lane in lanes:
            stack.enter_context(closing(lane.steps))
        stop = stack.enter_context(deferred())
        for lane in lanes:
            with CLOCK.stopped():
                lane.begin()
        tell()
        while left:
            ending = stop.asked
            _round(list(left.values()), graphs)
            tell()
            if ending:  # each has kept its state by now
                stop.deliver()
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
