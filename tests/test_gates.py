import pytest
from made import result
from test_compare import compare

from ltnorm.errors import UsageError
from ltnorm.reporting.gates import Gate, GateFailed, check


def seeds(norm, tails, **changes):
    return [result(norm, seed=i, tail=t, **changes) for i, t in enumerate(tails)]


BASE = seeds("bn", [10.0, 12.0, 14.0])
# Differences to BASE: +2 +- 0.1, and -2 +- 0.1, and 0 +- 5.
BETTER = seeds("gn", [12.0, 13.9, 16.1])
WORSE = seeds("split", [8.0, 9.9, 12.1])
OPEN = seeds("compound", [5.0, 12.0, 19.0])


def gates(*texts, unless=False):
    return [Gate.parse(text, unless) for text in texts]


def test_below_fails_only_where_the_whole_interval_lies_below():
    blocks = compare([*BASE, *BETTER, *WORSE, *OPEN])
    check(gates("tail=-3"), blocks)
    with pytest.raises(GateFailed) as failed:
        check(gates("tail=-1.0"), blocks)
    assert "split" in failed.value.message
    assert "gn" not in failed.value.message
    assert "compound" not in failed.value.message
    assert failed.value.exit_code == 4


def test_unless_fails_where_the_lower_end_is_below():
    blocks = compare([*BASE, *BETTER, *OPEN])
    with pytest.raises(GateFailed) as failed:
        check(gates("tail=+0.5", unless=True), blocks)
    assert "compound" in failed.value.message
    assert "gn" not in failed.value.message
    check(gates("tail=+0.5", unless=True), blocks, ["gn"])


@pytest.mark.parametrize("unless", [True, False])
def test_the_bound_itself_passes(unless):
    blocks = compare([*BASE, *BETTER])
    estimate = blocks[0].rows[1].deltas["tail"].estimate
    end = estimate.low if unless else estimate.high
    check([Gate("tail", end, unless)], blocks)
    check([Gate("tail", end - 1e-9, unless)], blocks)
    with pytest.raises(GateFailed):
        check([Gate("tail", end + 1e-9, unless)], blocks)


@pytest.mark.parametrize("unless", [True, False])
def test_equal_differences_have_no_spread_to_judge_by(unless):
    blocks = compare([*BASE, *seeds("gn", [21.0, 23.0, 25.0])])
    with pytest.raises(GateFailed, match="no spread"):
        check(gates("tail=1.0", unless=unless), blocks)


def test_what_was_chosen_by_its_outcome_cannot_pass():
    other = {"train.lr": 0.4}
    runs = [*BASE, *BETTER, *seeds("gn", [30.0, 30.1, 30.2], flags=other)]
    chosen = compare(runs, by=("norm", "train.lr"), best_only=True, sort="tail")
    with pytest.raises(GateFailed, match="chosen by their tail"):
        check(gates("tail=-100"), chosen)
    with pytest.raises(GateFailed, match="selected by their tail"):
        check(gates("tail=-100"), compare([*BASE, *BETTER], selected_by=("tail",)))


@pytest.mark.parametrize("unless", [True, False])
def test_one_seed_cannot_pass(unless):
    for runs in ([*BASE, *BETTER[:1]], [*BASE[:1], *BETTER]):
        with pytest.raises(GateFailed, match="no interval"):
            check(gates("tail=-100", unless=unless), compare(runs))


def test_what_cannot_be_judged_fails():
    with pytest.raises(GateFailed, match="no row besides the baseline"):
        check(gates("tail=-100"), compare(BASE))
    with pytest.raises(GateFailed, match="no baseline"):
        check(gates("tail=-100"), compare(BETTER))
    with pytest.raises(GateFailed, match="no row of nbn"):
        check(gates("tail=-100"), compare([*BASE, *BETTER]), ["nbn"])
    with pytest.raises(UsageError) as error:
        check(gates("tail=-100"), compare([*BASE, *BETTER]), ["nbm"])
    assert "did you mean 'nbn'" in error.value.hint
    empty = [result(n, seed=s, tail=None) for n in ("bn", "gn") for s in range(3)]
    with pytest.raises(GateFailed, match="no tail"):
        check(gates("tail=-100"), compare(empty))


def test_every_failure_is_told():
    blocks = compare([*BASE, *BETTER, *WORSE])
    with pytest.raises(GateFailed) as failed:
        check(gates("tail=10", "all=10"), blocks)
    assert failed.value.message.count("Δ tail") == 2
    assert failed.value.message.count("Δ all") == 2
    assert "4 failures" in failed.value.message


@pytest.mark.parametrize("text", ["tial=1", "tail", "tail=", "tail=x", "tail=nan", "nll=1", "=1"])
def test_a_gate_that_is_none_is_refused(text):
    with pytest.raises(UsageError) as error:
        Gate.parse(text, unless=False)
    assert text in error.value.message
