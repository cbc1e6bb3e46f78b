import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltnorm.data.longtail import (
    choose,
    class_groups,
    class_ranks,
    long_tail_counts,
    report_groups,
)
from ltnorm.errors import UsageError

CIFAR10_LABELS = np.random.RandomState(7).permutation(np.repeat(np.arange(10), 5000))


@pytest.mark.parametrize(
    ("n_max", "classes", "ratio", "total"),
    [
        (5000, 10, 10, 20431),
        (5000, 10, 50, 13996),
        (5000, 10, 100, 12406),
        (500, 100, 10, 19573),
        (500, 100, 50, 12608),
        (500, 100, 100, 10847),
    ],
)
def test_published_totals(n_max, classes, ratio, total):
    assert sum(long_tail_counts(n_max, classes, ratio)) == total


def test_published_counts_of_cifar10_at_ratio_100():
    expected = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert long_tail_counts(5000, 10, 100) == expected


@pytest.mark.parametrize(
    ("ratio", "sizes", "used"),
    [(100, (35, 35, 30), "shots"), (50, (41, 41, 18), "shots"), (10, (69, 31, 0), "thirds")],
)
def test_published_shot_groups_of_cifar100(ratio, sizes, used):
    counts = long_tail_counts(500, 100, ratio)
    scheme, groups = report_groups(counts, "shots")
    assert scheme == "shots"
    assert tuple(groups.count(g) for g in ("head", "medium", "tail")) == sizes
    assert report_groups(counts, "auto")[0] == used


def test_cifar10_is_reported_by_thirds():
    scheme, groups = report_groups(long_tail_counts(5000, 10, 100))
    assert scheme == "thirds"
    assert groups == ["head"] * 3 + ["medium"] * 4 + ["tail"] * 3


def test_published_shot_groups_of_places(real_data):
    labels = [int(line.split()[1]) for line in (real_data / "lists/Places_LT_train.txt").open()]
    _, groups = report_groups(np.bincount(labels).tolist(), "shots")
    assert [groups.count(g) for g in ("head", "medium", "tail")] == [131, 163, 71]


def test_step_and_pareto():
    assert long_tail_counts(100, 5, 10, "step") == [100, 100, 10, 10, 10]
    pareto = long_tail_counts(1000, 3, 64, "pareto")
    # At the middle class 1 + 1/2 * (64^(1/6) - 1) = 1.5, at the last it is 2.
    assert pareto == [1000, int(1000 * 1.5**-6), int(1000 / 64)]


def test_rounding_errors_cost_no_image_of_the_tail():
    assert long_tail_counts(5000, 10, 100, "pareto")[-1] == 50
    assert long_tail_counts(500, 100, 100, "pareto")[-1] == 5
    for n in range(2, 600):
        for profile in ("exp", "step", "pareto"):
            assert long_tail_counts(n, 10, n, profile)[-1] == 1


@given(
    n_max=st.integers(1, 5000),
    classes=st.integers(2, 60),
    ratio=st.floats(1, 300),
    profile=st.sampled_from(["exp", "step", "pareto"]),
)
def test_counts_fall_from_n_max_and_no_class_is_empty(n_max, classes, ratio, profile):
    try:
        counts = long_tail_counts(n_max, classes, ratio, profile)
    except UsageError:
        assert n_max / ratio < 1
        return
    assert counts[0] == n_max
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == int(n_max / ratio * (1 + 1e-9))


def test_subsets_are_ldam_drws():
    """The same images as the published procedure: np.random.seed(0), shuffle class by class."""
    np.random.seed(0)
    expected = []
    for label, n in enumerate(long_tail_counts(5000, 10, 100)):
        indices = np.where(label == CIFAR10_LABELS)[0]
        np.random.shuffle(indices)
        expected.append(indices[:n])
    chosen = choose(CIFAR10_LABELS, 10, 100)
    assert np.array_equal(chosen.train, np.concatenate(expected))
    assert len(chosen.val) == 0


@pytest.mark.parametrize("val", [0, 50])
def test_subsets_of_one_seed_are_nested_across_ratios(val):
    small, large = (set(choose(CIFAR10_LABELS, 10, r, val=val).train.tolist()) for r in (100, 10))
    other = set(choose(CIFAR10_LABELS, 10, 100, val=val, data_seed=1).train.tolist())
    assert small < large
    assert other != small


def test_validation_images_are_apart_and_the_same_at_every_ratio():
    ten, hundred = (choose(CIFAR10_LABELS, 10, ratio, val=50) for ratio in (10, 100))
    assert np.array_equal(ten.val, hundred.val)
    assert not set(ten.val.tolist()) & set(ten.train.tolist())
    assert np.bincount(CIFAR10_LABELS[ten.val]).tolist() == [50] * 10
    assert ten.counts[0] == 4950


def test_class_order_unties_the_tail_from_labels():
    counts = choose(CIFAR10_LABELS, 10, 100, order="reversed").counts
    assert counts == long_tail_counts(5000, 10, 100)[::-1]
    seeded = choose(CIFAR10_LABELS, 10, 100, order="seeded", data_seed=3).counts
    assert sorted(seeded, reverse=True) == long_tail_counts(5000, 10, 100)
    assert seeded != choose(CIFAR10_LABELS, 10, 100, order="seeded", data_seed=4).counts
    assert sorted(class_ranks([1] * 10, "seeded", 3)) == list(range(10))


def test_groups_follow_frequency_whatever_the_labels():
    counts = long_tail_counts(5000, 10, 100)[::-1]
    _, groups = report_groups(counts)
    assert groups == ["tail"] * 3 + ["medium"] * 4 + ["head"] * 3
    assert class_groups(counts, 2) == [1] * 5 + [0] * 5


@given(
    counts=st.lists(st.integers(1, 5000), min_size=2, max_size=40),
    groups=st.integers(1, 6),
    scheme=st.sampled_from(["rank", "images"]),
)
def test_class_groups_are_whole_and_ordered(counts, groups, scheme):
    if groups > len(counts):
        with pytest.raises(UsageError, match="more than"):
            class_groups(counts, groups, scheme)
        return
    index = np.array(class_groups(counts, groups, scheme))
    sizes = np.bincount(index, minlength=groups)
    assert sizes.min() >= 1
    assert len(sizes) == groups
    if scheme == "rank":
        assert sizes.max() - sizes.min() <= 1
    for k in range(groups - 1):
        head, next_ = (np.array(counts)[index == g] for g in (k, k + 1))
        assert head.min() >= next_.max()


def test_groups_by_images_hold_nearly_equal_shares():
    counts = long_tail_counts(500, 100, 100)
    index = np.array(class_groups(counts, 3, "images"))
    shares = [sum(np.array(counts)[index == g]) / sum(counts) for g in range(3)]
    assert max(abs(s - 1 / 3) for s in shares) < 0.03
