"""Training curves: what the runs of a setting wrote in each epoch, averaged over seeds."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ltnorm.reporting import statistics
from ltnorm.reporting.compare import Row
from ltnorm.reporting.schema import EPOCHS

QUANTITIES = ("loss", "accuracy")


@dataclass(frozen=True)
class Curve:
    """A quantity over the epochs that all seeds have recorded it in.

    Attributes:
        epochs: [E], ascending.
        mean: over seeds, [E].
        std: sample standard deviation over seeds, [E]; None for one seed.
    """

    epochs: list[int]
    mean: list[float]
    std: list[float] | None

    @property
    def spreads(self) -> list[tuple[float, float | None]]:
        """Mean and deviation of each epoch."""
        return list(zip(self.mean, self.std or [None] * len(self.mean), strict=True))


def curves(row: Row) -> dict[str, Curve]:
    """The curves of a row, by quantity; those of which nothing is recorded are not there.

    Runs without a readable epochs.csv are left out. Runs of one budget in seconds may differ in
    length: a mean over fewer seeds than before would jump, so that the curve ends with the
    shortest.
    """
    tables = [table for run in row.runs if (table := _read(run.directory / EPOCHS))]
    found = {q: _average([table[q] for table in tables if table[q]]) for q in QUANTITIES}
    return {quantity: curve for quantity, curve in found.items() if curve}


def _average(seeds: Sequence[dict[int, float]]) -> Curve | None:
    common = sorted(set.intersection(*map(set, seeds))) if seeds else []
    if not common:
        return None
    values = [[seed[epoch] for seed in seeds] for epoch in common]
    std = [statistics.sample_std(v) or 0.0 for v in values] if len(seeds) > 1 else None
    return Curve(common, [statistics.mean(v) for v in values], std)


def _read(path: Path) -> dict[str, dict[int, float]] | None:
    """Each quantity by epoch; None where the file is missing or no such table."""
    found: dict[str, dict[int, float]] = {quantity: {} for quantity in QUANTITIES}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for cells in csv.DictReader(file):
                for quantity in QUANTITIES:
                    value = float(cells.get(quantity) or math.nan)
                    if math.isfinite(value):
                        found[quantity][int(cells["epoch"])] = value
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return None
    return found
