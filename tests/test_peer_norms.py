"""The norms that compound BN is compared with, each against an independent computation."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.mixture import GaussianMixture
from timm.layers import FilterResponseNormTlu2d
from torch import nn
from torch.utils.checkpoint import checkpoint

from ltnorm import registry
from ltnorm.models import build
from ltnorm.norms import norm_layer, route
from ltnorm.norms.balanced import BalancedBatchNorm
from ltnorm.norms.group import InstanceNorm, LayerNorm
from ltnorm.norms.identity import Identity
from ltnorm.norms.mixture import MixtureNorm
from ltnorm.norms.mode import ModeNorm
from ltnorm.norms.nbn import NormalizedBatchNorm
from ltnorm.norms.renorm import BatchRenorm
from ltnorm.norms.response import FilterResponseNorm

C = 5


def images(n=8, seed=0, offset=3.0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, C, 4, 3, generator=rng, dtype=dtype)
    return x + offset + torch.randn(n, C, 1, 1, generator=rng, dtype=dtype)


def with_affine(layer):
    """The layer in float64 with weights that are not those of a fresh one."""
    layer = layer.double()
    rng = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=rng, dtype=p.dtype))
    return layer


def assert_same(layer, function, x, rtol=1e-9, atol=1e-9):
    """Outputs, and gradients of the input and of all parameters, of a layer and a formula."""
    parameters = list(layer.parameters())
    weight = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    answers = []
    for f in (layer, function):
        inputs = x.clone().requires_grad_()
        y = f(inputs)
        answers.append([y, *torch.autograd.grad((y * weight).sum(), [inputs, *parameters])])
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def test_layer_norm_is_over_all_of_an_image():
    layer = with_affine(LayerNorm(C))

    def formula(x):
        y = F.layer_norm(x, x.shape[1:])
        return y * layer.weight[:, None, None] + layer.bias[:, None, None]

    assert_same(layer, formula, images())


def test_instance_norm_is_torchs():
    layer = with_affine(InstanceNorm(C))
    assert_same(layer, lambda x: F.instance_norm(x, weight=layer.weight, bias=layer.bias), images())
    with pytest.raises(ValueError, match="more than 1 position per image"):
        layer(images()[:, :, :1, :1])


@pytest.mark.parametrize("tlu", [False, True])
def test_filter_response_norm_is_timms(tlu):
    layer = with_affine(FilterResponseNorm(C, tlu=tlu, eps=1e-5))
    peer = FilterResponseNormTlu2d(C, apply_act=tlu).double()
    peer.weight, peer.bias = layer.weight, layer.bias
    if tlu:
        peer.tau = layer.tau
    assert_same(layer, peer, images(), rtol=1e-5, atol=1e-5)  # timm's root is float32


def test_no_norm_is_an_affine_map():
    layer = with_affine(Identity(C))
    x = images()
    assert_same(layer, lambda x: x * layer.weight[:, None, None] + layer.bias[:, None, None], x)
    bare = Identity(C, affine=False)
    assert torch.equal(bare(x), x)
    assert not list(bare.parameters())


def renorm(layer, x, r_max, d_max):
    """Algorithm 1 of the paper, with a running variance."""
    mean, deviation = x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + layer.eps).sqrt()
    running = (layer.running_var + layer.eps).sqrt()
    r = (deviation / running).clamp(1 / r_max, r_max).detach()
    d = ((mean - layer.running_mean) / running).clamp(-d_max, d_max).detach()
    shape = (1, -1, 1, 1)
    y = (x - mean.view(shape)) / deviation.view(shape) * r.view(shape) + d.view(shape)
    return y * layer.weight.view(shape) + layer.bias.view(shape)


@pytest.mark.parametrize(("steps", "opened"), [(0, 0.0), (10, 0.0), (15, 0.5), (20, 1), (99, 1)])
def test_batch_renorm_is_the_paper(steps, opened):
    layer = with_affine(BatchRenorm(C, r_max=1.3, d_max=0.4, warmup=10, ramp=10))
    layer.running_mean += 2.9
    layer.running_var *= 3
    layer.num_batches_tracked += steps
    x, limits = images(), (1 + 0.3 * opened, 0.4 * opened)
    assert_same(_Frozen(layer), lambda x: renorm(layer, x, *limits), x)
    layer(x)
    assert layer.num_batches_tracked == steps + 1


class _Frozen(nn.Module):
    """A layer whose running state a forward leaves as it was."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        state = {k: v.clone() for k, v in self.layer.named_buffers()}
        y = self.layer(x)
        for k, v in self.layer.named_buffers():
            v.data.copy_(state[k])
        return y


def test_batch_renorm_without_limits_trains_as_it_evaluates():
    layer = with_affine(BatchRenorm(C, r_max=1e9, d_max=1e9, warmup=0, ramp=0))
    layer(images(seed=1))
    expected = copy.deepcopy(layer).eval()(images(seed=2))
    torch.testing.assert_close(layer(images(seed=2)), expected)


def test_batch_renorm_begins_as_batch_norm():
    layer, peer = BatchRenorm(C).double(), nn.BatchNorm2d(C).double()
    for step in range(3):
        x = images(seed=step)
        torch.testing.assert_close(layer(x), peer(x))
    torch.testing.assert_close(layer.running_var, peer.running_var)
    torch.testing.assert_close(layer.eval()(x), peer.eval()(x))


@pytest.mark.parametrize("parameters", ["both", "weight", "bias"])
def test_nbn_is_batch_norm_by_unit_vectors(parameters):
    layer = with_affine(NormalizedBatchNorm(C, parameters=parameters))

    def formula(x):
        weight, bias = layer.weight, layer.bias
        if parameters != "bias":
            weight = layer.weight_scale * weight / weight.norm()
        if parameters != "weight":
            bias = layer.bias_scale * bias / bias.norm()
        return F.batch_norm(x, None, None, weight, bias, training=True)

    assert_same(layer, formula, images())
    y = layer(images())
    y.square().sum().backward()
    if parameters != "bias":  # a direction's length has no effect
        assert (layer.weight.grad @ layer.weight).abs() < 1e-9 * y.square().sum()


def test_nbn_begins_as_batch_norm_and_can_be_left_to_wide_layers():
    layer, peer = NormalizedBatchNorm(C).double(), nn.BatchNorm2d(C).double()
    torch.testing.assert_close(layer(images()), peer(images()))
    torch.testing.assert_close(layer.eval()(images()), peer.eval()(images()))
    narrow = NormalizedBatchNorm(C, min_channels=C + 1)
    assert {name for name, _ in narrow.named_parameters()} == {"weight", "bias"}
    assert "unit=none" in repr(narrow)


def test_balanced_is_batch_norm_of_a_batch_in_which_groups_are_equal():
    """Two images of the rare group, repeated three times, weigh what six of the other do."""
    x = images(8)
    groups = torch.tensor([0] * 6 + [1] * 2)
    layer = with_affine(BalancedBatchNorm(C, components=2, pseudo_count=0))
    repeated = torch.cat([torch.arange(8), torch.tensor([6, 7, 6, 7])])

    def balanced(x):
        with route(layer, groups):
            return layer(x)

    def formula(x):
        y = F.batch_norm(x[repeated], None, None, layer.weight[0], layer.bias[0], training=True)
        return y[:8]

    balanced(x)  # past the start
    module = _Frozen(layer)
    module.forward = balanced
    assert_same(module, formula, x, rtol=1e-5, atol=1e-5)  # pseudo_count 0 is a trace of 1e-6


def test_balanced_evaluates_with_groups_of_equal_weight():
    layer = BalancedBatchNorm(C, components=2).double()
    groups = torch.tensor([0] * 7 + [1])
    for step in range(200):
        x = images(8, seed=step) + 4.0 * groups[:, None, None, None]
        with route(layer, groups):
            y = layer(x)
    # Halfway between the groups' means, 3 and 7, and their spread of 2 beside what each has.
    middle = layer.eval()(torch.full((1, C, 2, 2), 5.0, dtype=torch.float64))
    assert middle.abs().max() < 0.2
    assert y.mean() < -0.3  # though most of a batch lies below
    with pytest.raises(RuntimeError, match="route"):
        layer.train()(x)


def mode_formula(layer, x, mean=None, var=None):
    """Image by image and mode by mode, as in the paper's algorithm."""
    gates = (x.mean((2, 3)) @ layer.gate_weight.T + layer.gate_bias).softmax(1)
    y = torch.zeros_like(x)
    for k in range(layer.components):
        g = gates[:, k, None, None, None]
        if mean is None:
            m = (g * x).mean((2, 3), keepdim=True).sum(0) / g.sum()
            v = (g * (x - m) ** 2).mean((2, 3), keepdim=True).sum(0) / g.sum()
        else:
            m, v = mean[k, :, None, None], var[k, :, None, None]
        y = y + g * (x - m) / (v + layer.eps).sqrt()
    return layer.weight[:, None, None] * y + layer.bias[:, None, None]


def test_mode_norm_is_the_paper():
    layer = with_affine(ModeNorm(C, components=3))
    assert_same(layer, lambda x: mode_formula(layer, x), images())
    x = images(seed=1)
    expected = mode_formula(layer, x, layer.running_mean, layer.running_var)
    torch.testing.assert_close(layer.eval()(x), expected)


def test_mode_norm_tracks_first_and_second_moments():
    layer = with_affine(ModeNorm(C, components=2, momentum=0.3))
    first, second = torch.zeros(2, C), torch.ones(2, C)
    for step in range(3):
        x = images(seed=step)
        layer(x)
        gates = (x.mean((2, 3)) @ layer.gate_weight.T + layer.gate_bias).softmax(1)
        gates = (gates / gates.sum(0)).T
        first = 0.7 * first + 0.3 * gates @ x.mean((2, 3))
        second = 0.7 * second + 0.3 * gates @ x.square().mean((2, 3))
    torch.testing.assert_close(layer.running_mean, first)
    torch.testing.assert_close(layer.running_var, second - first.square())


def test_mode_norm_with_one_mode_is_batch_norm():
    layer = with_affine(ModeNorm(C, components=1))

    def formula(x):
        return F.batch_norm(x, None, None, layer.weight, layer.bias, training=True) + 0 * sum(
            p.sum() for p in (layer.gate_weight, layer.gate_bias)
        )

    assert_same(layer, formula, images())


def test_a_gate_draws_nothing_from_torchs_generator():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    one = ModeNorm(C)
    assert torch.equal(torch.rand(4), expected)
    torch.manual_seed(4)
    assert not torch.equal(ModeNorm(C).gate_weight, one.gate_weight)


def clusters(n=60):
    """Three clusters in C dimensions, one an outlier in number, an image a position each."""
    rng = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(3, C, generator=rng, dtype=torch.float64)
    which = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), n, True, generator=rng)
    return centres[which] + torch.randn(n, C, generator=rng, dtype=torch.float64)


def sklearn_em(x, layer, iterations):
    """EM as scikit-learn does it, from the running mixture of the layer."""
    peer = GaussianMixture(
        layer.components,
        covariance_type="diag",
        max_iter=iterations,
        tol=0,
        reg_covar=0,
        weights_init=layer.mixing_weight / layer.mixing_weight.sum(),
        means_init=layer.running_mean,
        precisions_init=1 / layer.running_var,
    )
    return peer.fit(x)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_mixture_norm_fits_the_batch_as_scikit_learn_does():
    x, iterations = clusters(), 4
    layer = with_affine(MixtureNorm(C, components=3, iterations=iterations, momentum=1.0))
    layer(x)  # spread over the data
    layer.momentum = 1e-9  # and then left there
    start = copy.deepcopy(layer)
    posterior = torch.tensor(sklearn_em(x, start, iterations - 1).predict_proba(x))

    def formula(x):
        share = posterior / posterior.sum(0)
        y = torch.zeros_like(x)
        for k in range(3):
            mean = share[:, k] @ x
            var = share[:, k] @ (x - mean) ** 2
            p = posterior[:, k, None] / posterior[:, k].mean().sqrt()
            y = y + p * (x - mean) / (var + layer.eps).sqrt()
        return layer.weight * y + layer.bias

    assert_same(layer, formula, x, rtol=1e-4, atol=1e-5)

    fitted = sklearn_em(x, start, iterations)
    start.momentum = 1.0  # the running mixture becomes that of the batch
    start(x)
    np.testing.assert_allclose(start.running_mean, fitted.means_, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(start.running_var, fitted.covariances_, rtol=1e-4)
    np.testing.assert_allclose(start.mixing_weight, fitted.weights_, rtol=1e-5)
    scale = torch.tensor(fitted.predict_proba(x) / np.sqrt(fitted.weights_))
    apart = (x[:, None] - start.running_mean) / (start.running_var + start.eps).sqrt()
    expected = start.weight * (scale[:, :, None] * apart).sum(1) + start.bias
    torch.testing.assert_close(start.eval()(x), expected, rtol=1e-4, atol=1e-5)


def test_mixture_norm_with_one_component_is_batch_norm():
    layer = with_affine(MixtureNorm(C, components=1))
    assert_same(
        layer,
        lambda x: F.batch_norm(x, None, None, layer.weight, layer.bias, training=True),
        images(),
        rtol=1e-5,
        atol=1e-5,
    )


EVERY = list(registry.NORMS)


def groups_of(layer, n):
    return torch.arange(n) % getattr(layer, "components", 1)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(6, C), (6, C, 7), (6, C, 4, 3)])
def test_one_dimensional_inputs_are_images_of_one_row(name, shape):
    """[N, C, L] is [N, C, 1, L], and [N, C] is [N, C, 1, 1]."""
    layer = norm_layer(name)(C)
    torch.manual_seed(0)
    x = torch.randn(shape)
    if name == "in" and len(shape) == 2:
        pytest.skip("instance normalization needs more than one position")
    wide = copy.deepcopy(layer)
    image = x.reshape(6, C, *([1] * (4 - len(shape))), *shape[2:])
    for _ in range(2):
        with route(layer, groups_of(layer, 6)), route(wide, groups_of(layer, 6)):
            torch.testing.assert_close(layer(x), wide(image).reshape(shape), rtol=1e-4, atol=1e-5)
        layer.eval(), wide.eval()


@pytest.mark.parametrize("name", EVERY)
def test_every_norm_compiles_as_one_graph(name):
    """Outputs and gradients from the first step on, and from a running state that is warm.

    A compiler must not compute again, in backward, from state that the forward has moved.
    """
    torch._dynamo.reset()
    layer = norm_layer(name)(C)
    layer.momentum = 0.5
    reference = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for step in range(4):
        for trained in (layer, reference):
            if step == 3 and hasattr(trained, "num_batches_tracked"):  # beyond any warm-up
                trained.num_batches_tracked.fill_(10_000)
        x = ((1 + step // 3) * images(seed=step, dtype=torch.float32)).requires_grad_()
        answers = []
        for trained, forward in ((layer, compiled), (reference, reference)):
            with route(trained, groups_of(trained, 8)):
                y = forward(x)
            answers.append([y, *torch.autograd.grad((y**3).sum(), [x, *trained.parameters()])])
        for ours, theirs in zip(*answers, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    layer.eval(), reference.eval()
    torch.testing.assert_close(compiled(x), reference(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_every_norm_keeps_the_memory_format_and_trains_a_network(name):
    torch.manual_seed(0)
    model = build("resnet8", 3, norm_layer(name)).to(memory_format=torch.channels_last)
    formats = []
    for m in model.modules():
        if type(m).__module__.startswith("ltnorm.norms"):
            m.register_forward_hook(
                lambda m, i, y: formats.append(y.is_contiguous(memory_format=torch.channels_last))
            )
    x, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 3
    x = x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.02 if name == "none" else 0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with route(model, labels % 2):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert losses[-1] < losses[0]
    assert all(formats)
    assert len(formats) == 5 * 7
    assert model.eval()(x).isfinite().all()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_are_right_or_refused(name, use_reentrant):
    layer = norm_layer(name)(C)
    layer.momentum = 0.5
    with route(layer, groups_of(layer, 8)):
        for step in range(3):
            layer(images(seed=step, dtype=torch.float32))
    x = images(seed=9, dtype=torch.float32).requires_grad_()
    other = copy.deepcopy(layer)
    with route(other, groups_of(layer, 8)):
        expected = torch.autograd.grad((other(x) ** 3).sum(), x)[0]
    with route(layer, groups_of(layer, 8)):
        y = checkpoint(layer, x, use_reentrant=use_reentrant)
        if name in ("brn", "compound", "split", "balanced", "mixture"):
            with pytest.raises(RuntimeError, match="cannot be recomputed in backward"):
                (y**3).sum().backward()
            return
        (y**3).sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("name", EVERY)
def test_a_layer_made_in_inference_mode_trains(name):
    with torch.inference_mode():
        layer = norm_layer(name)(C)
    for p in layer.parameters():
        p.requires_grad_(False)
    with route(layer, groups_of(layer, 8)), torch.inference_mode():
        layer(images(dtype=torch.float32))
        assert layer(images(dtype=torch.float32)).isfinite().all()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, C + 1, 3, 3), "expects"),
        (torch.ones(2, C, 3, 3, dtype=torch.int64), "floating point"),
        (torch.ones(2, C, 3, 3, 3), "expects"),
    ],
)
def test_every_norm_says_what_it_expects(name, x, message):
    with pytest.raises(ValueError, match=message):
        norm_layer(name)(C)(x)


@pytest.mark.parametrize("name", ["brn"])
def test_the_state_of_torchs_batch_norm_loads(name):
    peer = nn.BatchNorm2d(C)
    peer(images(dtype=torch.float32))
    layer = norm_layer(name)(C)
    layer.load_state_dict(peer.state_dict())
    x = images(seed=1, dtype=torch.float32)
    torch.testing.assert_close(layer.eval()(x), peer.eval()(x))
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        norm_layer("compound")(C).load_state_dict(peer.state_dict())
