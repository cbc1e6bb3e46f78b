import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ltnorm.evaluation import metrics


@settings(deadline=None, max_examples=50)
@given(classes=st.integers(2, 8), n=st.integers(1, 60), seed=st.integers(0, 10**6))
def test_metrics_agree_with_sklearn(classes, n, seed):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(n, classes)))
    labels = torch.from_numpy(rng.integers(classes, size=n))
    measured = metrics.evaluate(logits, labels, ["head"] * classes)
    predicted = logits.argmax(1)
    present = np.unique(labels)
    recall = sklearn.metrics.recall_score(labels, predicted, average=None, labels=present)
    assert measured.accuracy == pytest.approx(
        100 * sklearn.metrics.accuracy_score(labels, predicted)
    )
    assert [v for v in measured.per_class if v is not None] == pytest.approx(100 * recall)
    assert measured.macro_f1 == pytest.approx(
        100 * sklearn.metrics.f1_score(labels, predicted, average="macro")
    )
    assert measured.worst_class == pytest.approx(100 * recall.min())
    assert measured.gmean == pytest.approx(100 * recall.prod() ** (1 / len(recall)), abs=1e-9)
    probability = logits.softmax(1).numpy()
    assert measured.nll == pytest.approx(
        sklearn.metrics.log_loss(labels, probability, labels=range(classes))
    )


def test_groups_average_classes_not_images():
    labels = torch.tensor([0] * 8 + [1] * 2 + [2] * 2)
    logits = torch.nn.functional.one_hot(torch.tensor([0] * 8 + [0, 1] + [0, 0]), 3).double()
    measured = metrics.evaluate(logits, labels, ["head", "head", "tail"])
    assert measured.groups == {"head": 75.0, "medium": None, "tail": 0.0}
    assert measured.accuracy == 75.0
    assert measured.gmean == 0.0


def test_a_class_without_images_has_no_accuracy():
    measured = metrics.evaluate(torch.eye(3).double(), torch.tensor([0, 1, 1]), ["head"] * 3)
    assert measured.per_class == [100.0, 50.0, None]
    assert measured.groups["head"] == 75.0
    assert measured.images_per_class == [1, 2, 0]


def test_calibration_error_by_hand():
    # Confidences 0.9, 0.9, 0.6: bins (13/15, 14/15] and (8/15, 9/15].
    probability = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]).double()
    labels = torch.tensor([0, 1, 1])
    expected = 100 * (abs(1 - 1.8) + abs(1 - 0.6)) / 3
    assert metrics.expected_calibration_error(probability.log(), labels) == pytest.approx(expected)
    certain = torch.tensor([[50.0, -50.0]]).double()
    assert metrics.expected_calibration_error(certain, torch.tensor([0])) == pytest.approx(0)
