"""Student's t distribution, and the power of its test.

scipy.special has all of this too, and takes as long to import as a comparison to make.
"""

import math
from functools import cache

# What a continued fraction is right to.
TOLERANCE = 1e-15
# Widths of a normal distribution beyond which nothing is left, and steps within one.
REACH, STEPS = 8.5, 4


def cdf(df: float, t: float) -> float:
    """P(T <= t) with `df` degrees of freedom (Student 1908).

    For t <= 0 it is I_x(df/2, 1/2) / 2 with x = df / (df + t^2), I the regularized incomplete
    beta function; so that the smallest p values keep their digits.
    """
    if t > 0:
        return 1.0 - cdf(df, -t)
    square = t * t
    return _beta(df / 2, 0.5, df / (df + square), square / (df + square)) / 2


@cache
def quantile(df: float, p: float) -> float:
    """The t with P(T <= t) = p, for p in [1/2, 1), by bisection.

    Raises:
        ValueError: another p.
    """
    if not 0.5 <= p < 1:
        raise ValueError(f"p must be in [0.5, 1), got {p}")
    low, high, tail = 0.0, 1.0, 1.0 - p
    while cdf(df, -high) > tail:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        above = cdf(df, -middle) > tail
        low, high = (middle, high) if above else (low, middle)
    return high


def power(df: float, shift: float, critical: float) -> float:
    """P(T > critical) of the noncentral t distribution: of (Z + shift) / S, Z normal.

    S^2 is chi squared over df, its degrees of freedom. The integral of P(Z > critical s - shift)
    over the density of log S is a sum of equal steps, whose error falls off exponentially.
    """
    # The density of log S is as wide as this, and falls off as S^df to the left.
    width = 1 / math.sqrt(2 * df)
    low, high = -(REACH * width + REACH**2 / 2 / df), REACH * width
    finest = min(width, 1 / max(1.0, abs(shift)))
    count = math.ceil((high - low) / finest * STEPS)
    step = (high - low) / count
    constant = math.log(2 * step) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
    total = 0.0
    for i in range(count + 1):
        x = low + i * step
        s = math.exp(x)
        weight = math.exp(constant + df * (x - s * s / 2))
        total += weight * math.erfc((critical * s - shift) / math.sqrt(2)) / 2
    return total


def _beta(a: float, b: float, x: float, y: float) -> float:
    """I_x(a, b), y = 1 - x, by its continued fraction (Lentz's method) on the side it is short."""
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _beta(b, a, y, x)
    if x == 0:
        return 0.0
    log = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(log + a * math.log(x) + b * math.log(y)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for numerator in (even, odd):
            d, c = 1 / (1 + numerator * d), 1 + numerator / c
            fraction *= c * d
        if abs(c * d - 1) < TOLERANCE:
            break
    return front * fraction
