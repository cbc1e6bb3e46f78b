"""Time training steps of one process with several threads against processes side by side.

All processes are started once. They then take turns, round by round: one with a thread a core; as
many as there are cores with one thread each; and the same, each kept on its core. What is printed
is how many images they train on in a second together: the median over the rounds, and its ratio to
the first.

    python tests/benchmarks/bench_jobs.py [--model resnet8] [--norm bn] [--rounds 9] [--seconds 4]
"""

import argparse
import os
import statistics
import subprocess
import sys

from ltnorm.cores import divided, pin, usable

# Says how many images a second it trains on, for as many seconds as it is told to.
WORKER = """
import sys, time, torch
from ltnorm import bench
from ltnorm.training.build import concrete
from ltnorm.validation import validate
model, norm, precision = sys.argv[1:]
train = {"precision": precision}
recipe = {"model": {"name": model}, "norm": {"name": norm}, "train": train, "device": "cpu"}
recipe, _ = concrete(validate(recipe))
batch = bench.Batch()
subject = bench.Subject(bench.Variant(norm, recipe, norm), batch, torch.device("cpu"))
for _ in range(bench.WARM_UP):
    subject.train()
print(flush=True)
for line in sys.stdin:
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < float(line):
        subject.train()
        steps += 1
    print(steps * batch.images / (time.perf_counter() - began), flush=True)
"""


class Worker:
    """A process that trains when it is told to."""

    def __init__(self, arguments: list[str], threads: int, numbers: tuple[int, ...] = ()) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-c", WORKER, *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        if numbers:
            pin(self.process.pid, numbers)
        self.process.stdout.readline()

    def begin(self, seconds: float) -> None:
        """Train for a time."""
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()

    def rate(self) -> float:
        """The images that it has trained on in a second."""
        return float(self.process.stdout.readline())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--norm", default="bn")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    arguments, cores = [options.model, options.norm, options.precision], usable()
    count = len(cores)
    teams = {
        f"1 process, {count} threads": [Worker(arguments, count)],
        f"{count} processes, 1 thread each": [Worker(arguments, 1) for _ in cores],
        "the same, each kept on its core": [
            Worker(arguments, 1, share) for share in divided(cores, count)
        ],
    }
    rates: dict[str, list[float]] = {name: [] for name in teams}
    for _ in range(options.rounds):
        for name, team in teams.items():
            for worker in team:
                worker.begin(options.seconds)
            rates[name].append(sum(worker.rate() for worker in team))
    for team in teams.values():
        for worker in team:
            worker.process.stdin.close()
            worker.process.wait()
    print(f"{options.model} {options.norm} {options.precision}, n = {options.rounds} rounds")
    base = statistics.median(next(iter(rates.values())))
    for name, found in rates.items():
        median = statistics.median(found)
        print(f"{name:36}{median:8.0f} images/s{median / base:8.2f}x   best {max(found):.0f}")


if __name__ == "__main__":
    main()
