"""Norms copied, saved and loaded: whole, as a state dict, and in a run's checkpoint."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from ltnorm import registry
from ltnorm.norms import RoutedNorm, norm_layer, route
from ltnorm.norms.layer import NewerStateError
from ltnorm.training import checkpoint

NORMS = list(registry.NORMS)
GROUPS = torch.tensor([0, 1, 0, 1, -1, 0])
BN_RUN = "results/synthetic-exp10/resnet8-bn-ce/seed0"


def images(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, 3, 3, generator=generator) + torch.arange(4.0)[:, None, None]


def step(layer, seed):
    groups = GROUPS if getattr(layer, "components", 2) > 1 else GROUPS.clamp_max(0)
    with route(layer, groups):
        y = layer.train()(images(seed))
    y.square().sum().backward()
    return y


def trained(name):
    layer = norm_layer(name)(4)
    for seed in range(3):
        step(layer, seed)
    return layer


def saved_and_loaded(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", NORMS)
def test_a_copy_goes_on_as_the_layer_does_and_has_no_route(name, way):
    layer = trained(name)
    layer.eval()
    with route(layer, torch.zeros(6).long()):  # also in the midst of a training step
        other = COPIES[way](layer)
        assert not isinstance(layer, RoutedNorm) or layer.routed is not None
    assert getattr(other, "routed", None) is None
    assert repr(other) == repr(layer)
    assert not other.training
    assert torch.equal(other(images(9)), layer(images(9)))
    assert torch.equal(step(other, 5), step(layer, 5))
    for key, value in layer.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize("name", NORMS)
def test_loading_is_strict_about_what_is_missing(name):
    layer = nn.Sequential(trained(name))
    for key in list(layer.state_dict()):
        state = layer.state_dict()
        del state[key]
        with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{key}"'):
            layer.load_state_dict(state)
        layer.load_state_dict(state, strict=False)


@pytest.mark.parametrize("name", NORMS)
def test_the_state_of_a_newer_layer_is_refused(name):
    layer = nn.Sequential(trained(name))
    state = layer.state_dict()
    known = state._metadata["0"]["version"]
    assert known == layer[0]._version
    layer.load_state_dict(dict(state))  # without versions: the first one
    state._metadata["0"]["version"] = known + 1
    with pytest.raises(NewerStateError, match=f"layer '0' .* version {known + 1}, .* to {known}"):
        layer.load_state_dict(state)


def test_a_checkpoint_has_the_versions_of_its_layers(ltnorm, failing, tmp_path, monkeypatch):
    from ltnorm.norms.batch import BatchNorm

    known = BatchNorm._version
    monkeypatch.setattr(BatchNorm, "_version", known + 1)
    assert ltnorm("train --recipe tiny.yaml --norm bn").code == 0
    assert ltnorm(f"eval {BN_RUN} --json").code == 0
    monkeypatch.setattr(BatchNorm, "_version", known)
    text = failing(f"eval {BN_RUN} --quiet", code=1)
    assert f"layer 'norm' was saved by a newer release: its state is of version {known + 1}" in text
    assert "version of ltnorm that wrote it" in text

    path = tmp_path / BN_RUN / checkpoint.NAME
    content = torch.load(path, weights_only=True)
    assert isinstance(content["model"]._metadata["norm"]["version"], int)
    content["model"] = dict(content["model"])  # as written before there were versions
    torch.save(content, path)
    assert ltnorm(f"eval {BN_RUN} --json").code == 0
