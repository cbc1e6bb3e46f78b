"""Time how long commands take to start, and `ltnorm train` to its first step.

Commands take turns, and each is a process of its own; the median and the fastest are printed. What
Python and torch take by themselves is the floor. Files of bytecode must be written, as they are
unless PYTHONDONTWRITEBYTECODE is set: a first round, which writes them, is not counted.

    python tests/benchmarks/bench_start.py [--rounds 5] [--runs 40 | --results DIR]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from made import result, write_run

NORMS = ("bn", "gn", "split", "compound")
SEEDS = 5
IMAGES = 10  # of a class, for predictions
# Of a training of one step: what is printed after it.
FIRST_STEP = "epoch 1/1"


def make(out: Path, runs: int) -> None:
    """A tree of made-up runs."""
    for i in range(runs):
        flags = {"dataset.ratio": 10.0 * (1 + i // (len(NORMS) * SEEDS))}
        norm, seed = NORMS[i // SEEDS % len(NORMS)], i % SEEDS
        tail = 10 + (7 * seed + len(norm)) % 11 / 3
        write_run(out, result(norm, seed=seed, tail=tail, flags=flags), IMAGES, **flags)


def seconds(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """From the start of a command to its end, or to the end of its first step of training."""
    began, stepped = time.perf_counter(), None
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        for line in process.stderr:
            if FIRST_STEP in line:
                stepped = time.perf_counter()
    if process.returncode:
        raise RuntimeError(f"{command} ended with exit code {process.returncode}")
    return (stepped or time.perf_counter()) - began


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=40, help="that `compare` reads")
    parser.add_argument("--results", type=Path, help="a tree of runs to compare instead")
    options = parser.parse_args()
    python, ltnorm = sys.executable, [sys.executable, "-m", "ltnorm"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    root = str(Path(__file__).parent.parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.getenv("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        results = options.results and options.results.absolute()
        if not results:
            results = Path(folder) / "made"
            make(results, options.runs)
        commands = {
            "python -c pass": [python, "-c", "pass"],
            "ltnorm --help": [*ltnorm, "--help"],
            "ltnorm list norms": [*ltnorm, "list", "norms"],
            "ltnorm compare": [*ltnorm, "compare", str(results)],
            "python -c 'import torch'": [python, "-c", "import torch"],
            "ltnorm train, to the first step": [
                *(*ltnorm, "train", "--device", "cpu", "--steps", "1", "--force")
            ],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(options.rounds + 1):
            for name, command in commands.items():
                took = seconds(command, Path(folder), environment)
                if turn:
                    times[name].append(took)
    print(f"{'command':34}{'median s':>10}{'fastest s':>11}   n = {options.rounds}")
    for name, took in times.items():
        print(f"{name:34}{statistics.median(took):10.2f}{min(took):11.2f}")


if __name__ == "__main__":
    main()
