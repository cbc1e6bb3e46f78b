"""The loader's batch, against the training step of ResNet-8 with BN that it feeds.

uv run python tests/benchmarks/bench_loader.py
"""

import numpy as np
import torch
from bench_norms import Loss
from timing import medians, table

from ltnorm import models
from ltnorm.data.loader import Loader
from ltnorm.norms import norm_layer
from ltnorm.recipe import Train


def main() -> None:
    """Print milliseconds a batch of 128 and the ratio to the step."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(10000, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(10, size=10000)
    model = models.build("resnet8", 10, norm_layer("bn")).to(memory_format=torch.channels_last)
    optimizer, loss = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), Loss()
    steps = {}
    for name, cutout in (("loader", 0), ("loader with cutout", 8)):
        loader = Loader(
            images,
            labels,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            train=Train(cutout=cutout),
            seed=0,
            device=torch.device("cpu"),
        )
        batches = iter(loader.epoch(1))
        steps[name] = lambda batches=batches: next(batches)
    x, y = next(iter(loader.epoch(2)))

    def step() -> None:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    steps["step"] = step
    print(table("ResNet-8, batch 128", medians(steps, 40), "step"))


if __name__ == "__main__":
    main()
