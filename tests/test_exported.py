"""Weights in the formats of others: what was trained, bit by bit, and what it computes."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms import v2

from ltnorm import export, registry
from ltnorm.data.loader import normalize
from ltnorm.errors import LtnormError
from ltnorm.norms import norm_layer, route
from ltnorm.norms.compound import CompoundBatchNorm
from ltnorm.norms.layer import NewerStateError
from ltnorm.training import checkpoint
from ltnorm.training.trained import load_model

PAGE = Path(__file__).parent.parent / "docs" / "export.md"
RUN = "results/synthetic-exp10/resnet8-compound-ce/seed0"
TRAIN = "train --recipe tiny.yaml --norm compound --quiet"
# By the name of a branch: all norms, and the rule of `split` by which it is a mixture.
NORMS = {name: {} for name in registry.NORMS} | {
    "gn": {"group_size": 2},
    "split: posterior": {"evaluation": "posterior", "affine": "component"},
}


@pytest.fixture
def run(ltnorm, tmp_path):
    """A finished run, whose data is elsewhere."""
    assert ltnorm(TRAIN).code == 0
    (tmp_path / "data").rename(tmp_path / "away")
    return tmp_path / RUN


def model_of(run):
    saved = checkpoint.load(run)
    return load_model(run, saved, saved.parsed_recipe(), 8).eval()


def test_safetensors_hold_the_checkpoint_bit_by_bit(ltnorm, run, monkeypatch):
    answer = ltnorm(f"export {RUN}")
    assert (answer.code, answer.out) == (0, f"{RUN}/weights.safetensors\n")
    assert len(answer.err.splitlines()) == 1
    file, saved = run / "weights.safetensors", checkpoint.load(run)
    found = load_file(file)
    assert found.keys() == saved.model.keys()
    for key, value in saved.model.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key
    images = torch.randn(3, 3, 8, 8)
    assert torch.equal(export.load(file)(images), model_of(run)(images))

    monkeypatch.setattr(CompoundBatchNorm, "_version", CompoundBatchNorm._version - 1)
    with pytest.raises(LtnormError, match="saved by a newer release") as caught:
        export.load(file)
    assert isinstance(caught.value.__cause__, NewerStateError)
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(LtnormError, match="damaged"):
        export.load(file)


def test_onnx_computes_what_the_run_computes(ltnorm, tmp_path):
    run = tmp_path / RUN.replace("compound", "bn")
    assert ltnorm(TRAIN.replace("compound", "bn")).code == 0
    answer = ltnorm(f"export {run} --format onnx --output model.onnx --json")
    assert answer.code == 0
    assert len(answer.err.splitlines()) == 1
    document = json.loads(answer.out)
    assert document["file"] == "model.onnx"
    assert document["metadata"]["image_size"] == 8
    assert document["metadata"]["classes"] == [f"texture-{i}" for i in range(4)]
    session = onnxruntime.InferenceSession("model.onnx")
    [images], [logits] = session.get_inputs(), session.get_outputs()
    assert (images.name, images.shape[1:], images.type) == ("images", [3, 8, 8], "tensor(float)")
    assert (logits.name, logits.shape[1:]) == ("logits", [4])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["mean"]) == document["metadata"]["mean"]
    assert about["fingerprint"] == checkpoint.load(run).parsed_recipe().fingerprint()
    assert "/ltnorm/" not in str(onnx.load("model.onnx"))  # no paths of this machine
    agree(session, model_of(run))

    assert ltnorm(f"export {run}").code == 0
    Path("model.onnx").rename(run / "model.onnx")
    check_examples(run)


def check_examples(run):
    """The examples of the page, on a photo that has to be resized and cropped."""
    pixels = np.random.default_rng(0).integers(0, 256, (31, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    text = PAGE.read_text().replace("photo.jpg", "photo.png")
    first, second = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = {}
    exec(re.sub('Path\\(".*"\\)', f"Path({str(run)!r})", first).replace("32, 32", "8, 8"), names)
    assert torch.equal(names["logits"], model_of(run)(torch.zeros(1, 3, 8, 8)))
    exec(second, names)
    change = v2.Compose([v2.PILToTensor(), v2.Resize(8), v2.CenterCrop(8)])
    seen = change(Image.open("photo.png")).permute(1, 2, 0)[None]
    assert (names["resize"], names["classes"][0]) == (8, "texture-0")
    expected = names["model"](normalize(seen, names["mean"], names["std"]))
    # Pillow and torchvision round a resized pixel each in its own way.
    torch.testing.assert_close(torch.from_numpy(names["logits"]), expected, rtol=0.02, atol=0.02)


def agree(session, model):
    for count in (1, 2, 7):
        images = torch.randn(count, 3, 8, 8)
        [found] = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, model(images).numpy(), rtol=1e-4, atol=1e-5)


class Branches(nn.Module):
    """A branch a norm, each with four logits of its own, so that one export is of all norms."""

    def __init__(self):
        super().__init__()
        norms = [norm_layer(name.split(":")[0], **options) for name, options in NORMS.items()]
        self.norms = nn.ModuleList(norm(4) for norm in norms)
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, images):
        x = self.conv(images)
        return torch.cat([self.fc(norm(x).relu().mean((2, 3))) for norm in self.norms], 1)


def test_norms_compute_the_same_in_onnx():
    torch.manual_seed(0)
    model, groups = Branches().train(), torch.tensor([0, 1, 0, 1, 0, 1])
    for parameter in model.norms.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    for step in range(3):  # statistics and components of their own
        with route(model, groups):
            shift = 2.0 * groups[:, None, None, None]
            model(torch.randn(6, 3, 8, 8) * (1 + step) + shift)
    model.eval()
    logits = model(torch.randn(5, 3, 8, 8)).unflatten(1, (len(NORMS), 4))
    for i in range(len(NORMS)):  # no norm stands for another
        for j in range(i):
            assert (logits[:, i] - logits[:, j]).abs().max() > 1e-3, (i, j)
    agree(onnxruntime.InferenceSession(export.onnx(model, 8, {})), model)


def test_what_is_not_exported(ltnorm, failing, run, monkeypatch):
    assert "'onnx'?" in failing(f"export {RUN} --format onx", code=2)
    text = failing(f"export {RUN} --output nowhere/w.safetensors", code=2)
    assert "nowhere/w.safetensors is not writable" in text
    assert ltnorm(f"export {RUN} --quiet").err == ""
    before = load_file(run / "weights.safetensors")
    assert "is there already" in failing(f"export {RUN}/checkpoint.pt", code=2)
    assert ltnorm(f"export {RUN}/checkpoint.pt --force").code == 0
    after = load_file(run / "weights.safetensors")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        for kind, needed in (("safetensors", "safetensors"), ("onnx", "onnx and onnxscript")):
            text = failing(f"export {RUN} --format {kind} --force", code=2)
            assert f"needs {needed}" in text
            assert 'pip install "ltnorm[export]"' in text

    assert "no checkpoint" in failing("export results/none", code=3)
    (run / "result.csv").rename(run / "kept")
    assert "not a finished run" in failing(f"export {RUN} --force", code=1)
    (run / "kept").rename(run / "result.csv")
    file = run / "checkpoint.pt"
    whole = file.read_bytes()
    content = torch.load(file, weights_only=True)
    torch.save(content | {"inputs": None}, file)  # as before there were any
    assert "earlier version" in failing(f"export {RUN} --force", code=1)
    assert ltnorm(f"export {RUN} --force --data-dir away").code == 0
    file.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in failing(f"export {RUN} --force", code=1)
    assert not list(run.glob(".*"))
