"""One run on many devices: the processes that torchrun starts, and what they tell each other.

Rank 0 alone decides, writes and speaks; all ranks train. Numbers travel over the default group
(nccl on GPUs, else gloo), decisions over a gloo group of their own, on which ranks may wait for
long. In a single process none of this does anything.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ltnorm import parallel
from ltnorm.data.loader import one_seed
from ltnorm.errors import LtnormError
from ltnorm.launch import Place, RankLost, place, take_over
from ltnorm.parallel import rank, world_size
from ltnorm.training.device import resolve_device

T = TypeVar("T")

# How long a rank waits for a number, and for a decision: rank 0 may be preparing images.
PATIENCE, LONG_PATIENCE = timedelta(minutes=30), timedelta(days=7)
# What the backends say of a rank that does not answer.
GONE = ("gloo", "nccl", "connection", "socket", "timed out", "broken pipe")
SAVING = 5.0  # seconds that a process has to end in order
SETTLING = 2.0  # seconds after which it is known what has become of the others
STOPPED = "stopped"  # the last word of a rank that was asked to end


@dataclass(frozen=True)
class _Ranks:
    """What this process knows of the others: where they are, how to reach them."""

    control: dist.ProcessGroup
    store: dist.Store
    processes: list[tuple[str, int]]  # of each rank: host and process


_ranks: _Ranks | None = None


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Inside, the processes that torchrun started are one.

    Args:
        device: as in the recipe.

    Raises:
        UsageError: no such device, or not as many of them as processes.
        RankLost: another process is gone.
    """
    global _ranks
    here = place()
    if here is None:
        yield
        return
    where = resolve_device(device)
    left = threading.Event()
    threading.Thread(target=_end_with_launcher, args=(os.getppid(), left), daemon=True).start()
    with _ended_by_sigterm():
        _ranks = _meet(here, where)
    try:
        with watched():
            yield
    except BaseException:
        if where.type == "cuda":  # ending nccl would wait for those who are gone
            raise
        dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()
    finally:
        left.set()
        _ranks = None


def _end_with_launcher(launcher: int, left: threading.Event) -> None:
    """torchrun ends its processes, but cannot where it is killed itself."""
    while not left.wait(2):
        if os.getppid() != launcher:
            os.kill(os.getpid(), signal.SIGTERM)
            if not left.wait(SAVING):
                os._exit(143)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """While ranks look for each other, deep in torch, no handler in Python would be called."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _meet(here: Place, device: torch.device) -> _Ranks:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    try:
        store, _, _ = next(dist.rendezvous("env://"))
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.PrefixStore("ltnorm", store),
            rank=here.rank,
            world_size=here.world_size,
            timeout=PATIENCE,
            device_id=device if cuda else None,
        )
        control = dist.new_group(backend="gloo", timeout=LONG_PATIENCE)
        processes = [("", 0)] * here.world_size
        me = socket.gethostname(), os.getpid()
        dist.all_gather_object(processes, me, group=control)
    except (RuntimeError, ValueError) as error:
        raise RankLost(
            f"the {here.world_size} processes do not find each other: {error}",
            "see --rdzv-endpoint of torchrun; GLOO_SOCKET_IFNAME names the network interface",
        ) from error
    return _Ranks(control, dist.PrefixStore("ltnorm/words", store), processes)


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, on all ranks; it is called there alone.

    Raises:
        LtnormError: `make` raised it; on all ranks.
    """
    if world_size() == 1:
        return make()
    assert _ranks
    told: list[Any] = [None, None]
    raised: LtnormError | None = None
    if rank() == 0:
        try:
            told[0] = make()
        except LtnormError as error:
            raised = error
            told[1] = (type(error), error.message, error.hint, error.exit_code)
    dist.broadcast_object_list(told, src=0, group=_ranks.control)
    value, failure = told
    if failure:
        kind, message, hint, code = failure
        error = raised or kind(message, hint)
        error.exit_code, error.of_all = code, True
        raise error
    return value


def clock(make: Callable[[], tuple[float, bool, bool]]) -> tuple[float, bool, bool]:
    """As `from_first`, of a number and two flags: after a step there is no time for pickles."""
    if world_size() == 1:
        return make()
    assert _ranks
    told = torch.tensor(make() if rank() == 0 else (0, 0, 0), dtype=torch.float64)
    dist.broadcast(told, src=0, group=_ranks.control)
    number, *flags = told.tolist()
    return number, bool(flags[0]), bool(flags[1])


def by_all(make: Callable[[], T]) -> T:
    """What `make` gives, on each rank its own; the others find what rank 0 has made before."""
    kept: list[T] = []
    from_first(lambda: kept.append(make()))
    return kept[0] if kept else make()


def check_same(value: str, what: str) -> None:
    """Raises LtnormError where a value differs from that of rank 0."""
    if from_first(lambda: value) != value:
        raise LtnormError(
            f"{what} differ from those of rank 0",
            "name one --data-dir that all machines share, or the same raw data with --root",
        )


@contextmanager
def by_first(context: AbstractContextManager[T]) -> Iterator[T | None]:
    """A context that rank 0 alone enters; gives what it gives there, and None elsewhere.

    Raises:
        LtnormError: it was raised on entering; on all ranks.
    """
    with ExitStack() as stack:
        entered: list[T] = []
        from_first(lambda: entered.append(stack.enter_context(context)))
        yield entered[0] if entered else None


def start_alike(module: nn.Module) -> None:
    """Give all ranks the weights and the running statistics of rank 0."""
    tensors = chain(module.parameters(), module.buffers())
    parallel.as_first(t for t in tensors if t.is_floating_point())


def draw_apart(*numbers: int) -> None:
    """Give each rank random numbers of its own for a step that `numbers` name, for dropout say.

    Those of rank 0 go on as they do in a single process.
    """
    if rank() > 0:
        torch.manual_seed(one_seed(*numbers, rank()))


@contextmanager
def watched() -> Iterator[None]:
    """Says what has happened where the ranks cannot go on together.

    An expected failure of this rank alone is one: the others wait for it.

    Raises:
        RankLost: another rank is gone, or this one has to leave.
    """
    try:
        yield
    except BaseException as error:
        lost = _reason(error) if _ranks else None
        if lost is None:
            raise
        raise lost from error


def _reason(error: BaseException) -> RankLost | None:
    """What an error means for the ranks; None if it is no loss of one."""
    if isinstance(error, LtnormError):
        if isinstance(error, RankLost) or getattr(error, "of_all", False):
            return None
        _say(error.message, error.hint)
        lost = RankLost(error.message, error.hint)
        lost.exit_code = error.exit_code
        return lost
    stop = None if isinstance(error, Exception) else error
    if stop is None:
        if not any(word in str(error).lower() for word in GONE):
            return None
        try:
            _settle()
        except BaseException as asked:  # torchrun ends all others where one is gone
            stop = asked
    if stop is None or _gone() or _failures():
        return _lost()
    _say(STOPPED, "")
    if stop is not error:
        raise stop
    return None


def _settle() -> None:
    """Wait until it is known why another rank does not answer."""
    end = time.monotonic() + SETTLING
    while not (_gone() or _failures()) and time.monotonic() < end:
        time.sleep(0.05)  # a process that was killed is there until its parent hears of it


def _lost() -> RankLost:
    """The error for a rank that is gone: its own, where it left one. This one ends, too."""
    _say(STOPPED, "")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until it has said why
    for number, (message, hint) in _failures().items():
        return RankLost(f"rank {number}: {message}", hint)
    gone = _gone()
    if gone and gone == list(range(rank())):
        take_over()
    which = ", ".join(map(str, gone))
    what = f"rank {which} of {world_size()} is" if which else f"one of {world_size()} ranks is"
    return RankLost(
        f"{what} gone: it was killed, or its machine cannot be reached",
        "what it printed last may say why; start all again by the same command",
    )


def _say(message: str, hint: str) -> None:
    """Leave a last word to the other ranks."""
    if _ranks:
        with suppress(RuntimeError):
            _ranks.store.set(str(rank()), json.dumps([message, hint]))


def _words() -> dict[int, tuple[str, str]]:
    """The last words of the other ranks that have left some."""
    assert _ranks
    words = {}
    with suppress(RuntimeError):  # who keeps them may be gone, too
        for other in range(world_size()):
            if other != rank() and _ranks.store.check([str(other)]):
                words[other] = tuple(json.loads(_ranks.store.get(str(other))))
    return words


def _failures() -> dict[int, tuple[str, str]]:
    return {r: (message, hint) for r, (message, hint) in _words().items() if message != STOPPED}


def _gone() -> list[int]:
    """The ranks on this machine that have ended without a word."""
    assert _ranks
    host, gone, words = socket.gethostname(), [], _words()
    for other, (where, process) in enumerate(_ranks.processes):
        if where != host or other in words or other == rank():
            continue
        try:
            os.kill(process, 0)
        except OSError:
            gone.append(other)
    return gone
