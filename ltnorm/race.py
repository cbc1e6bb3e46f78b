"""Whole training loops by turns: the peer's (see `ltnorm.peer`), and ours with each norm.

A turn is some steps of training as it goes on in the midst of an epoch, loading data included: an
iterator is started that is longer than the turn, its first steps are not timed, workers go on
loading while the others are, and it is closed, so that nothing of it works on in another's turn.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ltnorm import bench
from ltnorm.bench import Batch, Variant
from ltnorm.data import augment
from ltnorm.data.loader import Loader
from ltnorm.data.source import Pixels
from ltnorm.floor import Floor, Rates, count, floor, measured_rates
from ltnorm.peer import CIFAR_MEAN, CIFAR_STD, Peer, default_workers
from ltnorm.recipe import Recipe
from ltnorm.training.device import memory_format, resolve_device
from ltnorm.validation import validate

# Timed steps a turn: few on a CPU, where one takes long; a GPU's are short.
STEPS, STEPS_GPU = 4, 50
AHEAD = 2  # batches that each worker of a DataLoader makes before they are asked for
PEER = "peer"


class Entrant(Protocol):
    """A loop that takes turns.

    Attributes:
        untimed: steps until it is in its stride.
        passes: how often each image passes forward and backward.
    """

    untimed: int
    passes: tuple[int, int]

    def batches(self) -> Iterator[Any]:
        """An epoch."""
        ...

    def step(self, batch: Any) -> object:
        """One update."""
        ...


class Ours:
    """ltnorm's own loop, as `ltnorm train` builds it."""

    untimed = 1

    def __init__(
        self, variant: Variant, batch: Batch, pixels: Pixels, device: torch.device
    ) -> None:
        self.subject, train = bench.Subject(variant, batch, device), variant.recipe.train
        self.subject.objective.train()
        self.passes = self.subject.objective.cost
        self.loader = Loader(
            pixels,
            mean=CIFAR_MEAN,
            std=CIFAR_STD,
            train=train,
            seed=variant.recipe.seed,
            device=device,
            memory_format=memory_format(device, train.precision),
        )

    def batches(self) -> Iterator[augment.Batch]:
        """An epoch."""
        return self.loader.epoch(1)

    def step(self, batch: augment.Batch) -> Tensor:
        """One update; nothing waits for its loss."""
        return self.subject.step(batch)


@dataclass(frozen=True)
class Row:
    """How fast a loop trains. Times are medians over the rounds.

    `speed` is in those of the peer; `_low` and `_high` are its quartiles, over the rounds, within
    a round. `arithmetic_ms` and `memory_ms` are the floor of a step in the loop's precision (see
    `ltnorm.floor`), and `floor_reached` is the part of the floor's images a second that it makes.
    """

    label: str
    norm: str
    norm_options: str
    precision: str
    memory_format: str
    compiled: bool
    step_ms: float
    images_per_second: float
    speed: float
    speed_low: float
    speed_high: float
    arithmetic_ms: float
    memory_ms: float
    floor_images_per_second: float
    floor_reached: float


@dataclass(frozen=True)
class Race:
    """What came of it: a row a loop, and under what conditions; rates are by precision."""

    rows: list[Row]
    steps: int
    workers: int
    rates: dict[str, Rates]


def beyond_the_peer(recipe: Recipe) -> list[str]:
    """The keys of a recipe by which ltnorm would do other work than the peer."""
    plain = validate({})
    keys = ("optimizer", "nesterov", "decay_norm", "clip_grad", "ema", "flip", "color_jitter")
    keys += ("cutout", "mixup", "cutmix", "auto_augment", "views")
    found = [f"train.{k}" for k in keys if getattr(recipe.train, k) != getattr(plain.train, k)]
    if recipe.train.cropped(files=False) != "padded":
        found.append("train.crop")
    if recipe.model.weight_standardization:
        found.append("model.weight_standardization")
    return found + [k for k in ("loss", "sampler") if getattr(recipe, k) != getattr(plain, k)]


def random_pixels(batch: Batch, batches: int) -> Pixels:
    """So many batches of noise, with labels of a long tail."""
    rng = np.random.default_rng(0)
    size, count = batch.image_size, batch.images * batches
    shares = np.array(batch.counts()) / sum(batch.counts())
    images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return Pixels(images, rng.choice(batch.classes, size=count, p=shares))


def turn(entrant: Entrant, steps: int, device: torch.device) -> float:
    """The seconds of so many steps in the midst of an epoch."""
    batches = entrant.batches()
    for _ in range(entrant.untimed):
        entrant.step(next(batches))
    bench.wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        entrant.step(next(batches))
    bench.wait(device)
    return time.perf_counter() - start  # with the iterator its workers end


def measure(
    variants: Sequence[Variant],
    batch: Batch,
    rounds: int,
    tell: Callable[[str], None] = lambda text: None,
) -> Race:
    """Measure the peer and the variants, which share device and precision, side by side.

    Args:
        variants: the model, the batch size and the optimizer's settings are also the peer's.
        batch: what a step works on.
        rounds: turns of each, after one that warms up.
        tell: told what happens meanwhile.

    Raises:
        LtnormError: out of memory, or a step that fails.
    """
    recipe, workers = variants[0].recipe, default_workers()
    device = resolve_device(recipe.device)
    steps = STEPS if device.type == "cpu" else STEPS_GPU
    pixels = random_pixels(batch, 1 + workers + steps + AHEAD * workers)
    fp32 = recipe.train.model_copy(update={"precision": "fp32"})
    peers = Variant(PEER, recipe.model_copy(update={"train": fp32}), PEER)
    entrants: dict[str, Entrant] = {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []), bench.room(variants):
        for variant in (peers, *variants):
            tell(f"warming up {variant.label}")
            with bench.explained(variant, batch):
                if variant is peers:
                    made = Peer(variant.recipe, pixels, batch.classes, device, workers)
                else:
                    made = Ours(variant, batch, pixels, device)
                entrants[variant.label] = made
                turn(made, steps, device)
        tell("measuring what the machine can do")
        model = entrants[PEER].model
        rates = {
            precision: measured_rates(model, batch, device, precision)
            for precision in dict.fromkeys(("fp32", recipe.train.precision))
        }
        tell(f"timing turns of {steps} steps, {rounds} rounds")
        seconds: dict[str, list[float]] = {label: [] for label in entrants}
        labelled = {variant.label: variant for variant in (peers, *variants)}
        for label in bench.in_turns(entrants, rounds):
            with bench.explained(labelled[label], batch):  # a worker may be killed
                seconds[label].append(turn(entrants[label], steps, device) / steps)
    work = count(model, batch.image_size)
    rows = []
    for variant in (peers, *variants):
        precision, passes = variant.recipe.train.precision, entrants[variant.label].passes
        least = floor(work, rates[precision], batch.images, passes, precision)
        rows.append(_row(variant, seconds, batch, least, device))
    return Race(rows, steps, workers, rates)


def _row(
    variant: Variant,
    seconds: Mapping[str, Sequence[float]],
    batch: Batch,
    least: Floor,
    device: torch.device,
) -> Row:
    """`seconds` are those of a step, by label and round."""
    mine, peers, recipe = seconds[variant.label], seconds[PEER], variant.recipe
    is_peer = variant.label == PEER
    layout = torch.contiguous_format
    if not is_peer:
        layout = memory_format(device, recipe.train.precision)
    step = float(np.median(mine))
    speed, low, high = bench.ratio(peers, mine)
    return Row(
        label=variant.label,
        norm="bn" if is_peer else recipe.norm.name,
        norm_options="" if is_peer else recipe.norm.changes(),
        precision=recipe.train.precision,
        memory_format=str(layout).removeprefix("torch."),
        compiled=variant.compiled,
        step_ms=1000 * step,
        images_per_second=batch.images / step,
        speed=speed,
        speed_low=low,
        speed_high=high,
        arithmetic_ms=1000 * least.arithmetic,
        memory_ms=1000 * least.memory,
        floor_images_per_second=batch.images / least.seconds,
        floor_reached=least.seconds / step,
    )
