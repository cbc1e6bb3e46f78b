"""One norm layer, forward and backward: GroupNorm by moments against torch's, and against BN.

uv run python tests/benchmarks/bench_group.py

On the CPU in channels_last, on the shapes of a CIFAR ResNet, batch 128. By processor time of one
thread, so that a busy machine matters less.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ltnorm import bench
from ltnorm.norms import norm_layer

SHAPES = ((16, 32), (32, 16), (64, 8))  # channels, height
ROUNDS = 8


def main() -> None:
    """Print milliseconds."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}; ms of processor time, forward + backward")
    for dtype in (torch.float32, torch.bfloat16):
        for channels, size in SHAPES:
            ours = norm_layer("gn")(channels)
            layers = {
                "bn": norm_layer("bn")(channels),
                "torch's GroupNorm": nn.GroupNorm(ours.num_groups, channels),
                "by moments": ours,
            }
            actions = {
                name: _passes(layer, channels, size, dtype) for name, layer in layers.items()
            }
            bench.take_turns(actions, bench.WARM_UP)
            seconds: dict[str, list[float]] = {name: [] for name in actions}
            for name in bench.in_turns(actions, ROUNDS):
                seconds[name].append(actions[name]())
            shown = (f"{name} {1000 * np.median(values):.1f}" for name, values in seconds.items())
            print(f"{channels} x {size} x {size}, {str(dtype)[6:]}: " + ", ".join(shown))


def _passes(layer: nn.Module, channels: int, size: int, dtype: torch.dtype) -> Callable[[], float]:
    def noise() -> Tensor:
        x = torch.randn(128, channels, size, size).to(dtype)
        return x.contiguous(memory_format=torch.channels_last)

    x, grad = noise().requires_grad_(), noise()

    def both() -> float:
        start = time.thread_time()
        torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), grad)
        return time.thread_time() - start

    return both


if __name__ == "__main__":
    main()
