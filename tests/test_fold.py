import contextlib
import copy
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ltnorm import models, registry
from ltnorm.norms import convert_norm, fold, norm_layer, route
from ltnorm.norms.layer import ChannelNorm

NORMS = {
    "bn": ("bn", {}),
    "compound": ("compound", {"components": 1}),
    "pooled": ("split", {"components": 3}),
    "balanced": ("split", {"components": 3, "evaluation": "balanced"}),
}


def trained(model, *shape, dtype=torch.float64):
    """In evaluation mode, with weights and running statistics that are not those of a start."""
    torch.manual_seed(0)
    model.to(dtype).train()
    components = min(getattr(m, "components", 9) for m in model.modules())
    for _ in range(2):
        x = 2 * torch.randn(6, *shape, dtype=dtype) + 1
        with route(model, torch.arange(6) % components):
            model(x)
    with torch.no_grad():
        for module in model.modules():
            if is_norm(module) and getattr(module, "weight", None) is not None:
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return model.eval()


def is_norm(module):
    return isinstance(module, _NormBase | ChannelNorm)


def holds(model, *shape, tolerance=1e-10):
    """The folded copy computes the same without norms, and the model is as it was."""
    dtype = next(model.parameters()).dtype
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    before, training = copy.deepcopy(model.state_dict()), model.training
    folded = fold(model)
    assert type(folded) is type(model)
    assert not folded.training
    assert not any(is_norm(m) for m in folded.modules())
    assert model.training == training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=tolerance, atol=tolerance)
    return folded


@pytest.mark.parametrize("norm", NORMS)
def test_folded_models_compute_the_same(norm):
    name, options = NORMS[norm]
    model = models.build("resnet8", num_classes=5, norm=norm_layer(name, **options))
    folded = holds(trained(model, 3, 8, 8), 3, 8, 8)
    assert isinstance(folded.norm, nn.Identity)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
@pytest.mark.parametrize("norm", [None, "compound", "pooled"])
def test_torchvision(name, norm):
    model = getattr(torchvision.models, name)(num_classes=5)
    if norm is not None:
        given, options = NORMS[norm]
        convert_norm(model, given, **options)
    holds(trained(model, 3, 32, 32), 3, 32, 32)


@pytest.mark.parametrize("converted", [False, True])
def test_timm_layers_keep_their_activation(converted):
    model = timm.create_model("mobilenetv3_small_050", num_classes=5)
    if converted:
        convert_norm(model, "compound", components=1)
    holds(trained(model, 3, 32, 32), 3, 32, 32)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 5, 5)),
        (nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 5, 5)),
        (nn.Conv2d(6, 6, 3, groups=6, stride=2), (6, 5, 5)),
        (nn.Conv1d(4, 6, 3), (4, 7)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), (4, 5)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False), (4, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, output_padding=1, stride=2), (4, 5, 5)),
        (nn.ConvTranspose2d(6, 6, 2, groups=6), (6, 5, 5)),
        (nn.Linear(4, 6, bias=False), (4,)),
        (nn.Linear(4, 6), (4,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("norm", ["torch", *NORMS])
def test_every_kind_of_layer(layer, shape, norm):
    if norm == "torch":
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d}[len(shape)](6)
    else:
        name, options = NORMS[norm]
        norm = norm_layer(name, **options)(6)
    model = nn.Sequential(copy.deepcopy(layer), nn.Identity(), norm, nn.ReLU())
    holds(trained(model, *shape), *shape)


@pytest.mark.parametrize(
    "norm",
    [
        nn.SyncBatchNorm(4),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.InstanceNorm2d(4, track_running_stats=True),
    ],
    ids=str,
)
def test_torchs_own_layers(norm):
    convolution = nn.Conv2d(3, 4, 3)
    norm.running_mean.normal_()
    norm.running_var.uniform_(1, 2)
    holds(nn.Sequential(convolution, norm).double().eval(), 3, 5, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm_layer("compound", components=1)(4))
    trained(model, 3, 5, 5, dtype=torch.float32).to(dtype)
    folded = holds(model, 3, 5, 5, tolerance=0.05)
    assert {p.dtype for p in folded.parameters()} == {dtype}


def test_a_weight_that_two_layers_share_is_folded_in_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    holds(trained(model, 4), 4)


def test_the_model_may_be_training_and_have_no_norms():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 3, 5, 5)
    holds(model.train(), 3, 5, 5)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert fold(plain) is not plain
    holds(plain, 3, 5, 5)


@pytest.mark.parametrize("name", list(registry.NORMS))
def test_what_a_norm_folds_to_is_its_evaluation(name):
    """For every norm of the registry: it folds and computes the same, or refuses."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm_layer(name)(4))
    trained(model, 3, 5, 5)
    with contextlib.suppress(ValueError):
        holds(model, 3, 5, 5)


def refusal(model):
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="cannot be folded") as caught:
        fold(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    return str(caught.value)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (norm_layer("compound", components=3)(4), "chooses among its 3 components by the image"),
        (
            norm_layer("split", components=2, evaluation="posterior")(4),
            "chooses among its 2 components by the image",
        ),
        (norm_layer("gn")(4), r"\(GroupNorm\) is another function of each image"),
        (nn.GroupNorm(2, 4), r"\(GroupNorm\) is another function of each image"),
        (nn.InstanceNorm2d(4), r"\(InstanceNorm2d\) has no running statistics"),
        (nn.BatchNorm2d(4, track_running_stats=False), "has no running statistics"),
    ],
    ids=str,
)
def test_norms_that_are_no_affine_map_are_refused(norm, reason):
    with pytest.raises(ValueError, match=f"layer '1' .*{reason}"):
        fold(nn.Sequential(nn.Conv2d(3, 4, 3), norm))


class Net(nn.Module):
    """A convolution and a norm, put together by a function of both and of x."""

    def __init__(self, forward):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.apply_to = forward

    def forward(self, x, residual=None):
        return self.apply_to(self, x, residual)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda net, x, _: net.conv(net.norm(x)), "follows x, not a convolution"),
        (lambda net, x, _: net.norm(net.conv(x).relu()), "follows relu, not a convolution"),
        (lambda net, x, _: net.norm(y := net.conv(x)) + y, "not the only one to use what 'conv'"),
        (lambda net, x, _: net.norm(net.conv(net.conv(x))), "'conv', .* called more than once"),
        (lambda net, x, _: net.norm(net.norm(net.conv(x))), "is called 2 times"),
        (lambda net, x, _: net.conv(x), "is called 0 times"),
        (
            lambda net, x, _: net.norm(net.conv(x)) if x.sum() > 0 else x,
            "the model cannot be traced by torch.fx.*control flow",
        ),
    ],
)
def test_a_norm_without_a_convolution_of_its_own_is_refused(forward, reason):
    with pytest.raises(ValueError, match=reason):
        fold(Net(forward))


def test_arguments_with_a_default_are_at_their_default():
    def forward(net, x, residual):
        y = net.conv(x)
        return net.norm(y) if residual is None else net.norm(y + residual)

    holds(trained(Net(forward), 3, 4, 4), 3, 4, 4)


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(x, self.weight / self.weight.norm(), self.bias)


def test_convolutions_that_compute_something_else_are_refused():
    assert "class OwnConv" in refusal(nn.Sequential(OwnConv(3, 4, 1), nn.BatchNorm2d(4)))
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
    assert "parametrized" in refusal(nn.Sequential(conv, nn.BatchNorm2d(4)))


def test_all_reasons_are_told_and_where_tracing_failed():
    class Loop(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    mixture = partial(norm_layer("compound"), 4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), mixture(), nn.ReLU(), nn.BatchNorm2d(4))
    text = refusal(model)
    assert "layer '1' chooses among" in text
    assert "layer '3' follows '2', not a convolution" in text
    model = nn.Sequential(nn.Conv2d(3, 4, 1), mixture(), nn.Sequential(Loop()))
    text = refusal(model)
    assert "layer '2.0' cannot be traced" in text
    assert "layer '1' chooses among" in text
    assert "layer '' is the whole model" in refusal(nn.BatchNorm2d(4))


def test_what_else_sees_the_folded_layers_is_refused():
    hooked = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    hooked[0].register_forward_hook(lambda m, i, o: o.relu())
    with pytest.raises(ValueError, match="hooks on '0'"):
        fold(hooked)

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x)) + self.conv.weight.sum()

    with pytest.raises(ValueError, match="parameters, which the model uses elsewhere"):
        fold(Reads())
