"""Intervals over test images for the rows of a comparison: see `ltnorm.reporting.bootstrap`."""

from collections.abc import Sequence
from pathlib import Path

from ltnorm.errors import LtnormError
from ltnorm.reporting import bootstrap
from ltnorm.reporting.bootstrap import Contrast, Interval, Predictions
from ltnorm.reporting.schema import PER_CLASS, PREDICTIONS, Run, read_per_class

# Metrics that are sums over classes of weighted accuracies, as the bootstrap needs.
METRICS = ("all", "head", "medium", "tail")
Runs = Sequence[Run]
AGAIN = "`ltnorm train --force` makes the run anew"


def intervals(
    pairs: Sequence[tuple[Runs, Runs]], metrics: Sequence[str]
) -> tuple[list[dict[str, Interval]], list[str | None]]:
    """Intervals of the differences between settings, by metric, and what is damaged, one a pair.

    Without predictions a pair has none, and nothing is damaged.

    Args:
        pairs: the runs of a setting, and those of its reference.
        metrics: of `METRICS`.
    """
    files = _Files()
    problems: list[str | None] = [None] * len(pairs)
    contrasts: list[Contrast] = []
    owners: list[tuple[int, str]] = []
    for i, (ours, theirs) in enumerate(pairs):
        try:
            found = files.contrasts(ours, theirs, metrics)
        except LtnormError as error:
            problems[i] = error.message
            continue
        contrasts += found.values()
        owners += [(i, metric) for metric in found]
    by_pair: list[dict[str, Interval]] = [{} for _ in pairs]
    for (i, metric), interval in zip(owners, bootstrap.intervals(contrasts), strict=True):
        if interval:
            by_pair[i][metric] = interval
        else:
            problems[i] = f"{pairs[i][0][0].directory} was tested on other images"
    return by_pair, problems


class _Files:
    """Predictions and classes of runs, each read once."""

    def __init__(self) -> None:
        self.read: dict[Path, Predictions] = {}
        self.groups: dict[Path, list[str]] = {}

    def contrasts(self, ours: Runs, theirs: Runs, metrics: Sequence[str]) -> dict[str, Contrast]:
        """What is to be computed for a pair; nothing without any predictions.

        Raises:
            LtnormError: a file is damaged, or some runs lack what others have.
        """
        files = [run.directory / PREDICTIONS for run in (*ours, *theirs)]
        missing = [file for file in files if not file.is_file()]
        if len(missing) == len(files):
            return {}
        if missing:
            raise LtnormError(f"there is no {missing[0]}", AGAIN)
        sides = [[self._predictions(run.directory) for run in side] for side in (ours, theirs)]
        labels = sides[0][0].labels
        for side in (ours, theirs):
            directory = side[0].directory
            if labels.max(initial=-1) >= len(self._groups(directory)):
                raise LtnormError(
                    f"{directory / PER_CLASS} lacks classes that {PREDICTIONS} has", AGAIN
                )
        found = {}
        for metric in metrics:
            weights = [
                bootstrap.class_weights(metric, self._groups(side[0].directory), labels)
                for side in (ours, theirs)
            ]
            if weights[0] is not None and weights[1] is not None:
                found[metric] = Contrast(*sides, *weights)
        return found

    def _predictions(self, directory: Path) -> Predictions:
        if directory not in self.read:
            self.read[directory] = bootstrap.read(directory / PREDICTIONS)
        return self.read[directory]

    def _groups(self, directory: Path) -> list[str]:
        if directory not in self.groups:
            rows = read_per_class(directory / PER_CLASS)
            self.groups[directory] = [one.group for one in rows]
        return self.groups[directory]
