"""The loader's batch and the optimizers, against a training step of ResNet-8 with BN and SGD.

uv run python tests/benchmarks/bench_loader.py
"""

import numpy as np
import torch

from ltnorm import bench
from ltnorm.data.loader import Loader
from ltnorm.data.source import Pixels
from ltnorm.recipe import Train
from ltnorm.validation import validate

ROUNDS = 40


def main() -> None:
    """Print milliseconds a batch of 128 and the ratio to the step."""
    actions = {
        "loader": _batches(),
        "with cutout": _batches(cutout=8),
        "with mixup": _batches(mixup=1.0),
        "with cutmix": _batches(cutmix=1.0),
        "with AutoAugment": _batches(auto_augment="cifar10"),
        "with RandAugment": _batches(auto_augment="randaugment"),
        "step": _step("sgd"),
        "step with SAM": _step("sam"),
        "step with AdamW": _step("adamw"),
    }
    bench.take_turns(actions, bench.WARM_UP)
    seconds = bench.take_turns(actions, ROUNDS)
    print("ResNet-8, batch 128")
    for name, values in seconds.items():
        times, *_ = bench.ratio(values, seconds["step"])
        print(f"  {name:20s} {1000 * np.median(values):9.2f} ms   {times:6.3f} x step")


def _step(optimizer: str):
    """A function that makes a training step."""
    train = {"precision": "fp32", "optimizer": optimizer}
    data = {"model": {"name": "resnet8"}, "train": train, "device": "cpu"}
    variant = bench.Variant(optimizer, validate(data), optimizer)
    return bench.Subject(variant, bench.Batch(), torch.device("cpu")).train


def _batches(**augmentation):
    """A function that makes one batch after the other."""
    rng = np.random.default_rng(0)
    loader = Loader(
        Pixels(
            rng.integers(0, 256, size=(10000, 32, 32, 3), dtype=np.uint8),
            rng.integers(10, size=10000),
        ),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        train=Train(**augmentation),
        seed=0,
        device=torch.device("cpu"),
    )
    batches = iter(loader.epoch(1))
    return lambda: next(batches)


if __name__ == "__main__":
    main()
