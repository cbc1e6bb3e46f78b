"""How long runs would take: a few training steps of each kind, measured here, times their number.

What is measured is the step that `ltnorm train` makes with its augmentation. Left out are
evaluation, and the decoding of images that stay files.
"""

import heapq
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from ltnorm import bench
from ltnorm.cores import cores
from ltnorm.data.loader import Loader, batches_per_epoch
from ltnorm.data.source import IMAGENET_MEAN, IMAGENET_STD, Pixels
from ltnorm.errors import LtnormError
from ltnorm.recipe import Recipe, Train
from ltnorm.sweep.plan import Job
from ltnorm.training.device import memory_format, resolve_device
from ltnorm.training.graph import WARM_UP

# Of each kind so many steps, or as many as fit into so many seconds.
STEPS, SECONDS = 5, 2.0
# What of `train` changes how long a step takes.
TIMED = (
    *("batch_size", "optimizer", "precision", "ema", "clip_grad", "color_jitter", "auto_augment"),
    *("compile", "graph", "deterministic", "views"),
)


@dataclass(frozen=True)
class Estimate:
    """How long runs would take, in seconds.

    Attributes:
        runs: of each that is to be made; None where it could not be measured.
        total: of all, so many at a time.
        longest: of them.
        unknown: how many could not be measured.
    """

    runs: Mapping[Job, float | None]
    total: float
    longest: float
    unknown: int


def estimate(
    jobs: Sequence[Job],
    places: Sequence[str | None],
    tell: Callable[[str], None] = lambda text: None,
) -> Estimate:
    """Measure each kind of run for a moment.

    Args:
        jobs: that are to be made.
        places: of the runs that are made at a time: see `local.places`. Runs that share a GPU are
            taken to slow each other down as much.
        tell: told what happens meanwhile.
    """
    kinds: dict[str, Job] = {}
    for job in jobs:
        if not job.recipe.train.seconds:
            kinds.setdefault(_kind(job), job)
    tell(f"timing {len(kinds)} kinds of training steps")
    start = _start_up()
    sharing = max((places.count(place) for place in places if place), default=1)
    with _threads(max(1, cores() // len(places))):
        steps = {kind: _measured(job) for kind, job in kinds.items()}
    seconds = {job: _seconds(job, steps.get(_kind(job)), start, sharing) for job in jobs}
    known = [s for s in seconds.values() if s is not None]
    unknown = len(seconds) - len(known)
    return Estimate(seconds, makespan(known, len(places)), max(known, default=0.0), unknown)


def makespan(seconds: Sequence[float], places: int) -> float:
    """When the last of some runs ends, each of which starts where the first place is free."""
    free = [0.0] * places
    for run in seconds:
        heapq.heapreplace(free, free[0] + run)
    return max(free)


def steps_of(train: Train, images: int) -> int:
    """The training steps of a budget of epochs or steps."""
    return train.steps or (train.epochs or 0) * batches_per_epoch(images, train.batch_size)


def _kind(job: Job) -> str:
    """Runs of one kind have steps that take as long."""
    recipe = job.recipe
    sections = [s.model_dump(mode="json") for s in (recipe.model, recipe.norm)]
    train = [getattr(recipe.train, key) for key in TIMED]
    sections += [recipe.loss.name, *_size(job), recipe.device, *train]
    return json.dumps(sections)


def _size(job: Job) -> tuple[int, int]:
    """Image size and classes."""
    if job.data:
        return job.data.image_size, len(job.data.counts)
    return job.recipe.dataset.options.get("image_size", 32), 10


def _seconds(job: Job, step: float | None, start: float, sharing: int) -> float | None:
    train = job.recipe.train
    if train.seconds:
        return start + train.seconds
    if step is None or (job.data is None and not train.steps):
        return None
    steps = steps_of(train, sum(job.data.counts) if job.data else 0)
    told = job.status()
    left = 1.0 - told.fraction if told else 1.0
    retrain = job.recipe.retrain
    if retrain and retrain.trains and job.data:
        steps += steps_of(train.model_copy(update={"epochs": retrain.epochs}), sum(job.data.counts))
    return start + left * steps * step * sharing


def _start_up() -> float:
    """Of a process that trains."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import ltnorm.training.run"], check=False)
    return time.perf_counter() - began


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measured(job: Job) -> float | None:
    """The seconds of a step, or None if it fails: the median of some, after it is warm."""
    device = resolve_device(job.recipe.device)
    size, classes = _size(job)
    batch = bench.Batch(job.recipe.train.images_per_step, size, classes)
    variant = bench.Variant("", job.recipe, "")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            subject = bench.Subject(variant, batch, device)
            made = _batches(job.recipe, batch, device)
            for _ in range(1 + WARM_UP * job.recipe.train.graph):
                subject.train()
            times, began = [], time.perf_counter()
            while len(times) < STEPS and time.perf_counter() - began < SECONDS:
                start = time.perf_counter()
                next(made)
                subject.train()
                times.append(time.perf_counter() - start)
        except (LtnormError, RuntimeError, ValueError):  # out of memory, most often
            return None
    return float(np.median(times))


def _batches(recipe: Recipe, batch: bench.Batch, device: torch.device) -> Iterator[object]:
    """Batches of noise, augmented as the recipe has it, without end."""
    shape = (batch.images, batch.image_size, batch.image_size, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    loader = Loader(
        Pixels(noise, np.zeros(batch.images, np.int64)),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        train=recipe.train,
        seed=0,
        device=device,
        memory_format=memory_format(device, recipe.train.precision),
    )
    while True:
        yield from loader.epoch(1)
