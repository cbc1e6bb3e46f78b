"""What `inspect` measures, against what is known of the layer or of the images."""

import copy
import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from ltnorm import registry
from ltnorm.data.prepared import PreparedSet
from ltnorm.data.source import Pixels
from ltnorm.evaluation import evaluate
from ltnorm.evaluation.inspection import Inspector, choose, without_affine
from ltnorm.norms import norm_layer
from ltnorm.training.build import build_model

GROUPS = ("head", "medium", "tail")
RUN = "results/synthetic-exp10/resnet8-{}-ce/seed0"
CPU = torch.device("cpu")


class Images(PreparedSet):
    """Images [N, H, W, 3] in memory, of three classes: head, medium and tail."""

    def __init__(self, images, labels):
        manifest = {"counts": [300, 50, 5], "mean": [0.0] * 3, "std": [1.0] * 3}
        super().__init__(path=None, manifest=manifest)
        self.__dict__["held"] = Pixels(images, labels)

    def open(self, split):
        return self.held


def images_of(values, labels=None):
    """The set of images in 0 .. 1 [N, H, W, 3], as bytes; classes take turns."""
    values = np.round(255 * np.asarray(values)).astype(np.uint8)
    return Images(values, np.arange(len(values)) % 3 if labels is None else np.asarray(labels))


def random_set(n=30, seed=0, size=4):
    return images_of(np.random.default_rng(seed).uniform(0.2, 0.6, (n, size, size, 3)))


class OneNorm(nn.Module):
    """A network whose only norm layer sees the images themselves."""

    def __init__(self, layer):
        super().__init__()
        self.norm = layer

    def forward(self, x):
        return self.norm(x).mean((2, 3))


def look(layer, norm, data, split="test"):
    inspector = Inspector(OneNorm(layer), norm, data, split, "shots", CPU)
    return inspector, inspector.inspect()


def inputs_of(data):
    return torch.from_numpy(data.open("test").images / 255).permute(0, 3, 1, 2)


def bn_of(data):
    """BN that holds the statistics of these very images, with an affine map to look through."""
    layer, x = norm_layer("bn", eps=1e-12)(3), inputs_of(data)
    with torch.no_grad():
        layer.running_mean.copy_(x.mean((0, 2, 3)))
        layer.running_var.copy_(x.var((0, 2, 3), correction=0))
        layer.weight.copy_(torch.tensor([0.0, -2.0, 5.0]))
        layer.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    return layer


def test_bn_on_the_images_of_its_statistics_has_mean_0_and_variance_1():
    data = random_set()
    _, found = look(bn_of(data), "bn", data)
    [layer] = found.layers
    assert (layer.name, layer.channels, found.groups) == ("norm", 3, list(GROUPS))
    assert layer.shift["all"] == pytest.approx(0, abs=1e-5)
    assert layer.variance["all"] == pytest.approx(1, rel=1e-5)
    nothing = (layer.shares, layer.entropy, layer.contrast, layer.weights, layer.gap)
    assert nothing == (None,) * 5


def test_shift_and_variance_are_those_of_the_groups():
    data = random_set()
    layer, x = bn_of(data), inputs_of(data)
    _, found = look(layer, "bn", data)
    shape = (1, 3, 1, 1)
    xhat = (x - layer.running_mean.view(shape)) / layer.running_var.view(shape).sqrt()
    for k, group in enumerate(GROUPS):
        part = xhat[k::3]
        shift = part.mean((0, 2, 3)).square().mean().sqrt()
        assert found.layers[0].shift[group] == pytest.approx(float(shift), rel=1e-4)
        variance = part.var((0, 2, 3), correction=0).mean()
        assert found.layers[0].variance[group] == pytest.approx(float(variance), rel=1e-4)


def test_tail_images_that_are_brighter_show_that_shift():
    rng = np.random.default_rng(0)
    half = rng.uniform(0.2, 0.5, (50, 4, 4, 3))
    data = images_of(np.concatenate([half, half + 51 / 255]), [0] * 50 + [2] * 50)
    layer = bn_of(images_of(half))
    _, found = look(layer, "bn", data)
    assert found.groups == ["head", "tail"]  # no image of medium: it is left out
    expected = (0.2 / layer.running_var.sqrt()).square().mean().sqrt()
    [seen] = found.layers
    assert seen.shift["head"] == pytest.approx(0, abs=1e-4)
    assert seen.shift["tail"] == pytest.approx(float(expected), rel=1e-4)
    assert seen.variance["tail"] == pytest.approx(seen.variance["head"], rel=1e-4)
    assert seen.apart == pytest.approx((0.2 / layer.running_var.sqrt()).tolist(), rel=1e-4)


def mixture_layer(norm, **options):
    """Two Gaussians, around 0.3 and 0.5, of weights 0.8 and 0.2."""
    layer = norm_layer(norm, components=2, **options)(3)
    with torch.no_grad():
        layer.mixing_weight.copy_(torch.tensor([0.8, 0.2]))
        layer.running_mean.copy_(torch.tensor([[0.3], [0.5]]).expand(2, 3))
        layer.running_var.fill_(0.01)
    return layer


def gaussian_posterior(x, temperature):
    """log tau_k + ll_ik / (T sqrt(C)), for the layer above: one row an image."""
    mean = torch.tensor([0.3, 0.5]).view(2, 1, 1, 1)
    density = -((x[:, None] - mean).square() / 0.01) / 2
    ll = density.sum(2).mean((2, 3)) / (temperature * 3**0.5)
    return (torch.tensor([0.8, 0.2]).log() + ll).softmax(1).double()


@pytest.mark.parametrize(
    ("norm", "options", "temperature"),
    [
        ("compound", {}, 1.0),
        ("compound", {"temperature": 0.2}, 0.2),
        ("split", {"evaluation": "posterior"}, 1.0),
        ("mixture", {"assign": "image"}, 3**-0.5),
    ],
)
def test_shares_and_entropy_are_those_of_the_posterior(norm, options, temperature):
    data = random_set(size=2)
    layer = mixture_layer(norm, **options)
    _, found = look(layer, norm, data)
    [seen] = found.layers
    r = gaussian_posterior(inputs_of(data), temperature)
    entropy = -(r * r.log()).sum(1) / math.log(2)
    for k, group in enumerate(GROUPS):
        assert seen.shares[group] == pytest.approx(r[k::3].mean(0).tolist(), rel=1e-4)
        assert sum(seen.shares[group]) == pytest.approx(1)
        assert seen.entropy[group] == pytest.approx(float(entropy[k::3].mean()), rel=1e-3)
    contrast = abs(seen.shares["head"][0] - seen.shares["tail"][0])
    assert seen.contrast == pytest.approx(contrast)
    assert seen.weights == pytest.approx([0.8, 0.2])
    assert seen.gap == pytest.approx(2.0, rel=1e-5)  # 0.2 apart, with deviations of 0.1


def test_positions_are_assigned_one_by_one():
    data = random_set(size=2)
    _, found = look(mixture_layer("compound", assign="position"), "compound", data)
    x = inputs_of(data)
    r = gaussian_posterior(x.permute(0, 2, 3, 1).reshape(-1, 3, 1, 1), 1.0)
    assert found.layers[0].shares["all"] == pytest.approx(r.mean(0).tolist(), rel=1e-4)


def test_the_limits_of_entropy_and_contrast():
    labels = [0] * 10 + [2] * 10
    data = images_of(
        np.repeat([0.3, 0.5], 10)[:, None, None, None] * np.ones((20, 2, 2, 3)), labels
    )
    layer = mixture_layer("compound", temperature=1e-3)
    [apart] = look(layer, "compound", data)[1].layers
    assert apart.entropy["all"] == pytest.approx(0, abs=1e-6)
    assert apart.contrast == pytest.approx(1)
    assert apart.shares["tail"] == pytest.approx([0, 1], abs=1e-6)
    with torch.no_grad():  # two components that are the same
        layer.running_mean.fill_(0.4)
        layer.mixing_weight.fill_(0.5)
    [same] = look(layer, "compound", data)[1].layers
    assert same.entropy["all"] == pytest.approx(1)
    assert (same.contrast, same.gap) == (pytest.approx(0, abs=1e-6), 0)


@pytest.mark.parametrize("norm", registry.NORMS)
def test_every_norm_can_be_looked_into(norm, tiny_recipe, tiny_set):
    recipe = tiny_recipe(norm)
    model = build_model(recipe, [9, 5, 3, 2], 8)
    before = copy.deepcopy(model.state_dict())
    inspector = Inspector(model, norm, tiny_set, "test", "auto", CPU)
    found = inspector.inspect()
    assert [x.name for x in found.layers][:3] == ["norm", "blocks.0.norm1", "blocks.0.norm2"]
    assert len(found.layers) == 7
    for layer in found.layers:
        for row in layer.rows():
            assert math.isfinite(row[-1])
    density = inspector.density(*choose(found))
    for heights in density.heights.values():
        assert 0.9 < sum(heights) * (density.edges[1] - density.edges[0]) <= 1 + 1e-6
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("norm", registry.NORMS)
def test_features_are_seen_before_weight_and_bias(norm):
    """As the layer would compute with weight 1 and bias 0, whatever it has."""
    torch.manual_seed(0)
    plain = norm_layer(norm)(4).eval()
    layer = copy.deepcopy(plain)
    ones, zeros = torch.ones(4), torch.zeros(4)
    with torch.no_grad():
        if hasattr(layer, "set_affine"):
            layer.set_affine(torch.randn(4), torch.randn(4))
            plain.set_affine(ones, zeros)
        else:
            layer.weight.normal_()
            layer.bias.normal_()
    x = torch.randn(5, 4, 3, 3)
    torch.testing.assert_close(without_affine(layer)(x), plain(x))


def test_the_threshold_of_frn_is_left_out():
    layer = norm_layer("frn", tlu=True)(3)
    assert (without_affine(layer)(torch.randn(4, 3, 2, 2)) < 0).any()
    assert layer.tau is not None


@pytest.mark.parametrize("norm", ["bn", "compound"])
def test_the_batch_size_does_not_matter(norm, tiny_recipe, tiny_set, monkeypatch):
    model = build_model(tiny_recipe(norm), [9, 5, 3, 2], 8)

    def seen():
        inspector = Inspector(model, norm, tiny_set, "train", "auto", CPU)
        found = inspector.inspect()
        rows = [row for layer in found.layers for row in layer.rows()]
        heights = inspector.density(found.layers[-1], 3).heights
        return rows, np.array(list(heights.values()))

    rows, heights = seen()
    monkeypatch.setattr(evaluate, "BATCH", 7)
    others, other_heights = seen()
    assert [row[:-1] for row in rows] == [row[:-1] for row in others]
    np.testing.assert_allclose(
        [row[-1] for row in rows], [row[-1] for row in others], rtol=1e-4, atol=1e-6
    )
    assert np.abs(heights - other_heights).sum() < 0.01 * heights.sum()


def test_a_density_is_the_histogram_of_the_input_with_the_running_gaussians():
    data = random_set(60)
    layer = mixture_layer("compound")
    inspector, found = look(layer, "compound", data)
    density = inspector.density(found.layers[0], 1)
    x = inputs_of(data)[:, 1]
    for k, group in enumerate(GROUPS):
        heights, _ = np.histogram(x[k::3].numpy(), density.edges, density=True)
        # A value on an edge may fall on either side.
        assert np.abs(heights - density.heights[group]).sum() < 0.05 * heights.sum()
    assert density.components == [
        (pytest.approx(0.8), pytest.approx(0.3), pytest.approx(0.01)),
        (pytest.approx(0.2), pytest.approx(0.5), pytest.approx(0.01)),
    ]


@pytest.fixture
def trained(ltnorm):
    assert ltnorm("train --recipe tiny.yaml --norm bn --norm compound --epochs 1 -q").code == 0
    return ltnorm


def test_the_command_prints_writes_and_draws(trained, tmp_path, failing):
    runs = f"{RUN.format('bn')} {RUN.format('compound')}"
    shown = trained(f"inspect {runs}")
    assert shown.code == 0, shown.err
    for word in ("blocks.2.norm2", "shift", "var", "share", "entropy", "contrast", "mean over"):
        assert word in shown.out
    assert max(map(len, shown.out.splitlines())) <= 160

    answer = trained(f"inspect {runs} --json --csv all.csv --plot all.png")
    document = json.loads(answer.out)
    assert [run["norm"] for run in document["runs"]] == ["bn", "compound"]
    with open("all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for run in document["runs"]:
        own = [row for row in rows if row["run"] == run["run"]]
        for layer in run["layers"]:
            expected = {("shift", g, ""): v for g, v in layer["shift"].items()} | {
                ("variance", g, ""): v for g, v in layer["variance"].items()
            }
            for group, shares in (layer["shares"] or {}).items():
                expected |= {("share", group, str(k)): v for k, v in enumerate(shares)}
            cells = {
                (row["quantity"], row["group"], row["component"]): float(row["value"])
                for row in own
                if row["layer"] == layer["name"]
            }
            assert {key: cells[key] for key in expected} == expected
            assert ("contrast", "", "") in cells or layer["contrast"] is None
    assert document["runs"][0]["layers"][0]["shares"] is None
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")

    one = RUN.format("compound")
    assert (
        trained(f"inspect {one} --split train --plot a.svg --layer norm --channel 3 -q").code == 0
    )
    assert "channel 3" in (tmp_path / "a.svg").read_text()
    assert trained(f"inspect {one} --plot a.pdf").code == 0
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert sorted(p.name for p in tmp_path.glob("[.a]*")) == [
        "a.pdf",
        "a.svg",
        "all.csv",
        "all.png",
    ]

    wrong = "--plot a.png --layer blocks.2.norm3"
    assert "did you mean 'blocks.2.norm2'" in failing(f"inspect {one} {wrong}", code=2)
    wrong = "--plot a.png --layer norm --channel 16"
    assert "from 0 to 15" in failing(f"inspect {one} {wrong}", code=2)
    assert "no val split" in failing(f"inspect {one} --split val", code=2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--split tset", ["tset", "did you mean 'test'"]),
        ("--layer norm", ["--plot"]),
        ("--plot a.gif", ["a.gif", ".svg"]),
        ("--plot none/a.png", ["not writable", "--plot FILE"]),
        ("--csv none/a.csv", ["not writable", "--csv FILE"]),
        ("--csv .", ["is a folder"]),
    ],
)
def test_mistakes_are_found_before_work_starts(failing, flags, words):
    text = failing(f"inspect nowhere {flags}", code=2)
    assert all(word in text for word in words), text


def test_no_checkpoint_and_no_run(failing):
    assert "no checkpoint" in failing("inspect nowhere", code=3)
    assert "--help" in failing("inspect", code=2)


def test_without_matplotlib(failing, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "ltnorm[plot]"' in failing("inspect nowhere --plot a.png", code=2)


def test_a_narrow_terminal_gets_two_tables(trained, monkeypatch):
    monkeypatch.setattr("ltnorm.console._PIPE_WIDTH", 80)
    shown = trained(f"inspect {RUN.format('compound')}").out
    assert shown.count("blocks.2.norm2") == 2
    assert max(map(len, shown.splitlines())) <= 80


def test_help_starts_without_torch():
    code = """
import sys
from ltnorm.cli import main
main(["inspect", "--help"])
print([m for m in ("torch", "numpy", "pandas", "matplotlib") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_a_device_or_link_is_written_through(tmp_path):
    from ltnorm.reporting.schema import write_text

    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
