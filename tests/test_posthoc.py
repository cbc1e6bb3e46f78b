import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from ltnorm.evaluation import posthoc


@given(st.lists(st.integers(1, 5000), min_size=2, max_size=8), st.floats(0, 3))
def test_logits_are_adjusted_by_the_log_prior(counts, tau):
    logits = torch.randn(5, len(counts), dtype=torch.float64)
    adjusted = posthoc.adjust_logits(logits, counts, tau)
    for i in range(5):
        for c, n in enumerate(counts):
            expected = float(logits[i, c]) - tau * math.log(n / sum(counts))
            assert float(adjusted[i, c]) == pytest.approx(expected)


@given(st.integers(1, 5000), st.integers(2, 8), st.floats(0, 3))
def test_equal_priors_change_no_order(n, classes, tau):
    logits = torch.randn(20, classes)
    adjusted = posthoc.adjust_logits(logits, [n] * classes, tau)
    assert torch.equal(adjusted.argsort(1), logits.argsort(1))
    unequal = posthoc.adjust_logits(logits, list(range(1, classes + 1)), 0.0)
    assert torch.equal(unequal, logits)


def test_adjusting_undoes_the_prior_of_a_calibrated_model():
    prior = torch.tensor([0.9, 0.09, 0.01])
    balanced = torch.randn(50, 3)
    trained = balanced + prior.log()
    undone = posthoc.adjust_logits(trained, [90, 9, 1], 1.0)
    torch.testing.assert_close(undone, balanced, rtol=1e-4, atol=1e-5)


def test_tau_normalization_shrinks_norms_and_keeps_directions():
    weight = torch.randn(4, 6) * torch.tensor([[10.0], [3.0], [1.0], [0.1]])
    assert torch.equal(posthoc.tau_normalized(weight, 0.0), weight)
    torch.testing.assert_close(posthoc.tau_normalized(weight, 1.0).norm(dim=1), torch.ones(4))
    half = posthoc.tau_normalized(weight, 0.5)
    torch.testing.assert_close(half.norm(dim=1), weight.norm(dim=1).sqrt())
    similarity = torch.cosine_similarity(half, weight, dim=1)
    torch.testing.assert_close(similarity, torch.ones(4))


def test_the_nearest_class_mean_is_scikit_learns():
    torch.manual_seed(0)
    labels = torch.tensor([0] * 30 + [1] * 10 + [2] * 3)
    features = torch.randn(43, 5).abs() + labels[:, None] * torch.tensor([0.0, 1, 0, 2, 0])
    means = posthoc.class_means(features, labels, 3)
    torch.testing.assert_close(means.norm(dim=1), torch.ones(3))
    new = torch.nn.functional.normalize(torch.randn(200, 5).abs(), dim=1)
    # For vectors of length 1 the largest cosine is the least distance.
    peer = KNeighborsClassifier(1).fit(means.numpy(), [0, 1, 2])
    assert (new @ means.T).argmax(1).tolist() == peer.predict(new.numpy()).tolist()
    scaled = (7 * new @ means.T).argmax(1)
    assert torch.equal(scaled, (new @ means.T).argmax(1))


def test_tau_is_the_best_on_the_labels_it_is_given():
    logits = torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 0.0]])
    labels = torch.tensor([1, 1, 0])
    shifted = lambda tau: logits + torch.tensor([0.0, tau])  # noqa: E731
    # Class 1 is right from tau > 1, class 0 wrong from tau >= 2.
    assert posthoc.tune(shifted, labels, [0.0, 0.5, 1.5, 1.8, 2.5]) == 1.5
    assert posthoc.tune(lambda tau: logits, labels) == 0.0
