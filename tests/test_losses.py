"""Each loss against its paper's formula, computed image by image in float64."""

import math
from decimal import Decimal, localcontext
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from ltnorm import losses, models, registry
from ltnorm.errors import UsageError
from ltnorm.norms import norm_layer
from ltnorm.validation import validate

CIFAR10_LT = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
COUNTS = [90, 40, 40, 7, 1]
BALANCED = [8, 8, 8, 8, 8]
NAMES = list(registry.LOSSES)


def batch(n=12, classes=5, seed=0, scale=2.0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=rng, dtype=dtype)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (n,), generator=rng)])[:n]
    return logits.requires_grad_(), labels


def softmax(z):
    total = sum(math.exp(v) for v in z)
    return [math.exp(v) / total for v in z]


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def smoothed_ce(z, y, e=0.0):
    log_p = [math.log(p) for p in softmax(z)]
    return -sum(((1 - e) * (c == y) + e / len(z)) * v for c, v in enumerate(log_p))


def adjusted_ce(z, y, n, tau, gamma=0.0, e=0.0):
    pi = [m / sum(n) for m in n]
    delta = [(m / max(n)) ** gamma for m in n]
    return smoothed_ce(
        [d * v + tau * math.log(p) for d, v, p in zip(delta, z, pi, strict=True)], y, e
    )


def ldam(z, y, n, max_margin=0.5, s=30.0, e=0.0):
    margin = [m**-0.25 for m in n]
    margin = [m * max_margin / max(margin) for m in margin]
    return smoothed_ce([v - s * margin[c] * (c == y) for c, v in enumerate(z)], y, e)


def focal(z, y, gamma):
    p = softmax(z)[y]
    return -((1 - p) ** gamma) * math.log(p)


def sigmoid_focal(z, y, gamma):
    p_t = [sigmoid(v) if c == y else 1 - sigmoid(v) for c, v in enumerate(z)]
    return sum(-((1 - p) ** gamma) * math.log(p) for p in p_t)


def label_aware(z, y, n, head, tail, shape):
    t = (n[y] - min(n)) / (max(n) - min(n))
    e = {
        "concave": tail + (head - tail) * math.sin(t * math.pi / 2),
        "linear": tail + (head - tail) * t,
        "convex": head + (head - tail) * math.sin(1.5 * math.pi + t * math.pi / 2),
    }[shape]
    return smoothed_ce(z, y, e)


def seesaw_factors(z, y, n, p, q, eps):
    sigma = softmax(z)
    factors = []
    for c in range(len(z)):
        mitigation = (n[c] / n[y]) ** p if n[y] > n[c] else 1.0
        ratio = sigma[c] / max(sigma[y], eps)
        factors.append(1.0 if c == y else mitigation * (ratio**q if ratio > 1 else 1.0))
    return factors


def seesaw(z, y, n, p=0.8, q=2.0, eps=0.01):
    s = seesaw_factors(z, y, n, p, q, eps)
    return -math.log(math.exp(z[y]) / sum(f * math.exp(v) for f, v in zip(s, z, strict=True)))


# name, options, (z, y, n) -> the loss of an image
FORMULAS = [
    ("ce", {}, lambda z, y, n: smoothed_ce(z, y)),
    ("ce", {"label_smoothing": 0.1}, lambda z, y, n: smoothed_ce(z, y, 0.1)),
    ("weighted-ce", {"label_smoothing": 0.2}, lambda z, y, n: smoothed_ce(z, y, 0.2)),
    ("focal", {}, lambda z, y, n: focal(z, y, 2.0)),
    ("focal", {"gamma": 0.5}, lambda z, y, n: focal(z, y, 0.5)),
    ("focal", {"form": "sigmoid"}, lambda z, y, n: sigmoid_focal(z, y, 2.0)),
    ("focal", {"form": "sigmoid", "gamma": 0.5}, lambda z, y, n: sigmoid_focal(z, y, 0.5)),
    ("cb", {}, lambda z, y, n: sigmoid_focal(z, y, 1.0)),
    ("cb", {"base": "softmax"}, lambda z, y, n: smoothed_ce(z, y)),
    ("cb", {"base": "sigmoid"}, lambda z, y, n: sigmoid_focal(z, y, 0.0)),
    ("ldam", {}, lambda z, y, n: ldam(z, y, n)),
    (
        "ldam",
        {"max_margin": 0.3, "scale": 10.0, "label_smoothing": 0.1},
        lambda z, y, n: ldam(z, y, n, 0.3, 10.0, 0.1),
    ),
    ("balanced-softmax", {}, lambda z, y, n: adjusted_ce(z, y, n, 1.0)),
    ("balanced-softmax", {"label_smoothing": 0.1}, lambda z, y, n: adjusted_ce(z, y, n, 1, e=0.1)),
    ("logit-adjust", {}, lambda z, y, n: adjusted_ce(z, y, n, 1.0)),
    (
        "logit-adjust",
        {"tau": 2.25, "label_smoothing": 0.1},
        lambda z, y, n: adjusted_ce(z, y, n, 2.25, e=0.1),
    ),
    ("vs", {}, lambda z, y, n: adjusted_ce(z, y, n, 1.25, 0.15)),
    (
        "vs",
        {"gamma": 0.3, "tau": 1.0, "label_smoothing": 0.1},
        lambda z, y, n: adjusted_ce(z, y, n, 1.0, 0.3, 0.1),
    ),
    ("label-aware-smoothing", {}, lambda z, y, n: label_aware(z, y, n, 0.3, 0.0, "concave")),
    *[
        (
            "label-aware-smoothing",
            {"head": 0.4, "tail": 0.1, "shape": shape},
            lambda z, y, n, shape=shape: label_aware(z, y, n, 0.4, 0.1, shape),
        )
        for shape in ("concave", "linear", "convex")
    ],
    ("seesaw", {}, lambda z, y, n: seesaw(z, y, n)),
    ("seesaw", {"p": 0.3, "q": 0.0}, lambda z, y, n: seesaw(z, y, n, 0.3, 0.0)),
    ("seesaw", {"p": 0.0, "eps": 0.2}, lambda z, y, n: seesaw(z, y, n, 0.0, 2.0, 0.2)),
]
OPTIONS = [(name, options) for name, options, _ in FORMULAS]


def test_every_loss_has_its_formula_here():
    assert {name for name, _ in OPTIONS} == set(NAMES)


@pytest.mark.parametrize(("name", "options", "formula"), FORMULAS)
def test_a_loss_is_its_papers_formula(name, options, formula):
    logits, labels = batch()
    ours = losses.build(name, COUNTS, **options).per_image(logits, labels)
    theirs = [formula(z, y, COUNTS) for z, y in zip(logits.tolist(), labels.tolist(), strict=True)]
    assert ours.tolist() == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("weights", ["none", "inverse", "effective"])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_batch_is_a_weighted_mean_of_its_images(name, options, weights):
    logits, labels = batch()
    loss = losses.build(name, COUNTS, weights=weights, beta=0.99, **options)
    rule = {
        "none": lambda n: 1.0,
        "inverse": lambda n: 1 / n,
        "effective": lambda n: (1 - 0.99) / (1 - 0.99**n),
    }[weights]
    by_class = [rule(n) for n in COUNTS]
    by_class = [w * len(COUNTS) / sum(by_class) for w in by_class]
    weight = [by_class[y] for y in labels.tolist()]
    values = loss.per_image(logits, labels).tolist()
    total = sum(w * value for w, value in zip(weight, values, strict=True))
    expected = total / (len(labels) if name == "cb" else sum(weight))
    assert loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name, options in OPTIONS if name != "seesaw"]
)
def test_gradients_are_those_of_the_formula(name, options):
    logits, labels = batch(n=7)
    assert gradcheck(losses.build(name, COUNTS, **options), (logits, labels))


@pytest.mark.parametrize("eps", [0.01, 0.3])
def test_seesaws_factors_have_no_gradient(eps):
    logits, labels = batch(scale=3.0)
    loss = losses.build("seesaw", COUNTS, eps=eps).per_image
    ours = torch.autograd.grad(loss(logits, labels).sum(), logits)[0]
    rows = zip(logits.tolist(), labels.tolist(), strict=True)
    factors = torch.tensor([seesaw_factors(z, y, COUNTS, 0.8, 2.0, eps) for z, y in rows])
    shares = (factors * logits.exp()).log().softmax(1) - F.one_hot(labels, len(COUNTS))
    torch.testing.assert_close(ours, shares.detach(), rtol=1e-5, atol=1e-7)
    assert (factors > 1).any()  # the network errs somewhere
    assert (factors < 1).any()


@pytest.mark.parametrize(
    ("name", "options", "counts"),
    [
        ("weighted-ce", {}, BALANCED),
        ("ce", {"weights": "effective"}, BALANCED),
        ("cb", {"base": "softmax"}, BALANCED),
        ("balanced-softmax", {}, BALANCED),
        ("logit-adjust", {"tau": 1.7}, BALANCED),
        ("vs", {}, BALANCED),
        ("logit-adjust", {"tau": 0.0}, COUNTS),
        ("vs", {"tau": 0.0, "gamma": 0.0}, COUNTS),
        ("focal", {"gamma": 0.0}, COUNTS),
        ("cb", {"base": "softmax", "beta": 0.0}, COUNTS),
        ("ce", {"weights": "effective", "beta": 0.0}, COUNTS),
        ("weighted-ce", {"weights": "none"}, COUNTS),
        ("seesaw", {"p": 0.0, "q": 0.0}, COUNTS),
        ("seesaw", {"q": 0.0}, BALANCED),
        ("label-aware-smoothing", {"head": 0.0, "tail": 0.0}, COUNTS),
        ("ldam", {"max_margin": 0.0}, COUNTS),
    ],
)
def test_in_the_limit_it_is_cross_entropy(name, options, counts):
    logits, labels = batch(n=40)
    ours, theirs = (
        losses.build(name, counts, **options)(logits, labels),
        F.cross_entropy(logits, labels),
    )
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(v, logits) for v in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["ce", "balanced-softmax", "logit-adjust", "vs", "weighted-ce"])
def test_label_smoothing_is_torchs(name):
    logits, labels = batch(n=40)
    ours = losses.build(name, BALANCED, label_smoothing=0.1)(logits, labels)
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, label_smoothing=0.1))
    equal = losses.build("label-aware-smoothing", BALANCED, head=0.1, tail=0.7)(logits, labels)
    torch.testing.assert_close(ours, equal)


def test_logit_adjustment_contains_balanced_softmax_and_is_contained_in_vector_scaling():
    logits, labels = batch()
    one, two, three = (
        losses.build(name, COUNTS, **options)(logits, labels)
        for name, options in [
            ("balanced-softmax", {}),
            ("logit-adjust", {"tau": 1.0}),
            ("vs", {"gamma": 0.0, "tau": 1.0}),
        ]
    )
    assert torch.equal(one, two)
    torch.testing.assert_close(two, three)


@pytest.mark.parametrize("images", [1, 2, 100, 128, 257])
@pytest.mark.parametrize("autocast", [False, True])
def test_cross_entropy_is_torchs_bit_for_bit(images, autocast):
    dtype = torch.bfloat16 if autocast else torch.float32
    logits, labels = batch(images, classes=10, dtype=torch.float32)
    ours, theirs = (logits.detach().to(dtype).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = losses.build("ce", CIFAR10_LT)(ours, labels)
        expected = F.cross_entropy(theirs, labels)
    assert loss.dtype == expected.dtype == torch.float32
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("images", [1, 100, 257])
@pytest.mark.parametrize("scheme", ["inverse", "effective"])
def test_the_weighted_mean_is_torchs_bit_for_bit(images, scheme):
    logits, labels = batch(images, classes=10, dtype=torch.float32)
    weight = losses.class_weights(CIFAR10_LT, scheme).float()
    loss = losses.build("ce", CIFAR10_LT, weights=scheme)
    assert torch.equal(loss(logits, labels), F.cross_entropy(logits, labels, weight=weight))


def test_class_balanced_losses_divide_by_the_images():
    logits, _ = batch(n=6)
    head, tail = torch.zeros(6, dtype=torch.int64), torch.full((6,), 4)
    loss = losses.build("cb", COUNTS, base="softmax")
    for labels in (head, tail):
        weight = loss.class_weight[labels[0]].double()
        torch.testing.assert_close(loss(logits, labels), weight * F.cross_entropy(logits, labels))


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_logits_are_computed_in_float32(name):
    logits, labels = batch(dtype=torch.float32)
    low = logits.detach().bfloat16().requires_grad_()
    loss = losses.build(name, COUNTS)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(low, labels)
    assert torch.equal(value, loss(low.float(), labels))
    assert value.dtype == torch.float32
    value.backward()
    assert low.grad.dtype == torch.bfloat16
    assert loss(logits.double(), labels).dtype == torch.float64


def test_margins_and_weights_at_cifar10_lt():
    margin = losses.build("ldam", CIFAR10_LT).per_image.margin
    assert [round(m, 3) for m in margin[[0, -1]].tolist()] == [0.158, 0.5]
    weight = losses.build("cb", CIFAR10_LT).class_weight
    assert weight.dtype == torch.float32
    assert weight.sum().item() == pytest.approx(10)
    assert round(weight[0].item(), 4) == 0.0506
    assert round(weight[-1].item(), 2) == 3.99
    inverse = losses.build("weighted-ce", CIFAR10_LT).class_weight
    assert (inverse[-1] / inverse[0]).item() == pytest.approx(100)
    smoothing = losses.build("label-aware-smoothing", CIFAR10_LT).per_image.smoothing
    assert smoothing[[0, -1]].tolist() == pytest.approx([0.3, 0.0], abs=1e-7)


@pytest.mark.parametrize("beta", [0.9, 0.9999, 1 - 1e-9, 1 - 1e-15])
def test_effective_weights_lose_no_digits(beta):
    counts = [1, 17, 10**6, 10**9, 10**12]
    with localcontext() as context:
        context.prec = 60
        exact = [1 / (1 - Decimal(beta) ** n) for n in counts]
        expected = [float(5 * w / sum(exact)) for w in exact]
    weight = losses.class_weights(counts, "effective", beta)
    assert weight.tolist() == pytest.approx(expected, rel=1e-12)


counts_of = st.lists(st.integers(1, 10**6), min_size=2, max_size=12)


@given(counts_of, st.sampled_from(["none", "inverse", "effective"]), st.randoms())
@settings(max_examples=60, deadline=None)
def test_weights_belong_to_classes(counts, scheme, random):
    weight = losses.class_weights(counts, scheme).tolist()
    assert sum(weight) == pytest.approx(len(counts))
    order = list(range(len(counts)))
    random.shuffle(order)
    permuted = losses.class_weights([counts[i] for i in order], scheme).tolist()
    assert permuted == pytest.approx([weight[i] for i in order])
    by_count = [w for _, w in sorted(zip(counts, weight, strict=True))]
    assert all(rare >= common * (1 - 1e-12) for rare, common in pairwise(by_count))


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_loss_does_not_know_the_names_of_classes(name, options):
    logits, labels = batch()
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = losses.build(name, [COUNTS[i] for i in order], **options)
    torch.testing.assert_close(
        permuted(logits[:, order], order.argsort()[labels]),
        losses.build(name, COUNTS, **options)(logits, labels),
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, options)
        for name, options in [*OPTIONS, ("vs", {"gamma": 0.0})]
        if options.get("form") != "sigmoid"
        and not (name == "cb" and options.get("base") != "softmax")
        and not (name == "vs" and options.get("gamma") != 0)  # which scales each logit by itself
    ],
)
@pytest.mark.parametrize("constant", [-300.0, 7.0])
def test_a_softmax_does_not_see_a_constant(name, options, constant):
    logits, labels = batch()
    loss = losses.build(name, COUNTS, **options)
    torch.testing.assert_close(loss(logits + constant, labels), loss(logits, labels))


@given(
    counts_of,
    st.sampled_from(OPTIONS),
    st.sampled_from([1.0, 100.0, 1e4, 1e30]),
    st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_losses_and_gradients_are_finite_and_losses_not_negative(counts, choice, scale, seed):
    name, options = choice
    logits, labels = batch(6, len(counts), seed, scale, torch.float32)
    logits = logits.detach().bfloat16().requires_grad_()
    loss = losses.build(name, counts, **options)
    assert (loss.per_image(logits.float(), labels) >= 0).all()
    value = loss(logits, labels)
    value.backward()
    assert value.isfinite()
    assert value >= 0
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("options", [{"form": "softmax"}, {"form": "sigmoid"}])
def test_focal_losses_are_at_rest_where_the_answer_is_certain(options, gamma):
    logits = torch.tensor([[200.0, -200.0, -200.0]], requires_grad=True)
    loss = losses.build("focal", [5, 3, 2], gamma=gamma, **options)(logits, torch.tensor([0]))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("epochs", [10, 200, 400])
def test_deferred_weights_set_in_after_their_part_of_the_epochs(epochs):
    loss = losses.build("ldam", CIFAR10_LT, weights="effective", drw_start=0.8)
    assert torch.equal(loss.active_weight, torch.ones(10))
    weighted = []
    for epoch in range(1, epochs + 1):
        loss.set_progress((epoch - 1) / epochs)
        assert any(torch.equal(loss.active_weight, w) for w in (loss.class_weight, torch.ones(10)))
        weighted.append(torch.equal(loss.active_weight, loss.class_weight))
    assert weighted.index(True) + 1 == {10: 9, 200: 161, 400: 321}[epochs]
    assert all(weighted[weighted.index(True) :])


def test_deferred_weights_are_a_loss_without_and_then_with_weights():
    logits, labels = batch(classes=10)
    plain, weighted, deferred = (
        losses.build("focal", CIFAR10_LT, **options)
        for options in ({}, {"weights": "effective"}, {"weights": "effective", "drw_start": 0.5})
    )
    deferred.set_progress(0.49)
    assert torch.equal(deferred(logits, labels), plain(logits, labels))
    deferred.set_progress(0.5)
    assert torch.equal(deferred(logits, labels), weighted(logits, labels))
    deferred.set_progress(0.0)
    assert torch.equal(deferred(logits, labels), plain(logits, labels))


@pytest.mark.parametrize("part", [i / 20 for i in range(21)])
def test_a_deferred_start_is_not_missed_by_rounding(part):
    loss = losses.build("weighted-ce", COUNTS, drw_start=part)
    loss.set_progress(1 - (20 - round(20 * part)) / 20)
    assert torch.equal(loss.active_weight, loss.class_weight)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_saves_and_learns_nothing_and_has_float32_buffers(name):
    loss = losses.build(name, COUNTS)
    assert not loss.state_dict()
    assert not list(loss.parameters())
    assert {b.dtype for b in loss.buffers()} == {torch.float32}


def test_what_a_loss_asks_of_the_classifier():
    asks = {name: losses.build(name, COUNTS) for name in NAMES}
    assert {name: a.cosine_scale for name, a in asks.items() if a.cosine_scale} == {"ldam": 30.0}
    assert losses.build("ldam", COUNTS, scale=12.0).cosine_scale == 12.0
    with_bias = [name for name, a in asks.items() if a.initial_bias is not None]
    assert with_bias == ["cb"]
    for loss in (asks["cb"], losses.build("focal", COUNTS, form="sigmoid")):
        assert sigmoid(loss.initial_bias) == pytest.approx(1 / len(COUNTS))
    assert losses.build("cb", COUNTS, base="softmax").initial_bias is None


@pytest.mark.parametrize("name", NAMES)
def test_a_class_without_images_is_refused(name):
    with pytest.raises(ValueError, match="at least one training image"):
        losses.build(name, [5, 0, 3])


def test_weights_that_make_no_sense_are_refused():
    with pytest.raises(UsageError, match="'ce' has no class weights"):
        losses.build("ce", COUNTS, drw_start=0.8)
    with pytest.raises(UsageError, match="unknown loss 'ldm'"):
        losses.build("ldm", COUNTS)
    with pytest.raises(ValueError, match="beta"):
        losses.class_weights(COUNTS, "effective", 1.0)
    with pytest.raises(ValueError, match="not 'sqrt'"):
        losses.class_weights(COUNTS, "sqrt")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipes_options_build_the_loss(name):
    options = validate({"loss": {"name": name}}).loss.options
    assert losses.build(name, COUNTS, **options)(*batch()).isfinite()


@pytest.mark.parametrize(
    ("loss", "option"),
    [
        ({"name": "cb", "base": "softmax", "gamma": 2.0}, "gamma"),
        ({"name": "cb", "base": "sigmoid", "gamma": 0.5}, "gamma"),
        ({"name": "label-aware-smoothing", "head": 0.2, "tail": 0.2, "shape": "linear"}, "shape"),
        ({"name": "seesaw", "q": 0.0, "eps": 0.1}, "eps"),
        ({"name": "ce", "label_smoothing": 1.0}, "label_smoothing"),
        ({"name": "focal", "gamma": -1.0}, "gamma"),
        ({"name": "ldam", "scale": 0.0}, "scale"),
    ],
)
def test_options_without_effect_or_sense_are_mistakes(loss, option):
    with pytest.raises(UsageError, match=rf"loss\.{option}: "):
        validate({"loss": loss})


def cosine(scale=30.0, seed=0):
    torch.manual_seed(seed)
    return models.CosineLinear(6, 4, scale).double()


def test_a_cosine_classifier_is_the_scaled_cosine():
    layer, x = cosine(7.0), torch.randn(5, 6, dtype=torch.float64)
    expected = 7 * F.cosine_similarity(x[:, None], layer.weight[None], dim=2)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(4, dtype=torch.float64))
    assert layer.bias is None
    assert list(layer.state_dict()) == ["weight"]


@given(
    st.integers(0, 2**31),
    st.lists(st.floats(1e-2, 1e6), min_size=5, max_size=5),
    st.lists(st.floats(1e-2, 1e6), min_size=4, max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_a_cosine_classifier_sees_directions_only(seed, lengths, weight_lengths):
    layer, x = cosine(seed=seed), torch.randn(5, 6, dtype=torch.float64)
    y = layer(x)
    assert (y.abs() <= 30 * (1 + 1e-12)).all()
    torch.testing.assert_close(layer(x * torch.tensor(lengths)[:, None]), y)
    with torch.no_grad():
        layer.weight *= torch.tensor(weight_lengths)[:, None]
    torch.testing.assert_close(layer(x), y)


def test_a_cosine_classifiers_gradients():
    layer, x = cosine(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def outputs(x, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    assert gradcheck(outputs, (x, layer.weight))
    zero = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    y = layer(zero)
    assert not y.any()
    y.sum().backward()
    assert zero.grad.abs().max() < 1e8


def test_ldam_on_a_cosine_classifier_is_the_papers():
    model = models.build("resnet8", 10, norm_layer("bn"))
    loss = losses.build("ldam", CIFAR10_LT)
    model.fc = models.CosineLinear(64, 10, loss.cosine_scale)
    assert models.classifier(model) is model.fc
    x, labels = torch.randn(9, 64), torch.arange(9)
    cosines = F.cosine_similarity(x[:, None], model.fc.weight[None], dim=2).tolist()
    expected = 0.0
    for cos, y in zip(cosines, labels.tolist(), strict=True):
        margin = 0.5 * (CIFAR10_LT[-1] / CIFAR10_LT[y]) ** 0.25
        others = sum(math.exp(30 * v) for c, v in enumerate(cos) if c != y)
        label = math.exp(30 * (cos[y] - margin))
        expected -= math.log(label / (label + others)) / len(labels)
    assert loss(model.fc(x), labels).item() == pytest.approx(expected, rel=1e-5)
