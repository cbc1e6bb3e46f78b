"""`train --dry-run`, and with it every shipped recipe."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from ltnorm import registry
from ltnorm.data import long_tail_counts
from ltnorm.data.datasets import MissingData
from ltnorm.data.prepare import prepare, preview
from ltnorm.pretrained import pretrained_sha256
from ltnorm.resolve import shipped_recipes
from ltnorm.training import build, checkpoint
from ltnorm.validation import validate

# The rows of the published CIFAR-LT table (docs/training.md), by the names of their recipes.
METHODS = ("focal", "cb-focal", "ldam", "ce-drw", "ldam-drw")
METHODS += ("balanced-softmax", "logit-adjust", "tau-norm", "crt")
ROWS = ["cifar10-lt", *(f"cifar10-lt-{method}" for method in METHODS)]


def files(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*"))


def test_every_row_of_the_published_table_has_a_recipe():
    assert set(ROWS) <= set(shipped_recipes())


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_is_dry_run_without_its_data(ltnorm, tmp_path, name):
    before = files(tmp_path)
    answer = ltnorm(f"train --recipe {name} --norm bn --norm compound --dry-run --json")
    assert answer.code == 0, answer.err
    document = json.loads(answer.out)
    resolved = validate(document["recipes"][0])
    stages = 2 if resolved.retrain else 1
    assert [run["norm"] for run in document["runs"]] == ["bn"] * stages + ["compound"] * stages
    assert all(run["state"] == "new" for run in document["runs"])
    if registry.DATASETS[resolved.dataset.name].natural:  # its counts lie in the data
        assert document["counts"] is None
    else:
        assert len(document["counts"]) >= 6
    assert resolved.fingerprint() == document["runs"][stages - 1]["fingerprint"]
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ROWS)
def test_every_row_builds_its_objective(name):
    recipe = validate(yaml.safe_load(shipped_recipes()[name].read_text()))
    counts = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    model = build.build_model(recipe, counts, 32)
    objective = build.build_objective(recipe, model, counts)
    loss = objective(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 5, 9]))
    assert loss.isfinite()
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.lr) == (200, 128, 0.1)


@pytest.mark.parametrize(("name", "n_max"), [("cifar10", 5000), ("cifar100", 500)])
def test_counts_are_known_before_the_data_is_there(tmp_path, name, n_max):
    spec = validate({"dataset": {"name": name, "ratio": 50, "class_order": "reversed"}}).dataset
    with pytest.raises(MissingData):
        prepare(spec, tmp_path, tmp_path)
    known = preview(spec, tmp_path, tmp_path)
    classes = registry.DATASETS[name].size[0]
    assert known.counts == long_tail_counts(n_max, classes, 50)[::-1]
    assert (known.image_size, known.splits) == (32, ["train", "test"])
    held = validate({"dataset": {"name": name, "ratio": 50, "val": 20}}).dataset
    assert preview(held, tmp_path, tmp_path).counts == long_tail_counts(n_max - 20, classes, 50)


def test_sizes_of_the_registry_are_those_of_the_data(real_data, tmp_path):
    spec = validate({"dataset": {"name": "cifar10"}}).dataset
    expected = preview(spec, tmp_path, tmp_path)
    assert preview(spec, real_data, tmp_path) == expected
    made = prepare(spec, real_data, tmp_path)
    assert (made.counts, made.image_size) == (expected.counts, expected.image_size)


def test_what_is_printed_is_what_is_run(ltnorm, tmp_path):
    command = "train --recipe tiny.yaml --norm gn --norm split --seeds 0-1"
    dry = ltnorm(f"{command} --dry-run")
    assert dry.code == 0, dry.err
    assert not (tmp_path / "results").exists()
    text, _, rest = dry.out.partition("\n# split in its place\n")
    assert yaml.safe_load(text)["norm"]["name"] == "gn"
    assert yaml.safe_load(rest.partition("\n\n")[0])["norm"]["name"] == "split"
    assert "52 training images of 4 classes: 30 13 6 3" in dry.out
    planned = [line.split("  ")[0] for line in dry.out.splitlines() if line.startswith("results/")]
    done = ltnorm(command)
    assert [line for line in done.out.splitlines() if line.startswith("results/")] == planned
    again = ltnorm(f"{command} --dry-run")
    assert again.out.count("finished, would be skipped") == 4
    assert ltnorm(f"{command} --dry-run --force").out.count("would be repeated") == 4
    other = ltnorm(f"{command} --lr 0.01 --dry-run")
    assert "resnet8-gn-ce-" in other.out  # the plain name is taken


def test_what_would_fail_fails_dry(failing):
    assert "batch size" in failing(
        "train --recipe tiny.yaml --batch-size 5000 --dry-run --quiet", code=2
    )
    assert "components" in failing(
        "train --recipe tiny.yaml --norm split --set norm.components=9 --dry-run --quiet", code=2
    )
    assert "unknown loss" in failing("train --loss ldamm --dry-run", code=2)


def test_pretrained_weights_are_known_by_their_content(ltnorm, failing, tmp_path):
    ltnorm("train --recipe tiny.yaml --norm bn --quiet")
    weights = "results/synthetic-exp10/resnet8-bn-ce/seed0/checkpoint.pt"
    command = "train --recipe tiny.yaml --norm bn --norm compound --tag fine --json --quiet"
    answer = ltnorm(f"{command} --pretrained {weights}")
    assert answer.code == 0, answer.err
    runs = json.loads(answer.out)["runs"]
    assert len(runs) == 2
    saved = yaml.safe_load((tmp_path / runs[0]["directory"] / "recipe.yaml").read_text())
    assert saved["model"]["pretrained"] == pretrained_sha256(tmp_path / weights)
    # It starts where the other ended: an epoch at next to no rate leaves the weights there.
    still = ltnorm(f"{command} --pretrained {weights} --lr 1e-12 --epochs 1")
    source = checkpoint.load(tmp_path / weights).model
    for run in json.loads(still.out)["runs"]:
        started = checkpoint.load(tmp_path / run["directory"]).model
        for name in ("conv.weight", "blocks.2.conv2.weight", "fc.weight"):
            torch.testing.assert_close(started[name], source[name])
    assert "--pretrained FILE" in failing(f"train --recipe {runs[0]['directory']} --quiet", code=2)
    repeated = ltnorm(f"train --recipe {runs[0]['directory']} --pretrained {weights} --quiet")
    assert repeated.code == 0
    assert ltnorm(f"eval {runs[1]['directory']}").code == 0  # the checkpoint has all weights
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    assert "bad.pth" in failing(f"{command} --pretrained bad.pth", code=2)
    assert "gone.pth" in failing(f"{command} --pretrained gone.pth", code=2)
    assert "do not fit" in failing(f"{command} --pretrained {weights} --model resnet14", code=2)
