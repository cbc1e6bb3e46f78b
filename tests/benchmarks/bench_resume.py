"""What it costs to keep the state of a training, against torch.save of the same alone.

    uv run python tests/benchmarks/bench_resume.py [--rounds N]

Keeping hashes the state, waits until it is on the disk, and removes the one before the last.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from ltnorm import resolve
from ltnorm.console import Output
from ltnorm.training import optim
from ltnorm.training.build import build_model, build_objective
from ltnorm.training.position import Position
from ltnorm.training.resume import KEEPING, FileKeeper

COUNTS = [50] * 100


def main(rounds: int) -> None:
    """Print a line for each model: medians over the rounds, which take turns."""
    print("model      MB  torch.save ms  keep ms  ratio  restore ms")
    for name in ("resnet8", "resnet32", "resnet50"):
        flags = {"model.name": name, "train.precision": "fp32"}
        [recipe] = resolve.resolve({}, resolve.Overrides(flags))
        model = build_model(recipe, COUNTS, 32)
        objective = build_objective(recipe, model, COUNTS)
        optimizer = optim.build(recipe.train, objective.parameters())
        for parameter in optimizer.parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            times: dict[str, list[float]] = {"save": [], "keep": [], "restore": []}
            for i in range(1, rounds + 1):
                state = objective.state_dict(), optimizer.state_dict()
                start = time.perf_counter()
                torch.save(state, place / "peer.pt")
                times["save"].append(time.perf_counter() - start)
                keeper = FileKeeper(place, {"round": 0}, ("", ""), KEEPING, Output(quiet=True))
                start = time.perf_counter()
                with keeper.training(objective, optimizer, None):
                    if i > 1:
                        times["restore"].append(time.perf_counter() - start)
                    start = time.perf_counter()
                    keeper.keep(Position(losses=[torch.zeros(())] * i))
                    times["keep"].append(time.perf_counter() - start)
            size = (place / "peer.pt").stat().st_size / 1e6
        save, keep, restore = (1000 * statistics.median(times[key]) for key in times)
        print(f"{name:9} {size:5.1f} {save:12.1f} {keep:9.1f} {keep / save:6.2f} {restore:10.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    main(parser.parse_args().rounds)
