"""A whole training step, an evaluation and the memory of each norm and variant.

uv run python tests/benchmarks/bench_norms.py [--model resnet32] [--batch-size 128] [--rounds 15]
    [--precision fp32] [--device auto]

Against BN, and the dual path also against the same mixture without it. Without --precision:
fp32, and bf16 where the device multiplies it (elsewhere it is emulated, and slow).
"""

import argparse

from ltnorm import bench
from ltnorm.cli.bench import describe, table
from ltnorm.console import Output
from ltnorm.recipe import Recipe
from ltnorm.training.build import concrete
from ltnorm.training.device import resolve_device, resolve_precision
from ltnorm.validation import validate

ALONE = {"dual_path": False}
# label: norm, its options, and the label that it is measured against
VARIANTS = {
    "bn": ("bn", {}, "bn"),
    "gn": ("gn", {}, "bn"),
    "split": ("split", {}, "bn"),
    "compound image": ("compound", ALONE, "bn"),
    "compound position": ("compound", {"assign": "position"} | ALONE, "bn"),
    "dual": ("compound", {}, "compound image"),
    "dual position": ("compound", {"assign": "position"}, "compound position"),
    "dual full": ("compound", {"aux_gradient": "full"}, "compound image"),
}


def main() -> None:
    """Print one table a precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    output = Output()
    for precision in _precisions(arguments.precision, arguments.device, output):
        variants = [
            bench.Variant(label, _recipe(norm, options, precision, arguments), against)
            for label, (norm, options, against) in VARIANTS.items()
        ]
        batch = bench.Batch(arguments.batch_size)
        rows = bench.measure(variants, batch, arguments.rounds, output.note)
        conditions = describe(variants[0].recipe, batch, arguments.rounds)
        output.product(table(rows, conditions))


def _precisions(asked: str | None, device: str, output: Output) -> list[str]:
    if asked:
        return [asked]
    fast, reason = resolve_precision("auto", resolve_device(device))
    if fast == "bf16":
        return ["fp32", "bf16"]
    output.note(f"bf16 is left out: {reason}; --precision bf16 measures it all the same")
    return ["fp32"]


def _recipe(norm: str, options: dict, precision: str, arguments: argparse.Namespace) -> Recipe:
    data = {
        "model": {"name": arguments.model},
        "norm": {"name": norm, **options},
        "train": {"batch_size": arguments.batch_size, "precision": precision},
        "device": arguments.device,
    }
    return concrete(validate(data))[0]


if __name__ == "__main__":
    main()
