"""Whole training with each norm against the loop that papers publish, and against the floor.

uv run python tests/benchmarks/bench_peer.py [--model resnet8 --model resnet32] [--rounds 7]
    [--precision fp32] [--device auto] [--batch-size 128]

The tables are those of `ltnorm bench --peer`. Without --precision: fp32, and bf16 where the device
multiplies it. On two cores ResNet-32 takes about a minute for two rounds.
"""

import argparse

from ltnorm import bench, race
from ltnorm.cli.bench import DEFAULT_NORMS, describe, race_table
from ltnorm.console import Output
from ltnorm.training.build import concrete
from ltnorm.training.device import resolve_device, resolve_precision
from ltnorm.validation import validate


def main() -> None:
    """Print one table a model and precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=128)
    asked = parser.parse_args()
    fastest, _ = resolve_precision("auto", resolve_device(asked.device))
    output = Output()
    for model in asked.model or ("resnet8", "resnet32"):
        for precision in (asked.precision,) if asked.precision else sorted({"fp32", fastest}):
            variants = [_variant(model, norm, precision, asked) for norm in DEFAULT_NORMS]
            batch = bench.Batch(asked.batch_size)
            result = race.measure(variants, batch, asked.rounds, output.note)
            conditions = describe(variants[0].recipe, batch, asked.rounds)
            output.product(race_table(result, conditions))


def _variant(model: str, norm: str, precision: str, asked: argparse.Namespace) -> bench.Variant:
    data = {
        "model": {"name": model},
        "norm": {"name": norm},
        "train": {"batch_size": asked.batch_size, "precision": precision},
        "device": asked.device,
    }
    return bench.Variant(norm, concrete(validate(data))[0], race.PEER)


if __name__ == "__main__":
    main()
