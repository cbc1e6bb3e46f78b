import argparse
import hashlib

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn

from ltnorm import models, registry
from ltnorm.errors import UsageError
from ltnorm.norms import norm_layer, norm_layers
from ltnorm.norms.batch import BatchNorm
from ltnorm.pretrained import load_pretrained, pretrained_sha256
from ltnorm.training import checkpoint
from ltnorm.validation import validate

BN = norm_layer("bn")

# Of each family the smallest; those of timm without and with layers that are norm and activation.
FAMILIES = [
    "resnet8",
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "timm/test_resnet",
    "timm/mobilenetv3_small_050",
]


def trained(model, size=32):
    """In evaluation, with running statistics and weights that are not those of a fresh model."""
    with torch.no_grad():
        model.train()(torch.randn(4, 3, size, size))
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.weight.uniform_(0.5, 1.5)
                m.bias.uniform_(-0.5, 0.5)
    return model.eval()


def torch_batch_norms(model):
    layers = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return [m for m in layers if not isinstance(m, BatchNorm)]


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


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("norm", ["gn", "compound"])
def test_initial_weights_do_not_depend_on_the_norm(name, norm):
    def convolutions(layer):
        torch.manual_seed(5)
        modules = models.build(name, 10, layer).modules()
        return [m.weight for m in modules if isinstance(m, nn.Conv2d | nn.Linear)]

    for ours, bn in zip(convolutions(norm_layer(norm)), convolutions(BN), strict=True):
        assert torch.equal(ours, bn)


@pytest.mark.parametrize(
    ("name", "size", "first", "last"),
    [
        ("resnet8", 32, ["norm"], ["blocks.2.norm1", "blocks.2.norm2"]),
        (
            "resnet18",
            32,
            ["bn1"],
            [*(f"layer4.{i}.bn{j}" for i in (0, 1) for j in (1, 2)), "layer4.0.downsample.1"],
        ),
        ("timm/test_resnet", 64, ["conv1.1"], None),
    ],
)
def test_a_norm_can_take_the_first_or_the_last_layers_alone(name, size, first, last):
    def build(placement):
        torch.manual_seed(3)
        compound = norm_layer("compound")
        return models.build(name, 10, compound, image_size=size, norm_layers=placement)

    def paths(placement):
        kind = norm_layer("compound").func
        return [path for path, m in build(placement).named_modules() if isinstance(m, kind)]

    assert paths("first") == first
    found, everywhere = paths("last"), set(paths("all"))
    assert sorted(found) == sorted(last or found)
    assert found
    assert set(found) < everywhere
    mixed = build("last")
    others = [m for m in mixed.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(others) + len(found) == len(everywhere)
    torch.manual_seed(3)
    plain = models.build(name, 10, BN, image_size=size)
    ours, theirs = (
        [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        for model in (mixed, plain)
    )
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "timm/test_resnet"])
def test_layers_beside_a_norm_are_bn_with_its_eps_from_a_file_or_not(name, tmp_path):
    size = 64
    own = trained(models.build(name, 5, BN, image_size=size), size)
    if name.startswith("timm"):
        source = timm.create_model(name.removeprefix("timm/"), num_classes=5)
    else:
        source = torchvision.models.mobilenet_v3_small(num_classes=5)
    path = tmp_path / "w.pth"
    torch.save(trained(source, size).state_dict(), path)
    eps = next(m.eps for m in source.modules() if isinstance(m, nn.BatchNorm2d))
    norm = norm_layer("compound", components=1, eps=eps)
    options = {"image_size": size, "norm_layers": "first", "stem": "imagenet"}
    if name.startswith("timm"):
        del options["stem"]
    loaded = models.build(name, 5, norm, pretrained=path, **options)
    assert not torch_batch_norms(loaded)
    images = torch.randn(3, 3, size, size)
    torch.testing.assert_close(loaded.eval()(images), source(images), rtol=1e-3, atol=1e-3)
    again = models.build(name, 5, norm, **options)
    again.load_state_dict(loaded.state_dict())
    assert torch.equal(again.eval()(images), loaded(images))
    assert len(norm_layers(again, "compound")) == len(norm_layers(own, "bn"))


def test_layers_are_not_looked_for_in_a_model_that_takes_no_such_images():
    options = {"image_size": 32, "norm_layers": "last"}
    with pytest.raises(UsageError, match="fails on images of 32x32"):
        models.build("timm/levit_128s", 5, BN, **options)


def test_standardized_filters_have_mean_0_and_variance_1_whatever_the_weights():
    def build(standardized):
        torch.manual_seed(3)
        return models.build("resnet8", 10, norm_layer("gn"), weight_standardization=standardized)

    ours, plain = build(True), build(False)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(2, 3, 32, 32)
    for conv in (ours.conv, ours.blocks[1].conv1):
        x = torch.randn(2, conv.in_channels, 8, 8)
        w = conv.weight.detach()
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.var((1, 2, 3), False, keepdim=True).sqrt()
        assert conv(x).shape[1] == conv.out_channels
        expected = F.conv2d(x, w, None, conv.stride, conv.padding)
        torch.testing.assert_close(conv(x), expected, rtol=1e-3, atol=1e-3)
    before = ours.eval()(images)
    with torch.no_grad():
        for module in ours.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(3).add_(0.7)
    torch.testing.assert_close(ours(images), before, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain.eval()(images), before, rtol=1e-2)


def test_convolutions_of_a_kind_of_their_own_cannot_be_standardized():
    model = timm.create_model("resnetv2_50x1_bit")
    with pytest.raises(UsageError, match="StdConv2d"):
        models.standardize_weights(model)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("resnet18", torchvision.models.resnet18),
        ("mobilenet_v2", torchvision.models.mobilenet_v2),
        ("timm/test_resnet", lambda num_classes: timm.create_model("test_resnet", num_classes=10)),
    ],
)
def test_initial_weights_are_those_of_the_library(name, make):
    torch.manual_seed(5)
    ours = models.build(name, 10, BN, image_size=64).state_dict()
    torch.manual_seed(5)
    theirs = make(num_classes=10).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", [n for n in registry.MODELS if hasattr(torchvision.models, n)])
def test_every_model_of_torchvision_has_its_parameter_count(name):
    known = torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
    with torch.device("meta"):
        model = models.build(name, 1000, BN, image_size=224)
    assert sum(p.numel() for p in model.parameters()) == known


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        *((name, norm) for name in FAMILIES for norm in ("bn", "gn", "compound")),
        ("resnext50_32x4d", "compound"),
    ],
)
def test_every_family_trains(name, norm):
    torch.manual_seed(0)
    options = {"stem": "imagenet"} if name.startswith("res") and name != "resnet8" else {}  # faster
    model = models.build(name, 5, norm_layer(norm), **options)
    assert model.training
    assert not torch_batch_norms(model)
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 4])
    for _ in range(2):  # timm's last norm of a block starts at zero: nothing before it learns
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad.isfinite().all()
                p -= 0.01 * p.grad
    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            assert m.weight.grad.any()


@pytest.mark.parametrize(("size", "stem"), [(32, (3, 3)), (224, (7, 7))])
def test_the_stem_suits_the_image_size(size, stem):
    model = models.build("resnet18", 5, BN, image_size=size)
    assert model.conv1.kernel_size == stem
    assert isinstance(model.maxpool, nn.Identity if size == 32 else nn.MaxPool2d)
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small"])
def test_the_small_stem_of_a_mobilenet_leaves_twice_the_size(name):
    x = torch.zeros(1, 3, 32, 32)
    sizes = {
        stem: models.build(name, 5, BN, stem=stem).eval().features[:-1](x).shape[-1]
        for stem in ("auto", "small", "imagenet")
    }
    assert sizes == {"auto": 2, "small": 2, "imagenet": 1}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_classifier_is_found_and_replaced(name):
    model = models.build(name, 7, BN)
    old = models.classifier(model)
    assert old.out_features == 7
    new = nn.Linear(old.in_features, 3)
    models.replace_classifier(model, new)
    assert models.classifier(model) is new
    assert all(m is not old for m in model.modules())
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(("name", "number"), [("dla46_c", "no"), ("efficientformer_l1", "2")])
def test_a_classifier_that_is_not_one_linear_layer(name, number):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5)
    with pytest.raises(UsageError, match=f"has {number} linear layers that make its logits"):
        models.classifier(model)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("resnet9", "unknown model 'resnet9'"),
        ("tim/resnet18", "unknown model 'tim/resnet18'"),
        ("timm/resnet18x", "timm has no model 'resnet18x'"),
        ("timm/resnet18.a1_in1k", r"timm has no model 'resnet18\.a1_in1k'"),
        ("timm/", "timm has no model ''"),
    ],
)
def test_a_name_is_checked_with_the_recipe(name, problem):
    with pytest.raises(UsageError, match=f"^model.name: {problem}$") as caught:
        validate({"model": {"name": name}})
    assert "timm" in caught.value.hint
    if "resnet18" in name:
        assert "did you mean" in caught.value.hint
        assert "resnet18'?" in caught.value.hint


def test_options_of_timm():
    section = {"name": "timm/test_resnet", "drop_path_rate": 0.2}
    checked = validate({"model": section}).model
    assert checked.options == {"drop_rate": 0.0, "drop_path_rate": 0.2}
    model = models.build(checked.name, 5, BN, **checked.options)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert max(rates) == pytest.approx(0.2)
    with pytest.raises(UsageError, match=r"model\.drop_rate.*less than 1"):
        validate({"model": section | {"drop_rate": 1.0}})
    with pytest.raises(UsageError, match="'timm/vgg11_bn' has no drop_path_rate"):
        models.build("timm/vgg11_bn", 5, BN, drop_path_rate=0.1)


def test_without_timm(monkeypatch, failing):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = failing("train --model timm/resnet14t", code=2)
    assert "'timm/resnet14t' needs timm" in said
    assert 'pip install "ltnorm[timm]"' in said


@pytest.mark.parametrize(
    ("name", "norm", "problem"),
    [
        ("timm/test_vit", "bn", "test_vit.* has no batch normalization to replace"),
        ("timm/levit_128s", "bn", "levit_128s' fails on images of 32x32"),
        ("timm/resnet10t", "in", "resnet10t' fails on images of 32x32: expected more than 1 posi"),
    ],
)
def test_what_does_not_fit_together_is_found_before_training(name, norm, problem):
    with pytest.raises(UsageError, match=problem):
        models.build(name, 5, norm_layer(norm))


def test_timm_from_the_command_line(ltnorm):
    listed = ltnorm("list models").out
    assert "timm/NAME" in listed
    assert all(name in listed for name in registry.MODELS)
    trained = ltnorm("train --recipe tiny.yaml --model timm/test_resnet --norm gn --epochs 1")
    assert trained.code == 0, trained.err
    assert "timm_test_resnet-gn-ce" in trained.out


WAYS = {
    "plain.pth": lambda state: state,
    "nested.pt": lambda state: {"state_dict": state, "args": argparse.Namespace(lr=0.1)},
    "parallel.pth": lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
    "compiled.pth": lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
    "averaged.pth": lambda state: {
        "state_dict": {k: torch.zeros_like(v) for k, v in state.items()},
        "state_dict_ema": state,
    },
    "old.pth": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("way", [*WAYS, "plain.safetensors"])
def test_weights_are_found_in_a_file(way, tmp_path):
    source = trained(models.build("resnet8", 5, nn.BatchNorm2d))
    path = tmp_path / way
    if way in WAYS:
        torch.save(WAYS[way](source.state_dict()), path)
    else:
        save_file(source.state_dict(), path)
    model = models.build("resnet8", 5, nn.BatchNorm2d, pretrained=path).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), source(x))
    assert pretrained_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


PRETRAINED = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
    "timm/test_resnet": lambda: timm.create_model("test_resnet", num_classes=5),
    "timm/mobilenetv3_small_050": lambda: timm.create_model("mobilenetv3_small_050", num_classes=5),
}


@pytest.mark.parametrize("name", list(PRETRAINED))
@pytest.mark.parametrize("norm", ["bn", "compound"])
def test_a_pretrained_model_evaluates_as_the_librarys_own(name, norm, tmp_path):
    source = trained(PRETRAINED[name](), 64)
    path = tmp_path / "weights.pth"
    torch.save(source.state_dict(), path)
    [eps] = {m.eps for m in source.modules() if isinstance(m, nn.BatchNorm2d)}
    layer = norm_layer(norm, eps=eps)
    told = []
    model = models.build(name, 5, layer, image_size=64, pretrained=path, tell=told.append)
    assert not torch_batch_norms(model)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.eval()(x), source(x), rtol=1e-3, atol=1e-4)
    assert not told


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "timm/test_resnet", "timm/dla46_c"])
def test_other_classes_keep_the_backbone(name, tmp_path):
    path = tmp_path / "weights.pth"
    source = trained(models.build(name, 5, nn.BatchNorm2d, image_size=64))
    torch.save(source.state_dict(), path)
    told = []
    options = {"image_size": 64, "pretrained": path, "tell": told.append}
    model = models.build(name, 4, norm_layer("bn", eps=source_eps(name)), **options)
    differ = {
        key
        for key, value in model.state_dict().items()
        if not torch.equal(value, source.state_dict()[key])
    }
    assert len(differ) == 2
    [said] = told
    assert all(key in said for key in differ)
    assert str(path) in said


def source_eps(name):
    return 1e-3 if name == "mobilenet_v3_small" else 1e-5


def test_a_checkpoint_is_a_file_of_weights(tmp_path):
    source = trained(models.build("timm/mobilenetv3_small_050", 5, BN))
    path = tmp_path / checkpoint.NAME
    checkpoint.save(path, checkpoint.Checkpoint("", [1], "", 1, source.state_dict()))
    model = models.build("timm/mobilenetv3_small_050", 5, norm_layer("compound"), pretrained=path)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), source(x), rtol=1e-3, atol=1e-4)


def test_weights_of_another_model_are_refused_and_change_nothing(tmp_path):
    deep, shallow = (timm.create_model(f"resnet{n}", num_classes=5) for n in ("10t", "14t"))
    for model, other in ((deep, shallow), (shallow, deep)):
        torch.save(other.state_dict(), tmp_path / "other.pth")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(UsageError, match=r"do not fit: layer\S+ is .*, and \d+ more") as caught:
            load_pretrained(model, tmp_path / "other.pth")
        assert "this very model" in caught.value.hint
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_of_a_mixture_are_refused(tmp_path):
    torch.save(models.build("resnet8", 5, norm_layer("compound")).state_dict(), tmp_path / "w.pth")
    with pytest.raises(
        UsageError, match=r"norm\.weight is \[\d+, 16\] instead of \[16\]"
    ) as caught:
        models.build("resnet8", 5, BN, pretrained=tmp_path / "w.pth")
    assert "with batch normalization" in caught.value.hint


def test_the_small_stem_has_no_pretrained_weights(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), path)
    with pytest.raises(UsageError, match=r"conv1\.weight is \[64, 3, 7, 7\]") as caught:
        models.build("resnet18", 5, BN, pretrained=path)
    assert "--set model.stem=imagenet" in caught.value.hint
    models.build("resnet18", 5, BN, pretrained=path, stem="imagenet")


def test_pretrained_running_statistics_need_their_eps(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(torchvision.models.mobilenet_v3_small(num_classes=5).state_dict(), path)
    with pytest.raises(UsageError, match=r"has eps 0\.001, and the norm has 1e-05") as caught:
        models.build("mobilenet_v3_small", 5, BN, pretrained=path)
    assert caught.value.hint == "--set norm.eps=0.001"
    models.build("mobilenet_v3_small", 5, norm_layer("gn"), pretrained=path)


@pytest.mark.parametrize(
    ("name", "write", "problem"),
    [
        ("none.pth", lambda path: None, "no file of weights"),
        ("folder.pth", lambda path: path.mkdir(), "no file of weights"),
        ("text.pth", lambda path: path.write_text("weights"), "is damaged"),
        ("text.safetensors", lambda path: path.write_text("weights"), "is damaged"),
        ("whole.pth", lambda path: torch.save(nn.Linear(2, 2), path), "would run code"),
        ("list.pth", lambda path: torch.save([torch.ones(2)], path), "no weights by name"),
        ("numbers.pth", lambda path: torch.save({"epoch": 3}, path), "no weights by name"),
    ],
)
def test_what_is_no_file_of_weights(name, write, problem, tmp_path):
    path = tmp_path / name
    write(path)
    with pytest.raises(UsageError, match=problem) as caught:
        models.build("resnet8", 5, BN, pretrained=path)
    assert str(path) in caught.value.message
    if "no file" in problem:
        with pytest.raises(UsageError, match=problem):
            pretrained_sha256(path)


def test_safetensors_are_missing(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs safetensors"):
        models.build("resnet8", 5, BN, pretrained=path)
