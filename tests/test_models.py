import pytest
import torch
from torch import nn

from ltnorm import models
from ltnorm.norms import norm_layer

BN = norm_layer("bn")


@pytest.mark.parametrize(("classes", "parameters"), [(10, 464_154), (100, 470_004)])
def test_resnet32_has_the_published_parameter_count(classes, parameters):
    model = models.build("resnet32", classes, BN)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 44, 56])
def test_depth_counts_weighted_layers(depth):
    model = models.build(f"resnet{depth}", 10, BN)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == depth - 1


def test_option_a_shortcut_slices_and_pads():
    block = models.BasicBlock(4, 8, 2, BN)
    with torch.no_grad():
        for p in block.parameters():
            p.zero_()
    x = torch.rand(2, 4, 6, 6)
    y = block(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet50"])
@pytest.mark.parametrize("norm", ["gn", "split", "compound"])
def test_initial_weights_do_not_depend_on_the_norm(name, norm):
    def convolutions(layer):
        torch.manual_seed(5)
        modules = models.build(name, 10, layer).modules()
        return [m.weight for m in modules if isinstance(m, nn.Conv2d | nn.Linear)]

    for ours, bn in zip(convolutions(norm_layer(norm)), convolutions(BN), strict=True):
        assert torch.equal(ours, bn)


@pytest.mark.parametrize(("size", "stem"), [(32, (3, 3)), (224, (7, 7))])
def test_the_stem_suits_the_image_size(size, stem):
    model = models.build("resnet18", 5, BN, image_size=size)
    assert model.conv1.kernel_size == stem
    assert isinstance(model.maxpool, nn.Identity if size == 32 else nn.MaxPool2d)
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


def test_the_classifier_is_found():
    for name in ("resnet8", "resnet18"):
        assert models.classifier(models.build(name, 7, BN)).out_features == 7
