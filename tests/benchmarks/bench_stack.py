"""Several seeds of one configuration on one device: what is the fastest way to train them?

uv run python tests/benchmarks/bench_stack.py [--model resnet8] [--norm bn] [--seeds 4]
    [--batch-size 128] [--rounds 9] [--device auto] [--precision auto]

Images a second of all seeds, of a step of each, on noise:

    in turn   a step of each, one after another (`--stack-seeds` on a CPU)
    vmap      torch.func.stack_module_state and vmap: grouped convolutions
    graph     as in turn, each step a CUDA graph of its own (--set train.graph=true)
    branches  one CUDA graph of all steps, a branch each (with --stack-seeds besides)

Several processes side by side are in bench_jobs.py.
"""

import argparse
import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from ltnorm import bench
from ltnorm.console import Output, grid
from ltnorm.recipe import Recipe
from ltnorm.training.build import concrete
from ltnorm.training.device import describe, resolve_device
from ltnorm.training.graph import Graphs
from ltnorm.training.loop import Update
from ltnorm.validation import validate


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--norm", default="bn")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    a = parser.parse_args()
    device = resolve_device(a.device)
    train = {"batch_size": a.batch_size, "precision": a.precision}
    sections = {"model": {"name": a.model}, "norm": {"name": a.norm}, "train": train}
    recipes = [
        concrete(validate(sections | {"seed": seed, "device": a.device}))[0]
        for seed in range(a.seeds)
    ]
    ways = {"in turn": in_turn(recipes, a.batch_size, device)}
    ways["vmap"] = stacked(recipes, a.batch_size, device)
    if device.type == "cuda":
        ways["graph"] = replayed(recipes, a.batch_size, device, together=False)
        ways["branches"] = replayed(recipes, a.batch_size, device, together=True)
    for way in ways.values():
        for _ in range(5):
            way()
    seconds = bench.take_turns(ways, a.rounds)
    images = a.seeds * a.batch_size
    rows = [["way", "images/s of all", "time"]]
    for name, times in seconds.items():
        ratio, low, high = bench.ratio(times, seconds["in turn"])
        spread = f"{ratio:.2f}x ± {(high - low) / 2:.2f}"
        rows.append([name, f"{images / float(np.median(times)):,.0f}", spread])
    output = Output()
    output.product(
        f"{a.model} {a.norm}, {a.seeds} seeds of batch {a.batch_size}, "
        f"{recipes[0].train.precision}, {a.rounds} rounds, {describe(device)}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    output.product(grid(list(zip(*rows, strict=True))))


def subjects(recipes: list[Recipe], size: int, device: torch.device) -> list[bench.Subject]:
    """What `ltnorm train` would build of each seed."""
    return [bench.Subject(bench.Variant("", r, ""), bench.Batch(size), device) for r in recipes]


def waiting(make: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """`make`, until the device has done it."""

    def whole() -> None:
        make()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return whole


def in_turn(recipes: list[Recipe], size: int, device: torch.device) -> Callable[[], None]:
    """A step of each, one after another."""
    made = subjects(recipes, size, device)
    return waiting(lambda: [subject.step(subject.batch) for subject in made], device)


def replayed(
    recipes: list[Recipe], size: int, device: torch.device, together: bool
) -> Callable[[], None]:
    """Steps as CUDA graphs, each its own, or one of all."""
    updates = [
        Update(subject.objective, subject.optimizer, subject.batch, subject.variant.recipe.train)
        for subject in subjects(recipes, size, device)
    ]
    if together:
        graphs = Graphs()
        return waiting(lambda: graphs.make(updates), device)
    each = [(Graphs(), update) for update in updates]
    return waiting(lambda: [graphs.make([update]) for graphs, update in each], device)


def stacked(recipes: list[Recipe], size: int, device: torch.device) -> Callable[[], None]:
    """One model of stacked weights; the optimizer's rule is the same for all of them."""
    made = subjects(recipes, size, device)
    parameters, buffers = stack_module_state([subject.objective for subject in made])
    base = copy.deepcopy(made[0].objective)
    images = torch.stack([subject.batch.images for subject in made])
    labels = torch.stack([subject.batch.labels for subject in made])
    momentum = {name: torch.zeros_like(p) for name, p in parameters.items()}
    bf16 = recipes[0].train.precision == "bf16"

    def loss(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return functional_call(base, (p, b), (x, y))

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            losses = vmap(loss, randomness="different")(parameters, buffers, images, labels)
        losses.sum().backward()
        with torch.no_grad():
            for name, p in parameters.items():
                momentum[name].mul_(0.9).add_(p.grad.add(p, alpha=2e-4))
                p.sub_(momentum[name], alpha=0.1)
                p.grad = None

    return waiting(step, device)


if __name__ == "__main__":
    main()
