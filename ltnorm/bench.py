"""What a norm costs: a whole training step, an evaluation forward and memory, against a baseline.

The step is the one that `ltnorm train` makes: the objective that the norm asks for, backward, and
the optimizer. Machines are noisy, so that only ratios of what was measured side by side mean
anything: the variants take turns, round by round.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler import profile

from ltnorm.data import augment
from ltnorm.data.longtail import long_tail_counts
from ltnorm.errors import LtnormError
from ltnorm.recipe import Recipe
from ltnorm.training import loop, optim
from ltnorm.training.build import build_model, build_objective, compiled
from ltnorm.training.device import memory_format, resolve_device, set_computing
from ltnorm.training.graph import Graphs

WARM_UP = 3
MIB = 2**20


@dataclass(frozen=True)
class Variant:
    """What is measured: one row.

    Attributes:
        label: a name of its own.
        recipe: with its precision resolved (see `training.build.concrete`).
        against: the label of the variant that ratios refer to.
        compile: whether the model goes through torch.compile though the recipe does not say so.
    """

    label: str
    recipe: Recipe
    against: str
    compile: bool = False

    @property
    def compiled(self) -> bool:
        """Whether the model goes through torch.compile."""
        return self.compile or self.recipe.train.compile


@dataclass(frozen=True)
class Batch:
    """The size of what a step is measured on, and of the classifier."""

    images: int = 128
    image_size: int = 32
    classes: int = 10

    def counts(self) -> list[int]:
        """Training images a class: a long tail, from which labels are drawn."""
        return long_tail_counts(5000, self.classes, 100)


@dataclass(frozen=True)
class Row:
    """What a variant costs. Times are medians over the rounds, ratios are to those of `against`.

    `_low` and `_high` are the quartiles, over the rounds, of the ratio within a round. Memory is
    the peak of a training step beyond weights, momentum and batch; None where the device cannot
    tell it.
    """

    label: str
    against: str
    norm: str
    norm_options: str
    compiled: bool
    parameters: int
    train_ms: float
    train_images_per_second: float
    train_ratio: float
    train_ratio_low: float
    train_ratio_high: float
    eval_ms: float
    eval_images_per_second: float
    eval_ratio: float
    eval_ratio_low: float
    eval_ratio_high: float
    memory_mib: float | None
    memory_ratio: float | None


def measure(
    variants: Sequence[Variant],
    batch: Batch,
    rounds: int,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Measure the variants, which share device and precision, side by side.

    Args:
        variants: each with the one that it is `against` among them.
        batch: what a step works on.
        rounds: how often each is timed, after a warm-up.
        tell: told what happens meanwhile.

    Raises:
        LtnormError: out of memory, or a step that fails.
    """
    device = resolve_device(variants[0].recipe.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), room(variants):
        subjects: dict[str, Subject] = {}
        for variant in variants:
            tell(f"warming up {variant.label}")
            with explained(variant, batch):
                subjects[variant.label] = subject = Subject(variant, batch, device)
                for _ in range(WARM_UP):
                    subject.train()
                subject.measure_memory()
        tell(f"timing training steps, {rounds} rounds")
        train = take_turns({k: s.train for k, s in subjects.items()}, rounds)
        for variant in variants:
            with explained(variant, batch):
                for _ in range(WARM_UP):
                    subjects[variant.label].evaluate()
        tell(f"timing evaluation, {rounds} rounds")
        evaluation = take_turns({k: s.evaluate for k, s in subjects.items()}, rounds)
    return [_row(subjects, label, train, evaluation) for label in subjects]


@contextmanager
def room(variants: Sequence[Variant]) -> Iterator[None]:
    """Room to compile all variants: they share code, which runs as it is beyond a limit."""
    compiled = sum(v.compiled for v in variants)
    if not compiled:  # importing the compiler takes longer than a measurement
        yield
        return
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=8 * compiled):
        yield


class Subject:
    """A variant ready to be measured: what `ltnorm train` would build, and one batch."""

    def __init__(self, variant: Variant, batch: Batch, device: torch.device) -> None:
        recipe = variant.recipe
        self.variant, self.device, self.peak = variant, device, None
        self.bf16 = recipe.train.precision == "bf16"
        set_computing(recipe.train, device)
        self.model = build_model(recipe, batch.counts(), batch.image_size)
        self.objective = build_objective(recipe, self.model, batch.counts())
        layout = memory_format(device, recipe.train.precision)
        self.objective.to(device=device, memory_format=layout)
        self.optimizer = optim.build(recipe.train, self.objective.parameters())
        if variant.compiled:
            self.model.forward = compiled(self.model.forward)
        images, labels = random_batch(batch)
        images = images.to(device).contiguous(memory_format=layout)
        self.batch = augment.Batch(images, labels.to(device))
        self._graphs = Graphs()

    def train(self) -> None:
        """One training step, from the batch on the device to the new weights."""
        self._switch(training=True)
        self.step(self.batch)
        wait(self.device)

    def step(self, batch: augment.Batch) -> Tensor:
        """One update of the weights, its loss; nothing waits for the device."""
        train = self.variant.recipe.train
        update = loop.Update(self.objective, self.optimizer, batch, train)
        return self._graphs.make([update])[0] if train.graph else update.make()

    @torch.inference_mode()
    def evaluate(self) -> None:
        """One forward in evaluation mode, in the precision of training."""
        self._switch(training=False)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            self.model(self.batch.images)
        wait(self.device)

    def measure_memory(self) -> None:
        """One more step, under observation, which costs time: gradients start from nothing."""
        self.optimizer.zero_grad()
        self.peak = peak_bytes(self.train, self.device)

    def _switch(self, training: bool) -> None:
        if self.objective.training != training:  # walking the modules takes time
            self.objective.train(training)


def random_batch(batch: Batch) -> tuple[Tensor, Tensor]:
    """Noise [N, 3, S, S], and labels int64 [N] drawn from the long tail."""
    images = torch.randn(batch.images, 3, batch.image_size, batch.image_size)
    shares = torch.tensor(batch.counts(), dtype=torch.float64)
    return images, torch.multinomial(shares, batch.images, replacement=True)


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def in_turns(names: Iterable[str], rounds: int) -> Iterator[str]:
    """Each name once a round; every other round goes backwards, so that none always follows the
    same one."""
    order = list(names)
    for i in range(rounds):
        yield from order[::-1] if i % 2 else order


def take_turns(actions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each action in each round; see `in_turns`."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for name in in_turns(actions, rounds):
        start = time.perf_counter()
        actions[name]()
        seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Sequence[float], against: Sequence[float]) -> tuple[float, float, float]:
    """The ratio of the medians of two actions that took turns, and the quartiles within rounds.

    On busy cores the ratio of the medians scattered less than the median of the ratios.
    """
    low, high = np.percentile(np.divide(seconds, against), (25, 75))
    return float(np.median(seconds) / np.median(against)), float(low), float(high)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes of tensors that `step` holds at one time, beyond what was there before it.

    None where the device does not tell.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not torch.profiler.kineto_available():
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes its own doings to stderr
    with profile(profile_memory=True) as observed:
        step()
    events = [
        event
        for event in observed.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


@contextmanager
def explained(variant: Variant, batch: Batch) -> Iterator[None]:
    """What torch raises inside as an expected failure: too much memory, or not compilable."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        what = f"{variant.recipe.model.name} with {variant.label}"
        size = f"{batch.images} images of {batch.image_size}x{batch.image_size}"
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in reason:
            raise LtnormError(
                f"out of memory: {what}, {size}", "try a smaller --batch-size or --model"
            ) from error
        hint = "try a larger --image-size or --batch-size, or another --device"
        if variant.compiled:
            hint = "leave out --compile; it needs a C++ compiler on the CPU, Triton on a GPU"
        raise LtnormError(f"{what} fails on {size}: {reason}", hint) from error


def _row(
    subjects: Mapping[str, Subject],
    label: str,
    train: Mapping[str, Sequence[float]],
    evaluation: Mapping[str, Sequence[float]],
) -> Row:
    subject = subjects[label]
    variant, images = subject.variant, len(subject.batch.labels)
    against = variant.against
    columns: dict[str, float] = {}
    for what, seconds in (("train", train), ("eval", evaluation)):
        median = float(np.median(seconds[label]))
        times, low, high = ratio(seconds[label], seconds[against])
        columns |= {
            f"{what}_ms": 1000 * median,
            f"{what}_images_per_second": images / median,
            f"{what}_ratio": times,
            f"{what}_ratio_low": low,
            f"{what}_ratio_high": high,
        }
    peak, base = subject.peak, subjects[against].peak
    return Row(
        label=label,
        against=against,
        norm=variant.recipe.norm.name,
        norm_options=variant.recipe.norm.changes(),
        compiled=variant.compiled,
        parameters=sum(p.numel() for p in subject.model.parameters()),
        memory_mib=None if peak is None else peak / MIB,
        memory_ratio=peak / base if peak and base else None,
        **columns,
    )
