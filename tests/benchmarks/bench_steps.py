"""What each step from the published loop to ltnorm's brings on a CPU, and what brings nothing.

uv run python tests/benchmarks/bench_steps.py [--model resnet32] [--rounds 9] [--only NAME ...]
    [--compile]

Whole training, loading data included (see ltnorm/race.py), with BN. Each row is one change of the
row that it is against; the last of those that begin with + is what `ltnorm train` does. Every row
has a process of its own, because some change what holds for a whole process; they take turns.
(OMP_WAIT_POLICY=active cannot take part: threads that spin while they wait take the cores from
the others.)
"""

import argparse
import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MethodType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ltnorm import bench, models, race
from ltnorm.console import Output, grid
from ltnorm.data.augment import Batch
from ltnorm.data.loader import Loader
from ltnorm.peer import CIFAR_MEAN, CIFAR_STD, Peer
from ltnorm.training.device import resolve_precision
from ltnorm.validation import validate

CPU, SIZE, STEPS = torch.device("cpu"), bench.Batch(), 3
PIXELS = STEPS + 9  # batches
FASTEST, _ = resolve_precision("auto", CPU)


class Fed(Peer):
    """The peer, with our loader in the place of its own."""

    untimed = 1

    def __init__(self, model: str, layout: torch.memory_format) -> None:
        settings, pixels = _recipe(model), race.random_pixels(SIZE, PIXELS)
        super().__init__(settings, pixels, SIZE.classes, CPU, workers=0)
        self.model.to(memory_format=layout)
        self.loader = Loader(
            pixels,
            mean=CIFAR_MEAN,
            std=CIFAR_STD,
            train=settings.train,
            seed=0,
            device=CPU,
            memory_format=layout,
        )

    def batches(self):
        """An epoch."""
        return self.loader.epoch(1)

    def step(self, batch: Batch) -> float:
        """One update."""
        return super().step((batch.images, batch.labels))


def _recipe(model: str, precision: str = "fp32"):
    data = {"model": {"name": model}, "train": {"precision": precision}, "device": "cpu"}
    return validate(data)


def _peer(model: str) -> Peer:
    return Peer(_recipe(model), race.random_pixels(SIZE, PIXELS), SIZE.classes, CPU)


def _ours(model: str, precision: str = FASTEST, compile_: bool = False) -> race.Ours:
    variant = bench.Variant("bn", _recipe(model, precision), race.PEER, compile_)
    return race.Ours(variant, SIZE, race.random_pixels(SIZE, PIXELS), CPU)


def _out_of_place(model: str) -> race.Ours:
    """Activations write to memory of their own."""

    def forward(block: models.BasicBlock, x: Tensor) -> Tensor:
        y = F.relu(block.norm1(block.conv1(x)))
        y = block.norm2(block.conv2(y))
        if block.stride > 1:
            x = x[:, :, :: block.stride, :: block.stride]
        if block.widen:
            x = F.pad(x, (0, 0, 0, 0, block.widen // 2, block.widen - block.widen // 2))
        return F.relu(y + x)

    made = _ours(model)
    for block in made.subject.model.blocks:
        block.forward = MethodType(forward, block)
    return made


def _fused(model: str) -> race.Ours:
    """One kernel for all that the optimizer does."""
    made = _ours(model)
    made.subject.optimizer.rate_on_device()
    return made


def _keeping_memory(model: str) -> race.Ours:
    """The allocator gives nothing back: no page is made anew (numbers from glibc's malloc.h)."""
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    libc = ctypes.CDLL(None)
    for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 64 << 20)):
        if not libc.mallopt(option, value):
            raise OSError(f"mallopt({option}) is refused")
    return _ours(model)


@dataclass(frozen=True)
class Change:
    """A row: what makes it, the row that it changes, the environment that it needs."""

    build: Callable[[str], race.Entrant]
    against: str
    environment: Mapping[str, str] = field(default_factory=dict)


COMPILED = "torch.compile"
HUGE = {"THP_MEM_ALLOC_ENABLE": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
OURS = "+ our step"
BEST = OURS if FASTEST == "fp32" else f"+ {FASTEST}"
CHANGES = {
    "peer": Change(_peer, "peer"),
    "+ our loader": Change(lambda m: Fed(m, torch.contiguous_format), "peer"),
    "+ channels_last": Change(lambda m: Fed(m, torch.channels_last), "+ our loader"),
    OURS: Change(lambda m: _ours(m, "fp32"), "+ channels_last"),
    BEST: Change(_ours, OURS if FASTEST != "fp32" else "+ channels_last"),
    COMPILED: Change(lambda m: _ours(m, compile_=True), BEST),
    "fused optimizer": Change(_fused, BEST),
    "not in place": Change(_out_of_place, BEST),
    "memory kept": Change(_keeping_memory, BEST),
    "huge pages": Change(_ours, BEST, HUGE),
    "threads bound": Change(_ours, BEST, {"OMP_PROC_BIND": "true"}),
    "no denormals": Change(lambda m: torch.set_flush_denormal(True) and _ours(m), BEST),
}


def main() -> None:
    """Print a row a change; or, as a worker, make a turn for each line that comes in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", action="append", choices=CHANGES, help="and what it is against")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too: a minute more")
    parser.add_argument("--worker", choices=CHANGES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        _work(CHANGES[asked.worker].build(asked.model))
        return
    names = asked.only or [n for n in CHANGES if asked.compile or n != COMPILED]
    names = [n for n in CHANGES if n in {*names, *(CHANGES[n].against for n in names)}]
    workers = {name: _start(name, asked.model) for name in names}
    try:
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for name in [*names, *bench.in_turns(names, asked.rounds)]:  # once to warm up
            seconds[name].append(_turn(workers[name]))
    finally:
        for worker in workers.values():
            worker.kill()
    _show({name: values[1:] for name, values in seconds.items()}, asked)


def _start(name: str, model: str) -> subprocess.Popen:
    command = [sys.executable, __file__, "--worker", name, "--model", model]
    environment = os.environ | CHANGES[name].environment
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def _turn(worker: subprocess.Popen) -> float:
    worker.stdin.write("\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def _work(entrant: race.Entrant) -> None:
    for _ in sys.stdin:
        print(race.turn(entrant, STEPS, CPU), flush=True)


def _show(seconds: Mapping[str, list[float]], asked: argparse.Namespace) -> None:
    rows = []
    for name, values in seconds.items():
        against = CHANGES[name].against
        against = against if against in seconds else name  # left out by --only
        speed, low, high = bench.ratio(seconds[against], values)
        images = STEPS * SIZE.images / np.median(values)
        of = f"{speed:.2f}x ± {(high - low) / 2:.2f}"
        rows.append((name, against, f"{images:,.0f}", of))
    headings = ("change", "against", "img/s", "speed")
    columns = [[h, *c] for h, c in zip(headings, zip(*rows, strict=True), strict=True)]
    threads = torch.get_num_threads()
    print(f"{asked.model}, {threads} threads, {asked.rounds} rounds of {STEPS} steps")
    Output().product(grid(columns, (0, 1)))


if __name__ == "__main__":
    main()
