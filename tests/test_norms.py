import copy
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture
from torch import nn

from ltnorm import registry
from ltnorm.norms import norm_layer, route
from ltnorm.norms.compound import CompoundBatchNorm
from ltnorm.norms.group import GroupNorm
from ltnorm.norms.split import SplitBatchNorm

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def images(*shape, offset=0.0, seed=0, dtype=torch.float32):
    """Images whose means differ, so that a mixture has something to find."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=dtype)
    return x * 1.5 + torch.randn(*shape[:2], 1, 1, generator=generator, dtype=dtype) + offset


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize(
    "layer",
    [
        CompoundBatchNorm(6, components=1),
        CompoundBatchNorm(6, components=1, assign="position"),
        CompoundBatchNorm(6, components=1, affine="shared", momentum=0.3),
        SplitBatchNorm(6, components=1),
    ],
)
def test_one_component_is_batch_norm(layer, offset, layout):
    # Far from zero torch's own x * scale + shift rounds to about 1e-6 of the offset.
    near = {"rtol": 1e-4, "atol": 1e-5 + 1e-6 * offset}
    layer = copy.deepcopy(layer)
    torch_layer = nn.BatchNorm2d(6, momentum=layer.momentum)
    with torch.no_grad():
        for p in (*layer.parameters(), *torch_layer.parameters()):
            p.copy_(torch.linspace(0.5, 2, 6).expand_as(p))
    for step in range(4):
        x = images(16, 6, 5, 7, offset=offset, seed=step).contiguous(memory_format=layout)
        grad = images(16, 6, 5, 7, seed=step + 100)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = layer(ours), torch_layer(theirs)
        y.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(y, expected, **near)
        torch.testing.assert_close(ours.grad, theirs.grad, **near)
        assert y.is_contiguous(memory_format=layout)
    for name in ("weight", "bias"):
        mine, other = getattr(layer, name).grad[0], getattr(torch_layer, name).grad
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(layer, name)[0], getattr(torch_layer, name))
    assert layer.num_batches_tracked == torch_layer.num_batches_tracked == 4
    x = images(3, 6, 5, 7, offset=offset, seed=9)
    torch.testing.assert_close(layer.eval()(x), torch_layer.eval()(x), **near)


def reference_step(layer, x, groups=None):
    """DESIGN's equations, term by term in float64 with [M, K, C] tensors: y and the new mixture."""
    x = x.double()
    n, c, h, w = x.shape
    points = x.permute(0, 2, 3, 1).reshape(n, h * w, c)
    tau, mu, var = (
        b.double() for b in (layer.mixing_weight, layer.running_mean, layer.running_var)
    )
    components = layer.components
    if layer.num_batches_tracked == 0:
        known = points.detach()
        flat = known.reshape(-1, c)
        if groups is None or (groups < 0).all():
            quantiles = [NormalDist().inv_cdf((k + 0.5) / components) for k in range(components)]
            mu = flat.mean(0) + torch.tensor(quantiles).double()[:, None] * flat.std(
                0, correction=0
            )
            var = flat.var(0, correction=0).clamp_min(1e-5).expand(components, c)
        else:
            members = [known[groups == k].reshape(-1, c) for k in range(components)]
            members = [m if len(m) else flat for m in members]
            mu = torch.stack([m.mean(0) for m in members])
            var = torch.stack([m.var(0, correction=0) for m in members]).clamp_min(1e-5)
    gap = points.detach()[:, :, None] - mu
    log_density = -0.5 * (gap.square() / var + var.log() + math.log(2 * math.pi)).sum(-1)
    if layer.assign == "image":
        log_density = log_density.mean(1, keepdim=True).expand(n, h * w, components)
    prior = tau if layer.prior == "weights" else torch.ones_like(tau)
    r = (prior.log() + log_density / (layer.temperature * math.sqrt(c))).softmax(-1)
    if groups is not None:
        for i, group in enumerate(groups.tolist()):
            if group >= 0:
                r[i] = torch.eye(components, dtype=torch.float64)[group]
    r = r.reshape(-1, components)
    flat = points.reshape(-1, c)
    positions = len(flat)
    n0 = (1.0 if layer.pseudo_count is None else layer.pseudo_count) * h * w
    n0 = max(n0, 1e-6 * h * w)
    count = r.sum(0)[:, None]
    m = (r.T @ flat + n0 * mu) / (count + n0)
    spread = torch.einsum("ik,ikc->kc", r, (flat[:, None] - m).square())
    v = (spread + n0 * (var + (mu - m).square())) / (count + n0)
    normalized = (flat[:, None] - m) / (v + layer.eps).sqrt()
    y = torch.einsum("ik,ikc->ic", r, layer.weight.double() * normalized + layer.bias.double())
    a, f = layer.momentum, count[:, 0] / positions
    new_tau = ((1 - a) * tau + a * f).clamp_min(1e-4)
    new_tau = new_tau / new_tau.sum()
    centred = flat.detach()[:, None] - mu
    rate = (a / new_tau)[:, None]
    step = rate * torch.einsum("ik,ikc->kc", r, centred) / positions
    second = torch.einsum("ik,ikc->kc", r, centred.square()) / positions
    new_var = (var + rate * (second - f[:, None] * var) - step.square()).clamp_min(1e-5)
    y = y.reshape(n, h, w, c).permute(0, 3, 1, 2)
    return y, new_tau, mu + step, new_var


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(2, 6),
    c=st.integers(1, 5),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    components=st.integers(2, 4),
    assign=st.sampled_from(["image", "position"]),
    affine=st.sampled_from(["component", "shared"]),
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
    prior=st.sampled_from(["weights", "uniform"]),
    pseudo_count=st.sampled_from([None, 0.0, 2.5]),
    routed=st.sampled_from(["none", "some", "all"]),
    seed=st.integers(0, 10**6),
)
def test_a_training_step_is_the_equations(
    n, c, size, components, assign, affine, temperature, prior, pseudo_count, routed, seed
):
    layer = CompoundBatchNorm(
        c,
        components=components,
        assign=assign,
        affine=affine,
        temperature=temperature,
        prior=prior,
        pseudo_count=pseudo_count,
    ).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    for step in range(3):
        x = images(n, c, *size, seed=seed + step, dtype=torch.float64).requires_grad_()
        low = {"none": None, "some": -1, "all": 0}[routed]
        groups = low if low is None else torch.randint(low, components, (n,), generator=generator)
        expected, *mixture = reference_step(layer, x, groups)
        with route(layer, groups if groups is not None else torch.full((n,), -1)):
            y = layer(x)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7)
        grad = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        inputs = (x, layer.weight, layer.bias)
        for ours, theirs in zip(
            torch.autograd.grad(y, inputs, grad),
            torch.autograd.grad(expected, inputs, grad),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        for name, value in zip(
            ("mixing_weight", "running_mean", "running_var"), mixture, strict=True
        ):
            torch.testing.assert_close(
                getattr(layer, name), value.detach(), rtol=1e-5, atol=1e-6, msg=name
            )


@pytest.mark.parametrize("components", [1, 3])
def test_gradcheck(components):
    """With every image routed r is constant, so finite differences see the whole gradient."""
    layer = CompoundBatchNorm(3, components=components).double()
    layer(images(8, 3, 2, 2, dtype=torch.float64))
    groups = torch.tensor([0, 1 % components, 2 % components, 0])

    def forward(x, weight, bias):
        fresh = copy.deepcopy(layer)  # a step changes the running moments, which enter the next
        with route(fresh, groups):
            return torch.func.functional_call(fresh, {"weight": weight, "bias": bias}, x)

    x = images(4, 3, 2, 2, seed=5, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(forward, (x, *layer.parameters()))


def test_em_recovers_a_known_mixture():
    rng = np.random.default_rng(0)
    weights = np.array([0.6, 0.3, 0.1])
    means = np.array([[-2.0, 0.0], [1.0, 2.0], [3.5, -1.5]])
    deviations = np.array([[0.6, 0.9], [0.8, 0.4], [0.5, 0.7]])

    def draw(count):
        k = rng.choice(3, size=count, p=weights)
        return means[k] + deviations[k] * rng.normal(size=(count, 2))

    layer = CompoundBatchNorm(
        2,
        components=3,
        assign="position",
        temperature=1 / math.sqrt(2),
        pseudo_count=0,
        momentum=0.02,
    )
    seen = []
    for _ in range(600):
        batch = draw(512)
        seen.append(batch)
        layer(torch.from_numpy(batch).float().reshape(8, 64, 2).permute(0, 2, 1).unsqueeze(3))
    fitted = GaussianMixture(3, covariance_type="diag", random_state=0).fit(
        np.concatenate(seen[-60:])
    )
    order, theirs = layer.running_mean[:, 0].argsort(), fitted.means_[:, 0].argsort()
    for ours, sklearns, true, tolerance in (
        (layer.mixing_weight, fitted.weights_, weights, 0.02),
        (layer.running_mean, fitted.means_, means, 0.08),
        (layer.running_var, fitted.covariances_, deviations**2, 0.08),
    ):
        assert np.abs(ours[order].numpy() - sklearns[theirs]).max() < tolerance
        assert np.abs(ours[order].numpy() - true).max() < tolerance


@pytest.mark.parametrize("assign", ["image", "position"])
def test_components_without_a_route_do_not_stay_equal(assign):
    layer = CompoundBatchNorm(4, components=3, assign=assign)
    for step in range(20):
        layer(images(32, 4, 4, 4, seed=step))
    distances = torch.pdist(layer.running_mean)
    assert distances.min() > 0.1


def trained(name, **options):
    layer = norm_layer(name, **options)(6)
    for step in range(5):
        with route(layer, torch.arange(12) % getattr(layer, "components", 1)):
            layer(images(12, 6, 4, 4, seed=step, offset=2))
    return layer.eval()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bn", {}),
        ("gn", {}),
        ("compound", {"components": 3}),
        ("compound", {"components": 3, "assign": "position"}),
        ("split", {"components": 3}),
        ("split", {"components": 3, "evaluation": "balanced"}),
        ("split", {"components": 3, "evaluation": "posterior"}),
        *((name, {}) for name in registry.NORMS if name not in ("bn", "gn", "compound", "split")),
    ],
)
def test_evaluation_does_not_depend_on_the_batch_or_a_route(name, options):
    layer = trained(name, **options)
    x = images(9, 6, 4, 4, seed=50, offset=2)
    state = copy.deepcopy(layer.state_dict())
    together = layer(x)
    alone = torch.cat([layer(x[i : i + 1]) for i in range(9)])
    with route(layer, torch.zeros(9, dtype=torch.long)):
        routed = layer(x)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together, routed, rtol=0, atol=0)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("assign", ["image", "position"])
@pytest.mark.parametrize("pseudo_count", [None, 0.0])
def test_empty_groups_and_components_give_no_nan(assign, pseudo_count):
    layer = CompoundBatchNorm(4, components=4, assign=assign, pseudo_count=pseudo_count)
    for step, groups in enumerate([[0] * 8, [1, 1, 1, 1, 0, 0, 0, 0], [3] * 8, [-1] * 8]):
        x = images(8, 4, 3, 3, seed=step).requires_grad_()
        with route(layer, torch.tensor(groups)):
            y = layer(x)
        y.square().sum().backward()
        assert y.isfinite().all()
        assert x.grad.isfinite().all()
    for value in layer.state_dict().values():
        assert value.isfinite().all()
    # A constant image has no variance at all.
    layer(torch.ones(8, 4, 3, 3))
    assert layer(torch.ones(8, 4, 3, 3)).isfinite().all()


@pytest.mark.parametrize("assign", ["image", "position"])
def test_evaluation_holds_responsibilities_constant(assign):
    layer = trained("compound", components=2, assign=assign)
    x = images(3, 6, 4, 4, seed=9, offset=2).requires_grad_()
    y = layer(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    # y = scale(r) x + offset(r): with r constant the gradient is the scale, which is positive.
    scale = layer.weight * torch.rsqrt(layer.running_var + layer.eps)
    low, high = scale.amin(0)[:, None, None] - 1e-5, scale.amax(0)[:, None, None] + 1e-5
    assert ((grad >= low) & (grad <= high)).all()


def test_an_empty_group_uses_its_running_moments():
    layer = SplitBatchNorm(3, components=2)
    for step in range(30):
        with route(layer, torch.tensor([0] * 6 + [1] * 2)):
            x = images(8, 3, 4, 4, seed=step)
            x[6:] += 10
            layer(x)
    before = layer.running_mean[1].clone()
    assert before.mean() > 8
    with route(layer, torch.zeros(8, dtype=torch.long)):
        layer(images(8, 3, 4, 4))
    torch.testing.assert_close(layer.running_mean[1], before)


def test_split_normalizes_each_group_by_itself():
    layer = SplitBatchNorm(3, components=2, pseudo_count=0)
    x = images(12, 3, 4, 4)
    x[6:] = 5 * x[6:] + 40
    with route(layer, torch.tensor([0] * 6 + [1] * 6)):
        y = layer(x)
    for part in (y[:6], y[6:]):
        torch.testing.assert_close(part.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(
            part.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-3, rtol=0
        )


def test_split_pooled_evaluation_is_the_law_of_total_variance():
    """With momentum 1 the running moments are those of the batch, so pooled is plain BatchNorm."""
    layer = SplitBatchNorm(3, components=2, momentum=1.0)
    x = images(20, 3, 4, 4)
    x[14:] = 3 * x[14:] + 7
    with route(layer, torch.tensor([0] * 14 + [1] * 6)):
        layer(x)
    y = layer.eval()(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-3, rtol=0)


def test_split_needs_a_route_to_train_and_none_to_evaluate():
    layer = SplitBatchNorm(4, components=2)
    with pytest.raises(RuntimeError, match=r"with ltnorm\.norms\.route"):
        layer(images(4, 4, 2, 2))
    assert layer.eval()(images(4, 4, 2, 2)).isfinite().all()


def test_split_affine_per_group_needs_the_posterior():
    SplitBatchNorm(4, components=2, affine="component", evaluation="posterior")
    with pytest.raises(ValueError, match="posterior"):
        SplitBatchNorm(4, components=2, affine="component")


def test_route_is_cleared_also_after_an_error():
    model = nn.Sequential(CompoundBatchNorm(3), nn.Sequential(SplitBatchNorm(3)))
    seen = []

    def fail():
        seen.append(model[1][0].routed.tolist())
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), route(model, torch.tensor([0, 1])):
        fail()
    assert seen == [[0, 1]]
    assert model[0].routed is None
    assert model[1][0].routed is None


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (torch.tensor([0, 2]), r"-1 \.\. 1"),
        (torch.tensor([-2, 0]), r"-1 \.\. 1"),
        (torch.tensor([0.0, 1.0]), "int64"),
        (torch.tensor([[0, 1]]), "int64"),
    ],
)
def test_route_refuses_bad_groups(groups, message):
    with pytest.raises(ValueError, match=message), route(CompoundBatchNorm(3), groups):
        pass


def test_a_route_of_another_length_is_refused():
    layer = CompoundBatchNorm(3)
    with (
        pytest.raises(ValueError, match="2 groups for a batch of 4"),
        route(layer, torch.zeros(2).long()),
    ):
        layer(images(4, 3, 2, 2))


@pytest.mark.parametrize("name", ["compound", "split"])
def test_wrong_shapes_are_refused(name):
    layer = norm_layer(name)(4)
    for shape in [(2, 3, 4, 4), (2, 3, 4), (4,), (2, 4, 2, 2, 2)]:
        with pytest.raises(ValueError, match=r"expects \[N, 4\], .* or \[N, 4, H, W\], got"):
            layer(torch.zeros(shape))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.zeros(1, 4, 1, 1))


@pytest.mark.parametrize("name", list(registry.NORMS))
def test_state_dict_round_trip(name):
    layer, fresh = trained(name), norm_layer(name)(6)
    x = images(4, 6, 3, 3)
    if list(layer.buffers()):  # without running statistics a fresh layer is the trained one
        assert not torch.equal(fresh.eval()(x), layer(x))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.eval()(x), layer(x))


@pytest.mark.parametrize("assign", ["image", "position"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_float32_under_low_precision(assign, dtype):
    """bf16 input far from zero: the output errs by the input's rounding, not by a cancellation."""
    layer = CompoundBatchNorm(4, components=2, assign=assign)
    x = images(16, 4, 6, 6, offset=30).to(dtype)
    exact = copy.deepcopy(layer)(x.double().float())
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    assert layer.running_mean.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("name", ["compound", "split"])
@pytest.mark.parametrize("module", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_float_type_of_module_and_input(name, module, dtype):
    layer = norm_layer(name)(4).to(module)
    x = images(6, 4, 3, 3).to(dtype)
    with route(layer, torch.tensor([0, 1, 0, 1, 0, 1])):
        y = layer(x)
    assert y.dtype == layer.eval()(x).dtype == dtype
    torch.testing.assert_close(y.mean((0, 2, 3)).float(), torch.zeros(4), atol=0.2, rtol=0)


@pytest.mark.parametrize("assign", ["image", "position"])
def test_compiles_as_one_graph(assign):
    torch._dynamo.reset()
    layer = CompoundBatchNorm(4, components=2, assign=assign)
    reference = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for step in range(3):
        x, groups = images(6, 4, 3, 3, seed=step), torch.tensor([0, 1, -1, -1, 0, 1])
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        with route(layer, groups), route(reference, groups):
            ours, theirs = compiled(inputs[0]), reference(inputs[1])
        torch.testing.assert_close(ours, theirs)
        ours.square().sum().backward()
        theirs.square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(layer.weight.grad, reference.weight.grad, rtol=1e-3, atol=1e-3)
    layer.eval(), reference.eval()
    torch.testing.assert_close(compiled(x), reference(x))


@pytest.mark.parametrize(
    ("channels", "groups"), [(3, 1), (6, 1), (16, 4), (32, 8), (64, 16), (128, 32), (512, 32)]
)
def test_group_norm_suits_narrow_layers(channels, groups):
    layer = GroupNorm(channels)
    assert layer.num_groups == groups
    assert torch.equal(
        layer(images(2, channels, 3, 3)), nn.GroupNorm(groups, channels)(images(2, channels, 3, 3))
    )


def test_norm_layer_checks_options():
    with pytest.raises(ValueError, match="components"):
        norm_layer("compound", components=0)
    with pytest.raises(ValueError, match="colour"):
        norm_layer("bn", colour="red")
