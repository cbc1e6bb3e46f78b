import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from ltnorm import registry
from ltnorm.errors import UsageError
from ltnorm.norms import RoutedNorm, convert_norm, norm_layer, route


def trained(model, image):
    """With running statistics and weights that are not those of a fresh model."""
    torch.manual_seed(0)
    model.train()
    with torch.no_grad():
        model(torch.randn(4, *image))
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.weight.uniform_(0.5, 1.5)
                m.bias.uniform_(-0.5, 0.5)
    return model.eval()


MODELS = {
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "torchvision mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
    "timm resnet10t": lambda: timm.create_model("resnet10t", num_classes=5),
    "timm mobilenetv3_small_050": lambda: timm.create_model(
        "mobilenetv3_small_050", num_classes=5
    ),  # of BatchNormAct2d
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize(
    ("norm", "options"),
    [
        ("bn", {}),
        ("compound", {"components": 3}),
        ("compound", {"assign": "position"}),
        ("split", {"components": 2}),
        ("balanced", {"components": 2}),
        ("brn", {}),
        ("nbn", {}),
        ("mode", {}),
        ("mixture", {}),
    ],
)
def test_a_converted_model_evaluates_as_before_and_trains(name, norm, options):
    model = trained(MODELS[name](), (3, 32, 32))
    x = torch.randn(3, 3, 32, 32)
    expected = model(x)
    converted = convert_norm(copy.deepcopy(model), norm, **options)
    torch.testing.assert_close(converted(x), expected, rtol=1e-3, atol=1e-4)
    if norm == "bn":
        return
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in converted.modules())
    converted.train()
    with route(converted, torch.tensor([0, 1, 1])):
        converted(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in converted.parameters() if p.grad is not None)
    layers = [m for m in converted.modules() if hasattr(m, "running_mean")]
    assert layers
    for layer in layers:
        if layer.running_mean.dim() == 2:  # the first training step has spread the components
            assert not torch.equal(layer.running_mean[0], layer.running_mean[1])


def test_one_and_two_dimensional_sources_and_sync_batch_norm():
    model = nn.Sequential(
        nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(8, 6), nn.BatchNorm1d(6)
    )
    trained(model, (3, 2))
    x = torch.randn(5, 3, 2)
    expected = model(x)
    torch.testing.assert_close(convert_norm(copy.deepcopy(model), "compound")(x), expected)
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    converted = convert_norm(sync, "compound")
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    torch.testing.assert_close(converted(x), expected)


def test_settings_are_carried_unless_given():
    source = nn.BatchNorm2d(4, eps=1e-3, momentum=0.01)
    layer = convert_norm(source, "compound")
    assert (layer.eps, layer.momentum) == (1e-3, 0.01)
    assert convert_norm(source, "compound", momentum=0.2).momentum == 0.2
    assert convert_norm(nn.BatchNorm2d(4, momentum=None), "compound").momentum == 0.1


def test_a_source_without_affine_is_not_trained():
    layer = convert_norm(nn.BatchNorm2d(4, affine=False), "compound")
    assert not any(p.requires_grad for p in layer.parameters())


def test_what_cannot_be_converted_changes_nothing():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="layer '1' has no running statistics"):
        convert_norm(model, "compound")
    assert type(model[0]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="colour"):
        convert_norm(nn.BatchNorm2d(4), "compound", colour="red")


def test_some_layers_alone_can_be_converted():
    model = torchvision.models.resnet18()
    bn1, bn2 = model.bn1, model.layer1[0].bn2
    convert_norm(model, "compound", only=["layer1.0.bn1"], components=3)
    assert model.layer1[0].bn1.components == 3
    assert model.bn1 is bn1
    assert model.layer1[0].bn2 is bn2
    with pytest.raises(ValueError, match="no batch normalization at 'conv1'"):
        convert_norm(model, "gn", only=["bn1", "conv1"])
    assert model.bn1 is bn1
    with pytest.raises(ValueError, match="no path"):
        convert_norm(model, "gn", only=[])
    convert_norm(model, "gn", only="bn1")
    assert model.bn1 is not bn1
    shared = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    shared.append(shared[0])
    convert_norm(shared, "ln", only=(path for path in ["0"]))
    assert shared[2] is shared[0]
    assert not isinstance(shared[0], nn.BatchNorm2d)


def test_norm_layer_is_what_torchvision_takes():
    model = torchvision.models.resnet18(norm_layer=norm_layer("compound", components=3))
    assert sum(isinstance(m, RoutedNorm) for m in model.modules()) == 20


def test_a_shared_layer_stays_shared():
    model = nn.Module()
    model.a = model.b = nn.BatchNorm2d(4)
    convert_norm(model, "gn")
    assert model.a is model.b
    assert isinstance(model.a, nn.GroupNorm)


@pytest.mark.parametrize("name", list(registry.NORMS))
def test_dtype_and_device_are_the_sources(name):
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), (3, 6, 6)).double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    expected = model(x)
    converted = convert_norm(copy.deepcopy(model), name)
    assert {p.dtype for p in converted.parameters()} == {torch.float64}
    if getattr(converted[1], "running_mean", None) is not None:
        torch.testing.assert_close(converted(x), expected, rtol=1e-10, atol=1e-10)
    meta = convert_norm(nn.Sequential(nn.BatchNorm2d(4, device="meta")), name)
    assert all(t.is_meta for t in [*meta.parameters(), *meta.buffers()])


def test_what_cannot_be_converted_is_said_before_anything_changes():
    with pytest.raises(ValueError, match="no batch normalization to replace"):
        convert_norm(nn.Sequential(nn.Linear(3, 3)), "compound")
    with pytest.raises(UsageError, match="unknown norm 'compund'"):
        convert_norm(nn.Sequential(nn.Linear(3, 3)), "compund")
    with pytest.raises(ValueError, match=r"layer '0', with its own eps and momentum.*momentum"):
        convert_norm(nn.Sequential(nn.BatchNorm2d(4, momentum=0.0)), "compound")


def test_a_function_decides_on_eps_and_momentum():
    source = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, 1e-3, 0.01)), (3, 6, 6))
    x = torch.randn(4, 3, 6, 6)
    expected = source(x)
    same = convert_norm(copy.deepcopy(source), norm_layer("compound", eps=1e-3))
    torch.testing.assert_close(same(x), expected)
    own = convert_norm(copy.deepcopy(source), norm_layer("compound"))
    assert (own[1].eps, own[1].momentum) == (1e-5, 0.1)
    assert not torch.allclose(own(x), expected, rtol=1e-4)
    assert torch.equal(own[1].running_mean[0], source[1].running_mean)
    with pytest.raises(ValueError, match=r"options \(eps\) go with the name"):
        convert_norm(copy.deepcopy(source), norm_layer("compound"), eps=1e-3)


@pytest.mark.parametrize("shape", [(8,), (8, 1, 1), (1, 8, 1, 1)])
def test_a_layer_of_ones_own_takes_weight_and_bias_in_its_shape(shape):
    class Scale(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(shape))
            self.bias = nn.Parameter(torch.zeros(shape))

    source = nn.BatchNorm2d(8)
    nn.init.uniform_(source.weight)
    nn.init.uniform_(source.bias)
    layer = convert_norm(source, Scale)
    assert layer.weight.shape == shape
    assert torch.equal(layer.weight.flatten(), source.weight)
    assert torch.equal(layer.bias.flatten(), source.bias)
