"""Gates: what a comparison must show, so that a team's CI can fail by it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ltnorm.errors import LtnormError, UsageError, did_you_mean
from ltnorm.registry import NORMS
from ltnorm.reporting.compare import LOWER_IS_BETTER, Block, Row
from ltnorm.reporting.schema import METRICS


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
        if metric in LOWER_IS_BETTER:
            raise UsageError(
                f"{flag} {text}: of {metric} less is better, which gates do not have",
                f"choose from {', '.join(known)}",
            )
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
            few = delta.estimate.sd is None
            why = "a row and its baseline need 2 seeds each" if few else "its seeds have no spread"
            return f"{row.label} has no interval: {why}"
        shown = f"Δ {self.metric} of {row.label} is [{low:+.2f}, {high:+.2f}]"
        if self.unless and low < self.bound:
            return f"{shown}, its lower end below {self.bound:+g}"
        if not self.unless and high < self.bound:
            return f"{shown}, all of it below {self.bound:+g}"
        return None


def check(gates: Sequence[Gate], blocks: Sequence[Block], norms: Iterable[str] = ()) -> None:
    """Check that every row passes every gate.

    Args:
        gates: each is asked of each row.
        blocks: of the comparison.
        norms: the norms whose rows are asked; none are all rows but the baseline.

    Raises:
        UsageError: a norm that does not exist.
        GateFailed: a row does not pass, or cannot be judged; it names all of them.
    """
    for norm in norms:
        if norm not in NORMS:
            raise UsageError(f"--norm {norm}: no such norm", did_you_mean(norm, NORMS))
    failures = list(dict.fromkeys(_failures(gates, blocks, tuple(norms))))
    if failures:
        count = f" ({len(failures)} failures)" if len(failures) > 1 else ""
        raise GateFailed(
            f"gate failed{count}: {'; '.join(failures)}",
            "what cannot be judged fails, too; more seeds make intervals narrower",
        )


def _failures(
    gates: Sequence[Gate], blocks: Sequence[Block], norms: Sequence[str]
) -> Iterator[str]:
    found: set[str] = set()
    for block in blocks:
        rows = [row for row in block.others if not norms or row.first.norm in norms]
        found |= {row.first.norm for row in rows}
        if rows and block.reference is None:
            yield f"there is no baseline in {block.title}"
        elif rows and block.selection:
            yield f"the rows of {block.title} cannot be judged: {block.selection}"
        else:
            for row in rows:
                for gate in gates:
                    if why := gate.failure(row):
                        yield f"{why} ({block.title})"
    for norm in norms:
        if norm not in found:
            yield f"there is no row of {norm} besides the baseline"
    if not found and not norms:
        yield "there is no row besides the baseline"
