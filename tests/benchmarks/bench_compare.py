"""Time `ltnorm compare` on 2,000 finished runs, against a plain script that reads the same rows.

The peer is Python's csv reader over the same result.csv files, without any arithmetic. Commands
take turns, and each is a process of its own; the median is printed.

    python tests/benchmarks/bench_compare.py [--runs 2000] [--images 1000] [--rounds 5]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from made import result, write_run

NORMS = ("bn", "gn", "ln", "split", "compound")
LOSSES = ("ce", "ldam", "focal", "balanced-softmax")
SEEDS = 5
PLAIN = """
import csv, sys
from pathlib import Path
rows = [next(csv.DictReader(p.open(newline=""))) for p in Path(sys.argv[1]).rglob("result.csv")]
print(len(rows))
"""


def make(out: Path, runs: int, images: int) -> int:
    """A tree of made-up runs: norms x losses x seeds at as many ratios as it takes."""
    made = 0
    ratio = 10
    while made < runs:
        for loss in LOSSES:
            for norm in NORMS:
                for seed in range(SEEDS):
                    flags = {"dataset.ratio": float(ratio), "loss.name": loss}
                    tail = 10 + (7 * seed + len(norm)) % 11 / 3
                    write_run(out, result(norm, seed=seed, tail=tail, flags=flags), images, **flags)
                    made += 1
        ratio += 10
    return made


def main() -> None:
    """Print the median time of each command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--images", type=int, default=1000, help="test images a class")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results"
        made = make(out, options.runs, options.images)
        compare = [sys.executable, "-m", "ltnorm", "compare", str(out), "--quiet"]
        commands = {
            "plain csv": [sys.executable, "-c", PLAIN, str(out)],
            "compare --no-images": [*compare, "--no-images"],
            "compare": compare,
            "compare --where": [*compare, "--where", "ratio==10 and norm in ('bn', 'compound')"],
            "compare --help": [*compare[:4], "--help"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                seconds[name].append(time.perf_counter() - start)
        peer = statistics.median(seconds["plain csv"])
        print(f"{made} runs, {10 * options.images:,} test images each, {options.rounds} rounds")
        for name, times in seconds.items():
            median = statistics.median(times)
            print(f"{name:<20}  {median:6.2f} s  {median / peer:5.2f}x")


if __name__ == "__main__":
    main()
