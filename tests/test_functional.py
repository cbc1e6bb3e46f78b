import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ltnorm.norms import norm_layer
from ltnorm.norms.functional import image_moments, matmul, normalize, normalize_reference
from ltnorm.training.build import compiled

DTYPES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


def problem(n, c, length, components, kind, dtype, last, seed=0, offset=0.0):
    """Inputs of `normalize`, with moments that are those of the responsibilities."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = draw(n, length, c).transpose(1, 2) if last else draw(n, c, length)
    x = (x * 2 + offset).to(dtype)
    r = {
        "one": None,
        "image": draw(n, components).softmax(1),
        "position": draw(n, components, length).softmax(1),
        "weighted": torch.ones(n, 1, dtype=torch.float64),
    }[kind]
    k = components if kind in ("image", "position") else 1
    work = torch.float64 if dtype == torch.float64 else torch.float32
    share = torch.full((k,), 1 / (n * length), dtype=torch.float64)
    if kind == "weighted":
        share = draw(n, 1).softmax(0) / length
    mean, var = draw(k, c), draw(k, c).exp()
    weight, bias = draw(k, c), draw(k, c)
    small = [None if t is None else t.to(work) for t in (r, share, mean, var, weight, bias)]
    shift = torch.full((c,), offset, dtype=work)
    return x, *small, shift, 1e-5


def gradients(function, inputs, grad):
    x, r, share, mean, var, weight, bias, shift, eps = inputs
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(leaves[0], r, share, mean, var, *leaves[1:], shift, eps)
    return y, *torch.autograd.grad(y, leaves, grad)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 5),
    c=st.integers(1, 6),
    length=st.integers(1, 9),
    components=st.integers(1, 4),
    kind=st.sampled_from(["one", "image", "position", "weighted"]),
    dtype=st.sampled_from(list(DTYPES)),
    last=st.booleans(),
    offset=st.sampled_from([0.0, 30.0]),
    seed=st.integers(0, 10**6),
)
def test_the_analytic_backward_is_that_of_plain_autograd(
    n, c, length, components, kind, dtype, last, offset, seed
):
    offset = offset if dtype.itemsize > 2 else 0.0
    inputs = problem(n, c, length, components, kind, dtype, last, seed, offset)
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    tolerance = DTYPES[dtype]
    for ours, theirs in zip(
        gradients(normalize, inputs, grad),
        gradients(normalize_reference, inputs, grad),
        strict=True,
    ):
        assert ours.dtype == theirs.dtype
        scale = max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("kind", ["one", "image", "position", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_large_inputs_done_by_parts_are_the_small_ones_together(kind, dtype, last, monkeypatch):
    """Parts change nothing but the order of sums."""
    inputs = problem(12, 4, 25, 3, kind, dtype, last)
    grad = torch.randn(inputs[0].shape).to(dtype)
    whole = gradients(normalize, inputs, grad)
    moments = image_moments(inputs[0])
    monkeypatch.setattr("ltnorm.norms.functional._PART", 300)  # numbers: three images
    for a, b in zip(whole, gradients(normalize, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
        assert a.stride() == b.stride()
    with torch.no_grad():
        torch.testing.assert_close(image_moments(inputs[0]), moments)


@pytest.mark.parametrize("kind", ["one", "image", "position", "weighted"])
def test_second_derivatives(kind):
    """The moments are functions of x, in the backward pass as well."""
    x, r, share, _, _, weight, bias, _, eps = problem(3, 2, 4, 2, kind, torch.float64, False)
    shift = torch.zeros(2, dtype=torch.float64)

    def moments(x):
        c = x.transpose(1, 2)
        if r is None:
            q = share.expand(3, 4)[:, :, None]
        elif r.dim() == 2:
            q = (r * share)[:, None].expand(3, 4, -1)
        else:
            q = (r * share[:, None]).transpose(1, 2)
        mean = torch.einsum("nlk,nlc->kc", q, c)
        return mean, torch.einsum("nlk,nlc->kc", q, c.square()) - mean.square()

    if kind in ("image", "position"):  # shares that make the weights of a component sum to 1
        total = r.sum(0) * 4 if r.dim() == 2 else r.sum((0, 2))
        share = 1 / total

    def function(x, weight, bias):
        mean, var = moments(x.detach())
        return normalize(x, r, share, mean, var, weight, bias, shift, eps)

    def plain(x, weight, bias):
        mean, var = moments(x)
        scale = weight * torch.rsqrt(var + eps)
        offset = bias - mean * scale
        if r is None:
            return x * scale[0][:, None] + offset[0][:, None]
        if r.dim() == 2:
            return x * (r @ scale)[:, :, None] + (r @ offset)[:, :, None]
        return x * (scale.T @ r) + offset.T @ r

    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    second = []
    for f in (function, plain):
        first = torch.autograd.grad(f(*leaves).pow(3).sum(), leaves, create_graph=True)
        second.append([*first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)])
    for ours, theirs in zip(*second, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_products_are_exact_whatever_the_user_allows():
    a, b = torch.randn(50, 40), torch.randn(40, 30)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        result = matmul(a, b)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(result, (a.double() @ b.double()).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("assign", ["image", "position"])
def test_function_transforms_in_evaluation(assign):
    torch.manual_seed(0)
    layer = norm_layer("compound", components=3, assign=assign)(4).double()
    for _ in range(3):
        layer(torch.randn(6, 4, 3, 3).double() + torch.randn(6, 4, 1, 1))
    layer.eval()
    x = torch.randn(5, 4, 3, 3).double()
    state = dict(layer.named_parameters())

    def loss(state, x):
        return torch.func.functional_call(layer, state, (x[None],)).square().sum()

    per_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(state, x)
    for i in range(5):
        one = torch.autograd.grad(loss(state, x[i]), list(state.values()))
        for ours, theirs in zip(per_image.values(), one, strict=True):
            torch.testing.assert_close(ours[i], theirs)
    forward, reverse = torch.func.jacfwd(layer)(x[:1]), torch.func.jacrev(layer)(x[:1])
    torch.testing.assert_close(forward, reverse)


@pytest.mark.parametrize("kind", ["one", "image", "position", "weighted"])
def test_the_vmap_rule(kind):
    x, *rest = problem(3, 4, 5, 2, kind, torch.float64, False)
    many = torch.stack([x, 2 * x, x - 1])
    weights = torch.stack([rest[4], rest[4] + 1, 2 * rest[4]])

    def function(x, weight):
        return normalize(x, *rest[:4], weight, *rest[5:])

    together = torch.func.vmap(function)(many, weights)
    apart = torch.stack([function(a, b) for a, b in zip(many, weights, strict=True)])
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("assign", ["image", "position"])
def test_compiled_training_in_bf16_has_the_same_gradients(assign, monkeypatch):
    torch._dynamo.reset()
    layer = norm_layer("compound", components=2, assign=assign)(4)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), layer)
    other = copy.deepcopy(model)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    fast = compiled(model.forward)
    for _ in range(2):
        x = torch.randn(6, 3, 5, 5)
        for forward in (fast, other):
            with torch.autocast("cpu", torch.bfloat16):
                y = forward(x)
            y.float().square().sum().backward()
        # Its products are not those of autocast: to the bit.
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-6)


def test_many_norms_of_an_image_at_once():
    """In channels_last, where their gradient is not torch's."""
    torch.manual_seed(0)
    layer = norm_layer("gn")(8).double()
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    weights = torch.randn(2, 8, dtype=torch.float64)

    def loss(weight, x):
        return torch.func.functional_call(layer, {"weight": weight}, x).sin().sum()

    def expected(weight, x):
        return F.group_norm(x, layer.num_groups, weight, layer.bias, layer.eps).sin().sum()

    wanted = [torch.func.grad(expected, (0, 1))(weight, x) for weight in weights]
    mapped = torch.vmap(torch.func.grad(loss, (0, 1)), in_dims=(0, None))(weights, x)
    torch.testing.assert_close(mapped, tuple(map(torch.stack, zip(*wanted, strict=True))))
