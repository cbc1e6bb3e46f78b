import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ltnorm import registry
from ltnorm.data import sampling
from ltnorm.data.sampling import draw
from ltnorm.errors import UsageError

COUNTS = [40, 17, 9, 3, 1]
N, C = sum(COUNTS), len(COUNTS)
FORMULAS = {
    "instance": lambda n, t: n,
    "balanced": lambda n, t: 1,
    "sqrt": lambda n, t: n**0.5,
    "progressive": lambda n, t: (1 - t) * n / N + t / C,
    "effective": lambda n, t: n / ((1 - 0.9999**n) / (1 - 0.9999)),
}


def probability(name, progress=0.0, counts=COUNTS, **options):
    return registry.load(registry.SAMPLERS[name].target)(counts, progress, **options)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def labels_of(counts):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=generator())]


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", list(registry.SAMPLERS))
def test_a_sampler_is_its_formula(name, progress):
    weights = [FORMULAS[name](n, progress) for n in COUNTS]
    q = probability(name, progress)
    assert q.dtype == np.float64
    np.testing.assert_allclose(q, np.array(weights) / sum(weights), rtol=1e-12)


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", list(registry.SAMPLERS))
def test_a_sampler_draws_what_it_says_in_expectation(name, progress):
    labels, q, epochs = labels_of(COUNTS), probability(name, progress), 600
    drawn = torch.stack([draw(labels, q, generator(seed)) for seed in range(epochs)])
    per_image = torch.stack([torch.bincount(d, minlength=N) for d in drawn]).double()
    per_class = torch.zeros(epochs, C).double().index_add_(1, labels, per_image)
    # A count is one of two neighbours, of variance at most 1/4. An image's is too, given its
    # class's, whose own rounding adds at most 1/4 again. Five standard errors each.
    error = 5 * (0.25 / epochs) ** 0.5
    torch.testing.assert_close(per_class.mean(0), N * torch.from_numpy(q), rtol=0, atol=error)
    expected = (N * q / COUNTS)[labels]
    torch.testing.assert_close(
        per_image.mean(0), torch.from_numpy(expected), rtol=0, atol=2**0.5 * error
    )
    # Each place of the epoch is of each class with probability q.
    early = torch.bincount(labels[drawn[:, : N // 2]].flatten(), minlength=C) / drawn.numel()
    torch.testing.assert_close(early.double(), torch.from_numpy(q) / 2, rtol=0, atol=0.01)


@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    weights=st.lists(st.floats(0, 1), min_size=8, max_size=8),
    balanced=st.booleans(),
    seed=st.integers(0, 2**62),
)
def test_a_draw_is_of_whole_rounds_and_as_near_to_its_shares_as_can_be(
    counts, weights, balanced, seed
):
    weights = np.ones(len(counts)) if balanced else np.array(weights[: len(counts)]) + 1e-3
    labels, q = labels_of(counts), weights / weights.sum()
    drawn = draw(labels, q, generator(seed))
    assert len(drawn) == len(labels)
    per_class = torch.bincount(labels[drawn], minlength=len(counts)).numpy()
    expected = len(labels) * q
    assert (per_class >= np.floor(expected + 1e-7)).all()
    assert (per_class <= np.ceil(expected - 1e-7)).all()
    per_image = torch.bincount(drawn, minlength=len(labels))
    for c in range(len(counts)):
        own = per_image[labels == c]
        assert own.max() - own.min() <= 1


def test_what_is_drawn_follows_from_the_generator():
    labels, q = labels_of(COUNTS), probability("sqrt")
    first, same, other = (draw(labels, q, generator(seed)).tolist() for seed in (1, 1, 2))
    assert first == same != other


def test_progressive_goes_from_the_data_to_balanced_classes():
    np.testing.assert_allclose(probability("progressive", 0.0), probability("instance"))
    np.testing.assert_allclose(probability("progressive", 1.0), probability("balanced"))
    tail = [probability("progressive", t)[-1] for t in np.linspace(0, 1, 11)]
    np.testing.assert_allclose(np.diff(tail), tail[1] - tail[0])


def test_effective_lies_between_the_data_and_balanced_classes():
    np.testing.assert_allclose(probability("effective", beta=0.0), probability("instance"))
    limit = probability("effective", beta=1 - 1e-9)
    np.testing.assert_allclose(limit, probability("balanced"), rtol=1e-6)
    assert (probability("effective", counts=[10**6, 1])).sum() == 1.0


def test_samplers_are_built_by_name_and_instance_is_none():
    assert sampling.build("instance", COUNTS) is None
    made = sampling.build("progressive", COUNTS)
    np.testing.assert_array_equal(made(0.4), probability("progressive", 0.4))
    made = sampling.build("effective", COUNTS, beta=0.5)
    np.testing.assert_array_equal(made(0.4), probability("effective", beta=0.5))
    with pytest.raises(UsageError, match="unknown sampler 'balance'") as error:
        sampling.build("balance", COUNTS)
    assert "balanced" in error.value.hint


def test_options_are_validated():
    for name in registry.SAMPLERS:
        model = registry.options_model("sampler", name)
        assert model().model_dump() == ({"beta": 0.9999} if name == "effective" else {})
    for beta in (-0.1, 1.0):
        with pytest.raises(ValidationError):
            registry.options_model("sampler", "effective")(beta=beta)


def test_a_class_without_images_cannot_be_drawn():
    with pytest.raises(ValueError, match="class 1 has no images"):
        draw(torch.tensor([0, 2]), np.ones(3) / 3, generator())
