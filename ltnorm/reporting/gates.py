"""Gates: what a comparison must show, so that a team's CI can fail by it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ltnorm.errors import LtnormError, UsageError, did_you_mean
from ltnorm.reporting.compare import LOWER_IS_BETTER, Block, Row
from ltnorm.reporting.schema import METRICS
from ltnorm.reporting.wording import interval, points


class GateFailed(LtnormError):
    """The comparison does not show what it must."""

    exit_code = 4


@dataclass(frozen=True)
class Gate:
    """A bound on the 95 % interval over seeds of a row's difference to the baseline, in points.

    With `unless` the lower end must reach the bound; otherwise only an upper end below it fails.
    """

    metric: str
    bound: float
    unless: bool

    @classmethod
    def parse(cls, text: str, unless: bool) -> "Gate":
        """A gate from `tail=-1.0`.

        Raises:
            UsageError: anything else, or a metric of which less is better.
        """
        flag = "--fail-unless" if unless else "--fail-below"
        metric, _, number = text.partition("=")
        known = [name for name in METRICS if name not in LOWER_IS_BETTER]
        if metric not in known:
            raise UsageError(f"{flag} {text}: no such metric", did_you_mean(metric, known))
        try:
            bound = float(number)
        except ValueError:
            bound = math.nan
        if not math.isfinite(bound):
            raise UsageError(f"{flag} {text}: '{number}' is no number of points", f"{flag} tail=0")
        return cls(metric, bound, unless)

    def failure(self, row: Row) -> str | None:
        """Why a row does not pass; None if it does."""
        delta = row.deltas.get(self.metric)
        if delta is None:
            return f"{row.label} has no {self.metric} to be told from the baseline's"
        low, high = delta.estimate.low, delta.estimate.high
        if low is None or high is None:
            return f"{row.label} has no interval: a row and its baseline need 2 seeds each"
        shown = f"Δ {self.metric} of {row.label} is {interval((low, high), self.metric)}"
        if self.unless and low < self.bound:
            return f"{shown}, its lower end below {points(self.bound)}"
        if not self.unless and high < self.bound:
            return f"{shown}, all of it below {points(self.bound)}"
        return None


def check(gates: Sequence[Gate], blocks: Sequence[Block], norms: Iterable[str] = ()) -> None:
    """Raises GateFailed if a row does not pass; it names all that do not.

    Args:
        gates: each is asked of each row.
        blocks: of the comparison.
        norms: the norms whose rows are asked; none are all rows but the baseline.
    """
    failures = list(dict.fromkeys(_failures(gates, blocks, tuple(norms))))
    if failures:
        count = f" ({len(failures)} failures)" if len(failures) > 1 else ""
        raise GateFailed(
            f"gate failed{count}: {'; '.join(failures)}",
            "the rule is in the legend of the table; more seeds make intervals narrower",
        )


def _failures(
    gates: Sequence[Gate], blocks: Sequence[Block], norms: Sequence[str]
) -> Iterator[str]:
    asked = 0
    for block in blocks:
        rows = [row for row in block.others if not norms or row.first.norm in norms]
        if rows and block.reference is None:
            yield f"there is no baseline in {block.title}"
            continue
        for row in rows:
            asked += 1
            for gate in gates:
                if why := gate.failure(row):
                    yield f"{why} ({block.title})"
    found = {row.first.norm for block in blocks for row in block.others}
    for norm in norms:
        if norm not in found:
            yield f"there is no row of {norm} besides the baseline"
    if not asked and not norms:
        yield "there is no row besides the baseline"
