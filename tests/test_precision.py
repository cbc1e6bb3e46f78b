"""Dtypes, shapes and layouts, for every norm: as torch's BatchNorm has them."""

import copy

import pytest
import torch
from torch import nn

from ltnorm import registry
from ltnorm.norms import norm_layer, route

NORMS = list(registry.NORMS)
LOW = [torch.bfloat16, torch.float16]
# Those that are batch normalization, with these options, but for the shape of what they keep.
BATCH_NORMS = [
    ("bn", {}),
    ("compound", {"components": 1}),
    ("compound", {"components": 1, "assign": "position"}),
    ("split", {"components": 1}),
]


def images(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return x + 2 * torch.randn(*shape[:2], *[1] * (len(shape) - 2), generator=generator)


def routed(layer, x):
    """The layer on x, with the images in all class groups."""
    with route(layer, torch.arange(len(x)) % getattr(layer, "components", 1)):
        return layer(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", LOW)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("name", NORMS)
def test_autocast(name, dtype, autocast, training):
    layer, batch_norm = norm_layer(name)(4), nn.BatchNorm2d(4)
    exact = routed(layer, images(6, 4, 3, 3))
    layer, x = norm_layer(name)(4), images(6, 4, 3, 3).to(dtype).requires_grad_()
    if not training:
        routed(layer, images(6, 4, 3, 3))
        exact = layer.eval()(images(6, 4, 3, 3))
        batch_norm.eval()
    with torch.autocast("cpu", autocast):
        y, expected = routed(layer, x), batch_norm(x)
        assert y.dtype == expected.dtype
        y.float().square().sum().backward()
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    assert x.grad.isfinite().all()
    for p in layer.parameters():
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()
    for buffer in layer.buffers():
        assert buffer.dtype in (torch.float32, torch.int64)
        assert buffer.isfinite().all()


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
@pytest.mark.parametrize("name", NORMS)
def test_a_layer_of_another_float_type(name, dtype):
    """Its output and gradients are of that type, and near those in float32."""
    exact = norm_layer(name)(4)
    layer, tolerance = copy.deepcopy(exact).to(dtype), 0.05 if dtype in LOW else 1e-4
    for training in (True, False):
        x = images(6, 4, 3, 3).to(dtype).requires_grad_()
        y, expected = routed(layer.train(training), x), routed(exact.train(training), x.float())
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)
        y.square().sum().backward()
        assert x.grad.dtype == dtype
        assert x.grad.isfinite().all()
        assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())
    assert all(b.dtype in (dtype, torch.int64) and b.isfinite().all() for b in layer.buffers())


@pytest.mark.parametrize("name", NORMS)
def test_the_memory_format_is_kept_and_changes_nothing(name):
    x = images(6, 4, 3, 5)
    first, second = norm_layer(name)(4), norm_layer(name)(4)
    second.load_state_dict(first.state_dict())
    for training in (True, False):
        other = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        y, expected = routed(second.train(training), other), routed(first.train(training), x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        (grad,) = torch.autograd.grad(y.square().sum(), other)
        assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(8, 5), (8, 5, 6), (2, 5, 1)])
@pytest.mark.parametrize(("name", "options"), BATCH_NORMS)
def test_one_component_is_batch_norm_1d(name, options, shape):
    layer, expected = norm_layer(name, **options)(5), nn.BatchNorm1d(5)
    for training in (True, True, False):
        layer.train(training), expected.train(training)
        x, theirs = (images(*shape).requires_grad_() for _ in range(2))
        y, z = layer(x), expected(theirs)
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
        for layers, output in ((layer, y), (expected, z)):
            layers.zero_grad()
            output.pow(3).sum().backward()
        torch.testing.assert_close(x.grad, theirs.grad, rtol=1e-3, atol=1e-3)
        for key, value in expected.named_parameters():
            ours = layer.get_parameter(key).grad.view_as(value)
            torch.testing.assert_close(ours, value.grad, rtol=1e-3, atol=1e-3)
        for key, value in expected.named_buffers():
            torch.testing.assert_close(layer.get_buffer(key).view_as(value), value)


@pytest.mark.parametrize(("name", "options"), BATCH_NORMS)
@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1), (1, 4, 1, 1)])
def test_one_value_a_channel_is_refused_as_batch_norm_does(name, options, shape):
    x = torch.randn(shape)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as expected:
        nn.functional.batch_norm(x, None, None, training=True)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as ours:
        norm_layer(name, **options)(4)(x)
    assert str(ours.value) == str(expected.value)
    assert norm_layer(name, **options)(4).eval()(x).shape == x.shape


@pytest.mark.parametrize("name", NORMS)
def test_an_empty_batch_evaluates_to_nothing(name):
    assert norm_layer(name)(4).eval()(torch.zeros(0, 4, 3, 3)).shape == (0, 4, 3, 3)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_a_wrong_number_of_channels_is_an_error(name, training):
    layer = norm_layer(name)(4).train(training)
    with pytest.raises((ValueError, RuntimeError), match="4"):
        routed(layer, images(6, 3, 2, 2))
