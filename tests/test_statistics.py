import json
import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ltnorm.reporting import statistics, student
from ltnorm.reporting.statistics import (
    correlation,
    holm,
    mean,
    paired,
    sample_std,
    seeds_needed,
    welch,
)

REPEATS = 6_000
# Three standard errors of a share of 5 % (or 95 %) counted over the repeats.
ERROR = 3 * math.sqrt(0.05 * 0.95 / REPEATS)

accuracies = st.integers(0, 10_000).map(lambda x: x / 100)  # in steps of one of 10,000 images


def samples(least=2, most=12):
    return st.lists(accuracies, min_size=least, max_size=most)


def pairs(least=2, most=12):
    """Two settings over the same seeds."""
    return st.lists(st.tuples(accuracies, accuracies), min_size=least, max_size=most).map(
        lambda both: tuple(map(list, zip(*both, strict=True)))
    )


def close(value):
    return pytest.approx(value, rel=1e-8, abs=1e-8)


def as_scipy(test):
    interval = test.confidence_interval(0.95)
    return [close(float(x)) for x in (interval.low, interval.high, test.pvalue, test.df)]


@pytest.mark.filterwarnings("ignore:Precision loss")
@settings(max_examples=50)
@given(pairs())
def test_the_paired_test_agrees_with_scipy(both):
    values, reference = both
    found = paired(values, reference)
    assert found.delta == close(np.mean(values) - np.mean(reference))
    assert found.df_per_seed == 1
    if found.sd == 0:
        assert np.ptp(np.subtract(values, reference)) < 1e-9
        return
    assert found.sd == close(np.std(np.subtract(values, reference), ddof=1))
    expected = as_scipy(scipy.stats.ttest_rel(values, reference))
    assert [found.low, found.high, found.p, found.df] == expected


@pytest.mark.filterwarnings("ignore:Precision loss")
@settings(max_examples=50)
@given(samples(), samples())
def test_welchs_test_agrees_with_scipy(values, reference):
    found = welch(values, reference)
    assert found.delta == close(np.mean(values) - np.mean(reference))
    if found.sd == 0:
        assert np.ptp(values) < 1e-9
        assert np.ptp(reference) < 1e-9
        return
    assert found.sd == close(math.hypot(np.std(values, ddof=1), np.std(reference, ddof=1)))
    expected = as_scipy(scipy.stats.ttest_ind(values, reference, equal_var=False))
    assert [found.low, found.high, found.p, found.df] == expected


@settings(max_examples=50)
@given(pairs())
def test_welchs_deviation_and_df_are_those_of_n_seeds_a_side(both):
    found, n = welch(*both), len(both[0])
    assert found.df == close(found.df_per_seed * (n - 1))
    assert 1 <= found.df_per_seed <= 2
    assume(found.low is not None)
    error = (found.high - found.low) / 2 / scipy.stats.t.ppf(0.975, found.df)
    assert error == close(found.sd / math.sqrt(n))


@given(pairs())
def test_swapping_the_sides_turns_the_sign_and_nothing_else(both):
    values, reference = both
    for test in (paired, welch):
        one, other = test(values, reference), test(reference, values)
        assert (one.delta, one.p, one.sd, one.df) == (-other.delta, other.p, other.sd, other.df)
        if one.low is None:
            assert one.high is other.low is other.high is None
        else:
            assert (one.low, one.high) == (-other.high, -other.low)


@given(pairs())
def test_an_interval_excludes_0_exactly_where_p_is_below_5_percent(both):
    for test in (paired, welch):
        found = test(*both)
        if found.p is not None and abs(found.p - 0.05) > 1e-9:
            assert (found.low > 0 or found.high < 0) == (found.p < 0.05)


@pytest.mark.parametrize("test", [paired, welch])
def test_one_seed_has_a_difference_and_no_interval(test):
    found = test([42.5], [40.0])
    assert found == statistics.Estimate(2.5)
    assert found.low is found.high is found.p is found.sd is found.df is None


def test_one_seed_on_one_side_is_no_interval_either():
    assert welch([1.0, 2.0, 3.0], [1.0]) == statistics.Estimate(1.0)


@pytest.mark.parametrize("test", [paired, welch])
def test_no_seed_is_an_error(test):
    with pytest.raises(ValueError, match="at least one value"):
        test([], [])


def test_pairs_need_as_many_values_on_each_side():
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])


@pytest.mark.parametrize("test", [paired, welch])
def test_without_spread_there_is_nothing_to_judge_a_difference_by(test):
    found = test([42.5] * 3, [40.0] * 3)
    assert (found.delta, found.low, found.high, found.p, found.sd) == (2.5, None, None, None, 0)
    found = test([40.0] * 3, [40.0] * 3)
    assert (found.delta, found.low, found.high, found.p) == (0, 0, 0, 1)


@given(samples(), st.sampled_from([0.0, 0.1, -1.3, 7.77]))
def test_rounding_is_not_taken_for_spread(values, shift):
    shifted = [(x + shift + 0.3) - 0.3 for x in values]
    found = paired(shifted, values)
    assert found.sd == 0
    assert found.delta == close(shift)
    assert shift or (found.delta, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert not shift or found.low is found.high is found.p is None


@given(samples(), st.floats(0.01, 100))
def test_rounding_in_a_sum_of_values_is_not_taken_for_spread(values, scale):
    # The same mean, added up in different orders.
    ours = [sum(x * scale for x in values) / len(values)] * 2
    theirs = [sum(x * scale for x in reversed(values)) / len(values)] * 2
    for test in (paired, welch):
        found = test([ours[0], theirs[0]], [theirs[0], ours[0]])
        assert (found.delta, found.p, found.sd) == (0, 1, 0)


def test_a_difference_of_one_image_is_no_rounding():
    found = paired([40.0, 40.0, 40.0 + 100 / 1_000_000], [40.0, 40.0, 40.0])
    assert found.sd > 0
    assert found.p == pytest.approx(scipy.stats.ttest_1samp([0, 0, 1], 0).pvalue)


def test_only_one_side_with_a_spread_has_its_degrees_of_freedom():
    found = welch([1.0, 2.0, 4.0], [3.0] * 7)
    assert found.df == 2
    assert found.df_per_seed == 1


@given(samples(least=1))
def test_mean_and_deviation_are_those_of_numpy(values):
    assert mean(values) == close(np.mean(values))
    if len(values) == 1:
        assert sample_std(values) is None
    else:
        assert sample_std(values) == close(np.std(values, ddof=1))


def test_the_deviation_of_equal_values_is_0():
    assert sample_std([0.1 + 0.2, 0.3, 0.3]) == 0


@settings(max_examples=50)
@given(pairs(least=3))
def test_the_correlation_agrees_with_numpy(both):
    values, reference = both
    found = correlation(values, reference)
    if found is None:
        assert min(np.ptp(values), np.ptp(reference)) < 1e-9
    else:
        assert -1 <= found <= 1
        assert found == close(np.corrcoef(values, reference)[0, 1])


def test_no_correlation_without_spread_or_with_two_seeds():
    assert correlation([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) is None
    assert correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert correlation([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1)
    assert correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)


def test_holm_of_an_example_worked_by_hand():
    # In order 0.01, 0.02, 0.03, 0.04: 4 x 0.01, 3 x 0.02, then 2 x 0.03 and 0.04, not below 0.06.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []
    assert holm([0.04]) == [0.04]


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0.001, 0.999))
def test_holm_rejects_what_the_procedure_rejects(p, level):
    # The procedure itself: reject the smallest while it is at most level / hypotheses left.
    left = sorted(range(len(p)), key=lambda i: p[i])
    rejected = set()
    while left and p[left[0]] * len(left) <= level:
        rejected.add(left.pop(0))
    assert {i for i, adjusted in enumerate(holm(p)) if adjusted <= level} == rejected


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_never_helps(p):
    adjusted = holm(p)
    assert all(a >= b for a, b in zip(adjusted, p, strict=True))
    assert max(adjusted) <= 1
    in_order = [adjusted[i] for i in sorted(range(len(p)), key=lambda i: p[i])]
    assert in_order == sorted(in_order)


@pytest.mark.parametrize(
    ("sd", "effect", "df_per_seed", "seeds"),
    [
        # The 34 pairs and 2 x 64 of Cohen's medium effect of 0.5, in any table of power.
        (1, 0.5, 1, 34),
        (math.sqrt(2), 0.5, 2, 64),
        (0, 1, 1, 2),
        (1e-320, 1, 1, 2),
        (1e6, 1, 1, None),
    ],
)
def test_seeds_needed_agrees_with_tables(sd, effect, df_per_seed, seeds):
    assert seeds_needed(sd, effect, df_per_seed) == seeds


@given(st.floats(0.01, 60), st.floats(0.1, 5), st.floats(1, 2))
def test_seeds_needed_is_the_first_number_with_the_power(sd, effect, df_per_seed):
    def power(n):
        df, shift = df_per_seed * (n - 1), effect * math.sqrt(n) / sd
        # Below 0 lies next to nothing, and there scipy's noncentral t is not to be relied on.
        return scipy.stats.nct.sf(scipy.stats.t.ppf(0.975, df), df, min(shift, 100))

    n = seeds_needed(sd, effect, df_per_seed)
    if n is None:
        assert power(10_000) < 0.8
    else:
        assert power(n) >= 0.8 - 1e-6
        assert n == 2 or power(n - 1) < 0.8 + 1e-6


@given(st.floats(0.01, 100), st.floats(1, 3))
def test_more_spread_needs_no_fewer_seeds_and_more_effect_no_more(sd, factor):
    needed = seeds_needed(sd) or math.inf
    assert (seeds_needed(sd * factor) or math.inf) >= needed
    assert (seeds_needed(sd, factor) or math.inf) <= needed


def draws(n, rows, *, repeats=REPEATS, correlated=0.0):
    """Lists [repeats, rows, n]: seeds of settings with mean 0 and deviation 1."""
    generator = np.random.default_rng([n, rows, int(100 * correlated)])
    own = generator.standard_normal((repeats, rows, n))
    common = generator.standard_normal((repeats, 1, n))
    return (math.sqrt(1 - correlated) * own + math.sqrt(correlated) * common).tolist()


@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize(
    ("test", "correlated"),
    [(paired, 0.0), (paired, 0.7), (welch, 0.0)],
    ids=["paired", "correlated", "welch"],
)
def test_an_interval_covers_the_true_difference_in_95_percent(test, n, correlated):
    estimates = [test(*both) for both in draws(n, 2, correlated=correlated)]
    coverage = sum(e.low <= 0 <= e.high for e in estimates) / REPEATS
    assert 0.925 <= coverage <= 0.975
    if test is paired:  # exact, Welch's is not
        assert abs(coverage - 0.95) < ERROR
    # A test of the bounds as well: with the normal's 1.96 they would not hold for few seeds.
    if n == 3:
        normal = sum(abs(e.delta) <= 1.96 * e.sd / math.sqrt(n) for e in estimates) / REPEATS
        assert normal < 0.925


def test_pairing_by_seed_narrows_the_interval_where_seeds_are_correlated():
    both = draws(5, 2, repeats=500, correlated=0.7)
    widths = [[(e.high - e.low) for e in (paired(*x), welch(*x))] for x in both]
    ours, theirs = np.mean(widths, axis=0)
    assert ours < 0.8 * theirs


@pytest.mark.parametrize(("test", "n"), [(paired, 3), (paired, 5), (welch, 5)])
def test_holm_keeps_false_positives_of_a_family_below_5_percent(test, n):
    # Four rows against one baseline without any difference; sharing it correlates the tests.
    repeats = 5000
    false, unadjusted = 0, 0
    for baseline, *rows in draws(n, 5, repeats=repeats):
        p = [test(row, baseline).p for row in rows]
        false += min(holm(p)) < 0.05
        unadjusted += min(p) < 0.05
    assert false / repeats <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / repeats)
    assert false > 0
    assert unadjusted / repeats > 0.09


@pytest.mark.parametrize(
    ("test", "spreads"),
    [(paired, (1.0, 0.6)), (welch, (1.0, 1.0)), (welch, (1.5, 0.3))],
    ids=["paired", "equal", "unequal"],
)
def test_the_seeds_needed_find_the_difference_in_80_percent(test, spreads):
    sd = math.hypot(*spreads)
    df_per_seed = 1 if test is paired else sd**4 / sum(s**4 for s in spreads)
    n, repeats = seeds_needed(sd, 1.5, df_per_seed), 3000

    def found(seeds):
        a, b = spreads
        return sum(
            test([1.5 + a * x for x in ours], [b * x for x in theirs]).p < 0.05
            for ours, theirs in draws(seeds, 2, repeats=repeats)
        )

    error = 3 * math.sqrt(0.8 * 0.2 / repeats)
    assert 0.8 - error <= found(n) / repeats <= 0.9
    assert found(n - 1) / repeats < 0.8 + error


degrees = st.floats(0, 4).map(lambda x: 10.0**x)


@settings(max_examples=300)
@given(degrees, st.floats(-3, 2.5).map(lambda x: 10.0**x), st.sampled_from([-1, 1]))
def test_students_distribution_is_that_of_scipy(df, size, sign):
    expected = scipy.special.stdtr(df, sign * size)
    assert student.cdf(df, sign * size) == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert student.cdf(df, sign * size) == pytest.approx(expected, rel=0, abs=1e-10)


@given(st.floats(-1e3, 0))
def test_students_distribution_has_its_digits_also_next_to_0(t):
    # Where scipy's have an error of 1e-9.
    one = math.atan2(1, -t) / math.pi
    two = 1 / (2 + t * t + -t * math.sqrt(2 + t * t))
    assert student.cdf(1, t) == pytest.approx(one, rel=1e-12)
    assert student.cdf(2, t) == pytest.approx(two, rel=1e-12)


@settings(max_examples=200)
@given(degrees, st.floats(0.55, 0.9999))
def test_students_quantile_is_that_of_scipy(df, p):
    assert student.quantile(df, p) == pytest.approx(scipy.special.stdtrit(df, p), rel=1e-9)


@settings(max_examples=200)
@given(degrees, st.floats(0, 30), st.floats(1.5, 13))
def test_power_is_the_noncentral_distribution_of_scipy(df, shift, critical):
    expected = 1 - scipy.special.nctdtr(df, shift, critical)
    assert student.power(df, shift, critical) == pytest.approx(expected, rel=0, abs=1e-9)


def test_statistics_import_neither_scipy_nor_pandas_nor_torch():
    code = (
        "import sys, json, ltnorm.reporting.statistics, ltnorm.reporting.bootstrap; "
        "print(json.dumps([m for m in ('scipy', 'pandas', 'torch') if m in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == []
