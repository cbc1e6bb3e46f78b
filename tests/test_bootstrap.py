import math
import zipfile

import numpy as np
import pytest
import torch

from ltnorm.errors import LtnormError
from ltnorm.evaluation.metrics import evaluate
from ltnorm.reporting.bootstrap import (
    Contrast,
    Predictions,
    class_weights,
    interval,
    intervals,
    read,
)


def runs(labels, chance, seeds, generator):
    """Runs that are right on image i with the probability chance[i]."""
    return [Predictions(labels, generator.random(len(labels)) < chance) for _ in range(seeds)]


def two_settings(sizes, seeds=(3, 2), seed=0, together=True):
    """Runs of two settings; an image is as hard for both, or (not together) for one only."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int16)
    hard = generator.beta(0.3, 0.3, len(labels))
    other = hard if together else generator.beta(0.3, 0.3, len(labels))
    ours = runs(labels, hard, seeds[0], generator)
    return ours, runs(labels, other, seeds[1], generator)


def difference(ours, theirs, w, w_theirs, drawn):
    """The statistic, computed image by image over drawn images [R, n] of each class."""
    total = 0
    for c, images in enumerate(drawn):
        a = np.mean([run.correct[images].mean(1) for run in ours], axis=0)
        b = np.mean([run.correct[images].mean(1) for run in theirs], axis=0)
        values = 100 * (w[c] * a - w_theirs[c] * b)
        # n draws have (n - 1) / n of the variance of the class.
        n = images.shape[1]
        total = total + values.mean() + (values - values.mean()) * math.sqrt(n / (n - 1))
    return total


def slow(ours, theirs, w, w_theirs, resamples=10_000, seed=1):
    """Draws of the statistic by a bootstrap as in the books."""
    generator = np.random.default_rng(seed)
    drawn = []
    for c in range(len(w)):
        images = np.flatnonzero(ours[0].labels == c)
        drawn.append(images[generator.integers(len(images), size=(resamples, len(images)))])
    return difference(ours, theirs, w, w_theirs, drawn)


@pytest.mark.parametrize(
    "sizes",
    [[40, 40, 40], [2, 3, 4, 25], [300, 21, 8], [2100, 20], [2001]],
    ids=["equal", "small", "unequal", "one large", "large"],
)
@pytest.mark.parametrize("same_groups", [True, False])
def test_it_is_the_bootstrap_as_in_the_books(sizes, same_groups):
    ours, theirs = two_settings(sizes)
    w = np.arange(1.0, len(sizes) + 1)
    w /= w.sum()
    w_theirs = w if same_groups else w[::-1] + 0.1
    expected = slow(ours, theirs, w, w_theirs)
    spread = expected.std()
    found = interval(ours, theirs, w, w_theirs, resamples=10_000)
    # Quantiles of 10,000 draws are known to 0.03 standard deviations.
    assert found == pytest.approx(tuple(np.percentile(expected, [2.5, 97.5])), abs=0.15 * spread)
    assert found[1] - found[0] > spread


def test_its_deviation_is_that_of_a_stratified_mean():
    ours, theirs = two_settings([400, 200, 100, 51])
    w = np.array([0.1, 0.2, 0.3, 0.4])
    shares = [np.mean([run.correct for run in side], axis=0) for side in (ours, theirs)]
    per_image, labels = 100 * (shares[0] - shares[1]), ours[0].labels
    classes = [per_image[labels == c] for c in range(4)]
    centre = sum(w[c] * v.mean() for c, v in enumerate(classes))
    sd = math.sqrt(sum(w[c] ** 2 * v.var(ddof=1) / len(v) for c, v in enumerate(classes)))
    low, high = interval(ours, theirs, w, w, resamples=20_000)
    assert (low + high) / 2 == pytest.approx(centre, abs=0.1 * sd)
    assert (high - low) / (2 * 1.96) == pytest.approx(sd, rel=0.04)


def test_many_at_once_are_those_of_one_each_whatever_their_images():
    w, tail = np.array([0.5, 0.3, 0.2]), np.array([0, 0, 1.0])
    contrasts = []
    for sizes in ([60, 30, 30], [9, 9, 9]):
        ours, theirs = two_settings(sizes)
        other = two_settings(sizes, seed=0, seeds=(1, 1))[0]
        contrasts += [
            Contrast(ours, theirs, w, w),
            Contrast(ours, other, w, tail),
            Contrast(ours, theirs, tail, tail),
            Contrast(ours, ours, w, w),
        ]
    contrasts.insert(3, Contrast(contrasts[0].ours, contrasts[-1].ours, w, w))  # other images
    found = intervals(contrasts, resamples=10_000)
    assert found[3] is None
    assert found[4] == found[-1] == (0, 0)
    for i in {*range(len(contrasts))} - {3}:
        c = contrasts[i]
        alone = interval(c.ours, c.theirs, c.ours_weights, c.theirs_weights, resamples=10_000)
        assert found[i] == pytest.approx(alone, abs=0.05 * (alone[1] - alone[0]))


def test_the_same_input_has_the_same_interval():
    ours, theirs = two_settings([30, 20])
    w = np.array([0.5, 0.5])
    assert interval(ours, theirs, w, w) == interval(ours, theirs, w, w)
    assert interval(ours, theirs, w, w) != interval(ours, theirs, w, w, seed=1)


def test_identical_predictions_have_no_difference():
    ours, _ = two_settings([40, 2300, 7])
    w = np.full(3, 1 / 3)
    assert interval(ours, ours, w, w) == (0, 0)
    assert interval(ours, ours[::-1], w, w) == (0, 0)


def test_images_that_are_hard_for_both_cancel():
    w = np.full(2, 1 / 2)
    widths = []
    for together in (True, False):
        low, high = interval(*two_settings([150, 150], together=together), w, w)
        widths.append(high - low)
    assert widths[0] < 0.75 * widths[1]


def test_images_are_drawn_within_their_class():
    # What differs lies between the classes: drawing over all images would give it a spread.
    labels = np.repeat([0, 1], 50)
    ours, theirs = Predictions(labels, labels == 0), Predictions(labels, labels == 2)
    w = np.array([0.5, 0.5])
    assert interval([ours], [theirs], w, w) == pytest.approx((50, 50))


def test_it_covers_the_difference_of_known_accuracies():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 80)
    accuracy, base = np.array([0.9, 0.6, 0.5, 0.3]), np.array([0.85, 0.65, 0.4, 0.2])
    w, repeats = np.array([0, 0.2, 0.3, 0.5]), 800
    truth = 100 * w @ (accuracy - base)
    covered = narrow = 0
    for _ in range(repeats):
        # One number an image decides for both: their errors are correlated.
        luck = generator.random(len(labels))
        ours = Predictions(labels, luck < accuracy[labels])
        theirs = Predictions(
            labels, (luck + 0.3 * generator.random(len(labels))) % 1 < base[labels]
        )
        low, high = interval([ours], [theirs], w, w, resamples=400)
        covered += low <= truth <= high
        narrow += abs(truth - (low + high) / 2) <= (high - low) / 4
    assert 0.925 <= covered / repeats <= 0.975
    assert narrow / repeats < 0.8


def test_other_images_have_no_interval():
    ours, theirs = two_settings([30, 20])
    w = np.array([0.5, 0.5])
    for labels in (theirs[0].labels[::-1], theirs[0].labels[:-1]):
        correct = theirs[0].correct[: len(labels)]
        assert interval(ours, [theirs[0], Predictions(labels, correct)], w, w) is None


def test_a_class_without_images_matters_only_where_it_counts():
    ours, theirs = two_settings([30, 0, 20])
    everywhere, elsewhere = np.full(3, 1 / 3), np.array([0.5, 0, 0.5])
    assert interval(ours, theirs, everywhere, everywhere) is None
    assert interval(ours, theirs, everywhere, elsewhere) is None
    assert interval(ours, theirs, elsewhere, elsewhere) is not None


def test_a_metric_of_no_class_and_labels_beyond_the_classes_have_no_interval():
    ours, theirs = two_settings([30, 20])
    assert interval(ours, theirs, np.zeros(2), np.zeros(2)) is None
    assert interval(ours, theirs, np.ones(2), np.zeros(2)) is None
    assert interval(ours, theirs, np.ones(1), np.ones(1)) is None


def test_the_weights_give_the_accuracies_that_runs_report():
    generator = torch.Generator().manual_seed(0)
    groups = ["head", "head", "medium", "medium", "medium"]  # no tail
    labels = torch.tensor([0] * 9 + [1] * 5 + [2] * 4 + [4] * 7)  # no image of class 3
    logits = torch.randn(len(labels), 5, generator=generator) + torch.eye(5)[labels]
    metrics = evaluate(logits, labels, groups)
    correct = (logits.argmax(1) == labels).numpy()
    run, wrong = Predictions(labels.numpy(), correct), Predictions(labels.numpy(), correct & False)
    expected = {"all": metrics.accuracy, **metrics.groups}
    for name in ("all", "head", "medium"):
        w = class_weights(name, groups, run.labels)
        assert w.sum() == pytest.approx(1)
        per_class = [correct[run.labels == c].mean() if w[c] else 0 for c in range(5)]
        assert 100 * w @ per_class == pytest.approx(expected[name], abs=1e-4)
        low, high = interval([run], [wrong], w, w)
        assert low < expected[name] < high
    assert class_weights("tail", groups, run.labels) is None
    assert metrics.groups["tail"] is None


def write(path, **changes):
    arrays = {
        "label": np.array([0, 0, 1, 2, 2], np.int16),
        "prediction": np.array([0, 1, 1, 2, 0], np.int16),
        "true_class_probability": np.full(5, 0.5, np.float16),
    }
    arrays = {k: v for k, v in (arrays | changes).items() if v is not None}
    np.savez_compressed(path, **arrays)
    return path


def test_predictions_are_read(tmp_path):
    found = read(write(tmp_path / "predictions.npz"))
    assert found.labels.tolist() == [0, 0, 1, 2, 2]
    assert found.correct.tolist() == [True, False, True, True, False]
    assert found.correct.dtype == bool


@pytest.mark.parametrize(
    "changes",
    [
        {"label": None},
        {"prediction": None},
        {"prediction": np.zeros(4, np.int16)},
        {"label": np.zeros((5, 1), np.int16), "prediction": np.zeros((5, 1), np.int16)},
        {"prediction": np.zeros(5, np.float32)},
        {"label": np.zeros(5, np.uint64)},
        {"label": np.array([0, 0, 1, 2, -1], np.int16)},
        {"label": np.array([0, 0, 1, 2, None], object)},
    ],
    ids=[
        "no label",
        "no prediction",
        "lengths",
        "matrix",
        "floats",
        "unsigned",
        "negative",
        "objects",
    ],
)
def test_other_arrays_are_refused(tmp_path, changes):
    path = write(tmp_path / "predictions.npz", **changes)
    with pytest.raises(LtnormError) as error:
        read(path)
    assert str(path) in error.value.message
    assert "\n" not in error.value.message


def test_a_damaged_file_is_refused_wherever_it_is_cut_or_changed(tmp_path):
    path = write(tmp_path / "predictions.npz")
    whole, good = path.read_bytes(), read(path)
    damaged = [whole[:cut] for cut in range(0, len(whole), 3)]
    damaged += [
        whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :] for i in range(0, len(whole), 2)
    ]
    messages = []
    for content in damaged:
        path.write_bytes(content)
        try:
            found = read(path)
        except LtnormError as error:
            messages.append(error.message)
        else:  # what is not read may be damaged
            assert found.labels.tolist() == good.labels.tolist()
            assert found.correct.tolist() == good.correct.tolist()
    assert len(messages) > len(damaged) / 2
    assert all(str(path) in m and "\n" not in m for m in messages)


def test_a_header_that_is_no_python_is_refused(tmp_path):
    path = write(tmp_path / "predictions.npz")
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:  # with right checksums
        for name, part in parts.items():
            archive.writestr(name, part.replace(b"{'descr'", b"\xd7'descr'"))
    with pytest.raises(LtnormError, match="not a readable file"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY"])
def test_something_else_is_refused(tmp_path, content):
    path = tmp_path / "predictions.npz"
    path.write_bytes(content)
    with pytest.raises(LtnormError, match="predictions"):
        read(path)


def test_an_array_alone_a_folder_and_nothing_are_refused(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    (tmp_path / "folder.npz").mkdir()
    for name in ("one.npz", "folder.npz", "missing.npz"):
        with pytest.raises(LtnormError, match=name):
            read(tmp_path / name)


def test_a_class_of_one_image_has_no_spread_to_tell():
    ours, theirs = two_settings([1, 30])
    weights = np.array([0.5, 0.5])
    assert interval(ours, theirs, weights, weights) is None
    assert interval(ours, theirs, np.array([0.0, 1.0]), np.array([0.0, 1.0])) is not None
