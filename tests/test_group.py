"""Norms of one image in channels_last on a CPU, where they are not torch's kernels."""

import pytest
import torch
import torch.nn.functional as F

from ltnorm.norms import norm_layer

CHANNELS, KINDS = 8, ("gn", "ln", "in")


def layer_and_input(kind, dtype=torch.float64, offset=0.0):
    torch.manual_seed(0)
    layer = norm_layer(kind)(CHANNELS)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = 3 * torch.randn(2, CHANNELS, 3, 2, dtype=dtype) + offset
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    return layer.to(torch.float64 if dtype == torch.float64 else torch.float32), x


def by_torch(layer, x, weight, bias):
    return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "offset", "tolerance"),
    [(torch.float64, 5.0, 1e-10), (torch.float32, 1000.0, 1e-3), (torch.bfloat16, 5.0, 2e-2)],
)
def test_moments_give_what_torch_gives(kind, dtype, offset, tolerance):
    layer, x = layer_and_input(kind, dtype, offset)
    parameters = [layer.weight, layer.bias]
    y = layer(x)
    assert "_Normalize" in type(y.grad_fn.next_functions[0][0]).__name__  # not torch's own
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected = by_torch(layer, x.double(), *(p.double() for p in parameters))
    g = torch.randn_like(y)
    found = (y, *torch.autograd.grad(y, (x, *parameters), g))
    wanted = (expected, *torch.autograd.grad(expected, (x, *parameters), g.double()))
    for mine, other in zip(found, wanted, strict=True):
        assert (mine - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_first_and_second_derivatives(kind):
    layer, x = layer_and_input(kind)
    arguments = x, layer.weight, layer.bias

    def function(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


def test_an_image_does_not_depend_on_the_others():
    layer, x = layer_and_input("gn", torch.float32)
    torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]), rtol=1e-6, atol=1e-6)
