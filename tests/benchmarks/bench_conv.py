"""Convolutions of ResNet-32 on a CPU, next to what the machine multiplies at best.

uv run python tests/benchmarks/bench_conv.py [--batch-size 128] [--rounds 15] [--precision fp32]

GFLOP/s (two a multiply-add) of the forward, the gradient of the inputs and that of the weights, of
a 3x3 convolution with as many channels out as in: in the default layout and in channels_last by
oneDNN, and in fp32 the forward by NNPACK, whose Winograd algorithm multiplies less (its
rate counts the same work). Then a product of large matrices, and what a ResNet-32 could reach
at these rates: images a second of a step that does nothing but its convolutions.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from ltnorm import bench
from ltnorm.console import Output, grid
from ltnorm.floor import DTYPES

# Channels, height, and how many of them a ResNet-32 has.
SHAPES = ((16, 32, 10), (32, 16, 9), (64, 8, 9))
PASSES = ("forward", "inputs", "weights")
MATRIX = 2048


def actions(
    channels: int, size: int, images: int, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """What is timed, by layout and pass."""
    found: dict[str, Callable[[], object]] = {}
    for name, layout in (
        ("default", torch.contiguous_format),
        ("channels_last", torch.channels_last),
    ):
        x, w = (
            torch.randn(shape).to(dtype).contiguous(memory_format=layout)
            for shape in ((images, channels, size, size), (channels, channels, 3, 3))
        )
        g = torch.randn_like(x)

        def backward(which: list[bool], x=x, w=w, g=g) -> object:
            one = [1, 1]
            return torch.ops.aten.convolution_backward(
                g, x, w, None, one, one, one, False, [0, 0], 1, which
            )

        found[f"{name} forward"] = lambda x=x, w=w: F.conv2d(x, w, padding=1)
        found[f"{name} inputs"] = lambda run=backward: run([True, False, False])
        found[f"{name} weights"] = lambda run=backward: run([False, True, False])
    if dtype == torch.float32 and torch.backends.nnpack.is_available():
        x, w = torch.randn(images, channels, size, size), torch.randn(channels, channels, 3, 3)
        found["NNPACK forward"] = lambda: torch._nnpack_spatial_convolution(x, w, None, padding=1)
    return found


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    rates: dict[str, list[str]] = {}
    seconds = dict.fromkeys(("default", "channels_last"), 0.0)
    for channels, size, count in SHAPES:
        work = 2 * 9 * channels * channels * size * size * asked.batch_size
        made = actions(channels, size, asked.batch_size, DTYPES[asked.precision])
        for run in made.values():
            run()
        for name, times in bench.take_turns(made, asked.rounds).items():
            median = float(np.median(times))
            rates.setdefault(name, []).append(f"{work / median / 1e9:,.0f}")
            if (layout := name.split()[0]) in seconds:
                seconds[layout] += count * median
    a, b = (torch.randn(MATRIX, MATRIX).to(DTYPES[asked.precision]) for _ in range(2))
    [times] = bench.take_turns({"product": lambda: a @ b}, asked.rounds).values()
    columns = [
        ["GFLOP/s", *rates],
        *(
            [f"{channels} x {size}x{size}", *(row[i] for row in rates.values())]
            for i, (channels, size, _) in enumerate(SHAPES)
        ),
    ]
    output = Output()
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    output.product(
        f"{asked.precision}, batch {asked.batch_size}, medians of {asked.rounds} rounds, {threads}"
    )
    output.product(grid(columns))
    rate = 2 * MATRIX**3 / float(np.median(times)) / 1e9
    output.product(f"a product of {MATRIX} x {MATRIX} matrices: {rate:,.0f}")
    for layout, time in seconds.items():
        output.product(f"3x3 convolutions alone, {layout}: {asked.batch_size / time:,.0f} images/s")


if __name__ == "__main__":
    main()
