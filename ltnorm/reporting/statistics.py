"""Differences between two settings over their seeds: estimates, intervals and tests.

Values are one number a seed, in points. Everything here takes the trained networks as a sample of
the seeds that could have been; what test images add is in `bootstrap`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ltnorm.reporting import student

CONFIDENCE = 0.95
POWER = 0.8
MIN_SEEDS = 3  # below that an interval says next to nothing, and a p value is not marked
MOST_SEEDS = 10_000

# Values that differ by less, relative to the largest, are equal: accuracies are means of a few
# thousand numbers, and a spread that is only their rounding would make any difference certain.
ROUNDING = 1e-9
# A difference of that many standard errors is found with a single degree of freedom (98 %).
CERTAIN = 30.0
# The quantiles of the normal distribution at (1 + CONFIDENCE) / 2 and at POWER, added.
NORMAL = 1.960 + 0.842


@dataclass(frozen=True)
class Estimate:
    """A difference between two means, and what is known of it.

    Attributes:
        delta: mean of the values minus mean of the reference.
        low, high: the `CONFIDENCE` interval; None where there is none (one seed on a
            side, or a difference other than 0 without any spread).
        p: two-sided and unadjusted; None without an interval.
        sd: of the paired differences, or sqrt(s_a^2 + s_b^2) of unpaired sides: with n seeds (on
            each side) the standard error of delta is sd / sqrt(n). None for one seed on a side.
        df: degrees of freedom of the t distribution. None without an interval.
        df_per_seed: with n seeds (on each side) df is df_per_seed (n - 1): 1 if paired, 1 to 2
            if not. None without an interval.
    """

    delta: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    sd: float | None = None
    df: float | None = None
    df_per_seed: float | None = None


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value."""
    return math.fsum(values) / len(values)


def sample_std(values: Sequence[float]) -> float | None:
    """sqrt(sum_i (x_i - mean)^2 / (n - 1)); None for n = 1, 0 for values equal up to rounding."""
    return _std(values, _size(values)) if len(values) > 1 else None


def paired(values: Sequence[float], reference: Sequence[float]) -> Estimate:
    """The difference of means by the paired t test (Student 1908).

    With d_i = x_i - y_i: delta = mean(d), standard error s_d / sqrt(n), df = n - 1.

    Args:
        values: [n], one a seed.
        reference: [n], of the same seeds in the same order.

    Raises:
        ValueError: no value, or not as many on each side.
    """
    differences = [x - y for x, y in zip(values, reference, strict=True)]
    n, delta = len(differences), mean(differences) if differences else math.nan
    if n < 2:
        _refuse_empty(values, reference)
        return Estimate(delta)
    size = _size(values, reference)
    sd = _std(differences, size)
    return _estimate(delta, sd / math.sqrt(n), size, sd=sd, df=n - 1.0, df_per_seed=1.0)


def welch(values: Sequence[float], reference: Sequence[float]) -> Estimate:
    """The difference of means of independent samples by Welch's t test (Welch 1947).

    With e_a = s_a^2 / n_a and e_b = s_b^2 / n_b: standard error sqrt(e_a + e_b),
    df = (e_a + e_b)^2 / (e_a^2 / (n_a - 1) + e_b^2 / (n_b - 1)).

    Args:
        values: [n_a], one a seed.
        reference: [n_b].

    Raises:
        ValueError: a side has no value.
    """
    _refuse_empty(values, reference)
    delta, degrees = mean(values) - mean(reference), (len(values) - 1, len(reference) - 1)
    if min(degrees) < 1:
        return Estimate(delta)
    size = _size(values, reference)
    spread, base_spread = _std(values, size), _std(reference, size)
    error, base_error = spread / math.sqrt(len(values)), base_spread / math.sqrt(len(reference))
    return _estimate(
        delta,
        math.hypot(error, base_error),
        size,
        sd=math.hypot(spread, base_spread),
        df=_satterthwaite((error, base_error), degrees),
        df_per_seed=_satterthwaite((spread, base_spread), (1, 1)),
    )


def correlation(values: Sequence[float], reference: Sequence[float]) -> float | None:
    """Pearson's r between two settings over the same seeds, in the same order.

    None for n < 3, where it says nothing, and where a side has no spread.
    """
    if len(values) < MIN_SEEDS:
        return None
    size, base_size = _size(values), _size(reference)
    spread, base_spread = _std(values, size), _std(reference, base_size)
    if not spread or not base_spread:
        return None
    centre, base_centre = mean(values), mean(reference)
    # Each side is scaled first: a product of tiny spreads would be lost.
    products = [
        (x - centre) / spread * ((y - base_centre) / base_spread)
        for x, y in zip(values, reference, strict=True)
    ]
    return min(1.0, max(-1.0, math.fsum(products) / (len(products) - 1)))


def holm(p: Sequence[float]) -> list[float]:
    """P values adjusted for testing a family of m hypotheses, in the order given (Holm 1979).

    With p_(1) <= ... <= p_(m): adjusted_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)). Whatever the
    dependence between the tests, rejecting those below 5 % rejects any true one in at most 5 % of
    families.
    """
    adjusted = [1.0] * len(p)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def seeds_needed(sd: float, effect: float = 1.0, df_per_seed: float = 1.0) -> int | None:
    """The seeds (on each side) with which a true difference of `effect` points would be found.

    The smallest n >= 2 for which the two-sided t test at level 1 - `CONFIDENCE` finds it, with its
    sign, with probability `POWER`; None beyond `MOST_SEEDS`. The test's statistic follows the
    noncentral t distribution with df_per_seed (n - 1) degrees of freedom and noncentrality
    effect sqrt(n) / sd. It takes sd for the true one: from a few seeds the answer is an order of
    magnitude, not a promise.

    Args:
        sd: as in `Estimate`.
        effect: in points, above 0.
        df_per_seed: as in `Estimate`.
    """

    def found(n: int) -> bool:
        df = df_per_seed * (n - 1)
        shift = min(CERTAIN, effect * math.sqrt(n) / sd) if sd else CERTAIN
        return student.power(df, shift, _critical(df)) >= POWER

    # By the normal distribution; what is true is near.
    n = max(2, min(MOST_SEEDS, math.ceil(min(MOST_SEEDS, NORMAL * sd / effect) ** 2)))
    while n > 2 and found(n - 1):
        n -= 1
    while n <= MOST_SEEDS and not found(n):
        n += 1
    return n if n <= MOST_SEEDS else None


def _estimate(
    delta: float, error: float, size: float, *, sd: float, df: float, df_per_seed: float
) -> Estimate:
    """The estimate from the standard error `error` of delta; `size` is that of the values."""
    if error == 0:
        if abs(delta) <= ROUNDING * size:
            return Estimate(0.0, 0.0, 0.0, 1.0, 0.0, df, df_per_seed)
        # A few equal differences would make any difference certain: there is nothing to judge by.
        return Estimate(delta, sd=0.0, df=df, df_per_seed=df_per_seed)
    p = 2 * student.cdf(df, -abs(delta) / error)
    margin = _critical(df) * error
    return Estimate(delta, delta - margin, delta + margin, p, sd, df, df_per_seed)


def _critical(df: float) -> float:
    return student.quantile(df, (1 + CONFIDENCE) / 2)


def _satterthwaite(errors: tuple[float, float], degrees: tuple[int, int]) -> float:
    """Welch's degrees of freedom; those of a pooled variance where both errors are 0."""
    largest = max(errors)
    if largest == 0:
        return float(sum(degrees))
    # Relative to the larger one, so that squares of squares do not underflow.
    squares = [(error / largest) ** 2 for error in errors]
    return sum(squares) ** 2 / sum(e**2 / d for e, d in zip(squares, degrees, strict=True))


def _size(*samples: Sequence[float]) -> float:
    return max(abs(x) for sample in samples for x in sample)


def _std(values: Sequence[float], size: float) -> float:
    """The sample deviation of values computed from numbers of that size; 0 if it is rounding."""
    if max(values) - min(values) <= ROUNDING * size:
        return 0.0
    centre = mean(values)
    return math.hypot(*(x - centre for x in values)) / math.sqrt(len(values) - 1)


def _refuse_empty(values: Sequence[float], reference: Sequence[float]) -> None:
    if not values or not reference:
        raise ValueError("a difference needs at least one value on each side")
