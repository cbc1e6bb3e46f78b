import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY

from ltnorm.console import Output
from ltnorm.data.prepare import prepare
from ltnorm.evaluation import posthoc
from ltnorm.models import classifier
from ltnorm.norms import norm_layers
from ltnorm.reporting import schema
from ltnorm.resolve import Overrides, resolve
from ltnorm.training import build, checkpoint, twostage
from ltnorm.training.run import run as train_run
from ltnorm.training.trained import load_run

QUIET = Output(quiet=True)


@pytest.fixture
def stages(tmp_path, tiny_set):
    """Both stages: stages(method, norm="bn", **flags) -> models before and after, results."""

    def make(method, norm="bn", **flags):
        given = {"retrain.method": method, "retrain.epochs": 2} | flags
        if method in ("tau-norm", "logit-adjust", "ncm"):
            del given["retrain.epochs"]
        [recipe] = resolve(TINY, Overrides(given, norms=[norm], seeds=[0]))
        recipe, _ = build.concrete(recipe)
        first = twostage.first_stage(recipe)
        data = prepare(recipe.dataset, tmp_path / "raw", tmp_path / "data")
        before = train_run(first, data, tmp_path / "out", QUIET)

        def load(r, loader=load_run):
            directory = schema.run_directory(r, tmp_path / "out")
            return loader(directory, tmp_path / "raw", tmp_path / "data")

        after = twostage.run(recipe, load(first, twostage.load_first), tmp_path / "out", QUIET)
        return load(first).model, load(recipe).model, before, after

    return make


def changed(before, after):
    """The names of what is not the same in two models."""
    old, new = before.state_dict(), after.state_dict()
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize("norm", ["bn", "gn", "compound"])
def test_crt_trains_the_classifier_alone(stages, norm):
    before, after, first, second = stages("crt", norm)
    assert changed(before, after) == {"fc.weight", "fc.bias"}
    # Another start, and not only another scale.
    similarity = torch.cosine_similarity(before.fc.weight, after.fc.weight, dim=1)
    assert similarity.max() < 0.99
    assert second.epochs == first.epochs + 2
    images = first.images_backpropagated  # two epochs of each stage
    assert second.images_processed == first.images_processed + images
    assert second.images_backpropagated == images  # frozen: the classifier alone
    assert second.train_seconds > first.train_seconds
    assert (first.retrain, second.retrain) == (None, "crt")


@pytest.mark.parametrize("norm", ["bn", "split", "compound"])
def test_shifted_statistics_go_on_with_weight_and_bias_fixed(stages, norm):
    before, after, *_ = stages("crt", norm, **{"retrain.norm": "shifted"})
    names = changed(before, after) - {"fc.weight", "fc.bias"}
    assert names
    assert {name.rpartition(".")[2] for name in names} <= {
        "running_mean",
        "running_var",
        "mixing_weight",
        "num_batches_tracked",
    }


def test_adapting_trains_the_norms_besides(stages):
    before, after, *_ = stages("crt", "bn", **{"retrain.norm": "adapting"})
    names = changed(before, after)
    layers = norm_layers(before, "bn")
    assert {f"{path}.weight" for path in layers} <= names
    assert not any("conv" in name for name in names)


def test_lws_scales_each_class(stages):
    before, after, *_ = stages("lws", **{"retrain.lr": 1.0})
    assert changed(before, after) == {"fc.weight", "fc.bias"}
    ratio = after.fc.weight / before.fc.weight
    factors = ratio.mean(1)
    torch.testing.assert_close(ratio, factors[:, None].expand_as(ratio), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after.fc.bias, before.fc.bias * factors, rtol=1e-3, atol=1e-5)
    assert factors.std() > 0.01


def test_tau_norm_and_ncm_need_no_training(stages):
    before, after, first, second = stages("tau-norm", **{"retrain.tau": 1.0})
    torch.testing.assert_close(after.fc.weight.norm(dim=1), torch.ones(4))
    assert not after.fc.bias.any()
    assert changed(before, after) == {"fc.weight", "fc.bias"}
    assert (second.epochs, second.tau) == (first.epochs, 1.0)
    _, means, _, third = stages("ncm")
    torch.testing.assert_close(means.fc.weight.norm(dim=1), torch.ones(4))
    assert third.images_processed == first.images_processed * 3 / 2  # a pass beside two epochs


@pytest.mark.parametrize("method", ["tau-norm", "logit-adjust"])
def test_tau_is_tuned_on_validation_images(stages, tmp_path, method):
    before, after, _, second = stages(method, **{"dataset.val": 5})
    [recipe] = resolve(TINY, Overrides({"dataset.val": 5}))
    data = prepare(recipe.dataset, tmp_path / "raw", tmp_path / "data")
    held = posthoc.outputs(before, data, "val", torch.device("cpu"))

    def accuracy(tau):
        layer = posthoc.corrected(before.fc, method, tau, data.counts)
        return (layer(held.features).argmax(1) == held.labels).float().mean()

    assert second.tau == max(posthoc.TAUS, key=lambda tau: (accuracy(tau), -tau))
    expected = posthoc.corrected(before.fc, method, second.tau, data.counts)
    assert torch.equal(after.fc.weight, expected.weight)
    assert torch.equal(after.fc.bias, expected.bias)


def test_adjusting_logits_is_adjusting_the_bias(stages):
    before, after, *_ = stages("logit-adjust", **{"retrain.tau": 1.5})
    x = torch.randn(6, 3, 8, 8)
    counts = [30, 13, 6, 3]
    torch.testing.assert_close(after(x), posthoc.adjust_logits(before(x), counts, 1.5))


def test_a_cosine_classifier_is_retrained_as_one(stages):
    before, after, *_ = stages("crt", **{"loss.name": "ldam", "retrain.loss.name": "ldam"})
    assert type(classifier(after)) is type(classifier(before))
    assert changed(before, after) == {"fc.weight"}


COMMAND = "train --recipe tiny.yaml --norm bn --seed 0 --quiet"
RUN = "results/synthetic-exp10/resnet8-bn-ce/seed0"


def test_retrain_is_what_train_makes_of_the_whole_recipe(ltnorm, tmp_path):
    assert ltnorm(COMMAND).code == 0
    answer = ltnorm(f"retrain {RUN} --method crt --epochs 2 --json")
    assert answer.code == 0, answer.err
    [made] = json.loads(answer.out)["runs"]
    assert made["directory"] == "results/synthetic-exp10/resnet8-bn-ce-crt/seed0"
    again = ltnorm(f"{COMMAND} --json --out other --set retrain.method=crt --set retrain.epochs=2")
    [whole] = json.loads(again.out)["runs"]
    assert whole["directory"].startswith("other/")
    for column in ("fingerprint", "all", "nll", "train_loss", "epochs", "images_processed"):
        assert made[column] == whole[column]
    # The first stage is a run of its own, and both are repeated by the recipe of the second.
    assert (tmp_path / "other/synthetic-exp10/resnet8-bn-ce/seed0/result.csv").is_file()
    repeated = ltnorm(f"train --recipe {made['directory']} --out third --json --quiet")
    assert json.loads(repeated.out)["runs"][0]["nll"] == made["nll"]
    # eval says what the row says, and a second call finds it finished.
    evaluated = json.loads(ltnorm(f"eval {made['directory']} --json").out)
    assert evaluated["nll"] == pytest.approx(made["nll"])
    assert "is finished" in ltnorm(f"retrain {RUN} --method crt --epochs 2").err


def test_a_finished_first_stage_is_used(ltnorm):
    ltnorm(COMMAND)
    answer = ltnorm(f"{COMMAND} --set retrain.method=ncm".replace("--quiet", ""))
    assert answer.code == 0, answer.err
    assert f"{RUN} is finished" in answer.err
    assert "resnet8-bn-ce-ncm/seed0" in answer.out
    assert "then ncm" in answer.out


def test_several_runs_are_retrained_into_their_own_tree(ltnorm):
    ltnorm("train --recipe tiny.yaml --norm bn --norm gn --quiet --out here/deep")
    runs = [f"here/deep/synthetic-exp10/resnet8-{norm}-ce/seed0" for norm in ("bn", "gn")]
    answer = ltnorm("retrain --method ncm --quiet", *runs)
    assert answer.code == 0, answer.err
    for run in runs:
        assert run.replace("-ce/", "-ce-ncm/") in answer.out


def test_what_makes_no_sense_is_refused_by_name(ltnorm, failing, tmp_path):
    ltnorm(COMMAND)
    ltnorm(f"{COMMAND} --loss ldam")
    ltnorm(COMMAND.replace("bn", "gn"))
    ltnorm(f"retrain {RUN} --method ncm --quiet")
    cosine = RUN.replace("-ce", "-ldam")
    cases = {
        f"retrain {RUN} --method crd": "retrain.method",
        f"retrain {RUN} --method crt --epochs 0": "retrain.epochs",
        f"retrain {RUN} --method ncm --epochs 3": "ncm does not train",
        f"retrain {RUN} --method ncm --norm-mode shifted": "retrain.norm",
        f"retrain {RUN} --method crt --tau 1": "only with tau-norm and logit-adjust",
        f"retrain {RUN} --method tau-norm --tau x": "retrain.tau",
        f"retrain {RUN} --method ncm --set retrain.loss.label_smoothing=0.1": "retrain.loss",
        f"retrain {RUN} --method crt --set seed=1": "first stage",
        f"retrain {RUN} --method crt --device cuda:9": "is not there",
        f"retrain {RUN.replace('bn', 'gn')} --method crt --norm-mode shifted": "no running",
        f"retrain {cosine} --method crt --loss ldam --set retrain.loss.scale=10": "scale of 30",
        f"retrain {cosine} --method logit-adjust --tau 1": "retrain.method",
        f"retrain {RUN} --method tau-norm": "validation",
        f"retrain {RUN} --method crt --set train.lr=1": "first stage",
        f"retrain {RUN} --method crt --loss ldam": "cosine",
        f"retrain {RUN} --method crt --loss nothing": "unknown loss 'nothing'",
        f"retrain {RUN.replace('-ce', '-ce-ncm')} --method crt": "second stage itself",
        f"retrain {cosine} --method lws": "lws",
        f"retrain {cosine} --method tau-norm --tau 1": "tau-norm",
    }
    for command, said in cases.items():
        assert said in failing(command, code=2), command
    assert "no checkpoint" in failing("retrain nowhere --method crt", code=3)
    (tmp_path / RUN / "result.csv").unlink()
    assert "not a finished run" in failing(f"retrain {RUN} --method crt --quiet", code=1)


def test_corrections_are_rows_of_eval(ltnorm, failing):
    ltnorm(COMMAND)
    ltnorm(f"{COMMAND} --loss ldam")
    answer = ltnorm(f"eval {RUN} --tau-norm --tau 1 --logit-adjust 1 --logit-adjust 0 --ncm")
    assert answer.code == 0, answer.err
    for row in ("trained", "tau-norm 1", "logit-adjust 1", "logit-adjust 0", "ncm"):
        assert f"\n{row} " in answer.out
    document = json.loads(
        ltnorm(f"eval {RUN} --tau-norm --tau 1 --ncm --logit-adjust 0 --json").out
    )
    corrected = {row["method"]: row for row in document["posthoc"]}
    assert corrected["logit-adjust"]["nll"] == pytest.approx(document["nll"])
    # The rows of eval are those of retrain.
    for method in ("ncm", "tau-norm --tau 1", "logit-adjust --tau 0"):
        [made] = json.loads(ltnorm(f"retrain {RUN} --method {method} --json --quiet").out)["runs"]
        for metric in ("all", "tail", "nll", "ece"):
            assert made[metric] == pytest.approx(corrected[method.split()[0]][metric], rel=1e-4)
    cosine = RUN.replace("-ce", "-ldam")
    assert ltnorm(f"eval {cosine} --logit-adjust 1 --ncm").code == 0
    assert "cosine" in failing(f"eval {cosine} --tau-norm --tau 1", code=2)
    assert "validation" in failing(f"eval {RUN} --tau-norm", code=2)
    assert "validation" in failing(f"eval {RUN} --logit-adjust auto", code=2)
    assert "--logit-adjust 'x'" in failing(f"eval {RUN} --logit-adjust x", code=2)
    assert "--tau-norm" in failing(f"eval {RUN} --tau 1", code=2)


def test_corrections_are_tuned_on_validation_images_alone(ltnorm, failing):
    ltnorm(f"{COMMAND} --val 5")
    answer = ltnorm(f"eval {RUN} --tau-norm --logit-adjust auto")
    assert answer.out.count(" (tuned)") == 2
    rows = json.loads(ltnorm(f"eval {RUN} --tau-norm --logit-adjust auto --json").out)["posthoc"]
    for row in rows:
        answer = ltnorm(f"retrain {RUN} --method {row['method']} --json --quiet")
        assert json.loads(answer.out)["runs"][0]["tau"] == row["tau"]
        assert row["tuned"]
    assert "very images" in failing(f"eval {RUN} --tau-norm --split val", code=2)
    assert "very images" in failing(
        "train --recipe tiny.yaml --val 5 --eval-split val --set retrain.method=tau-norm", code=2
    )


def test_a_second_stage_follows_its_first(ltnorm, tmp_path):
    ltnorm("train --recipe tiny.yaml --norm bn --quiet")
    retrain = f"retrain {RUN} --method ncm"
    assert ltnorm(f"{retrain} --quiet").code == 0
    assert "is finished" in ltnorm(retrain).err
    # As another machine, or a budget of seconds, would leave it.
    first = checkpoint.load(tmp_path / RUN)
    first.model["fc.bias"] += 0.01
    checkpoint.save(tmp_path / RUN / checkpoint.NAME, first)
    assert "of another first stage" in ltnorm(f"{retrain} --dry-run").out
    assert "another first stage" in ltnorm(retrain).err
    assert "is finished" in ltnorm(retrain).err


def test_a_second_stage_is_dry_run(ltnorm, failing, tmp_path):
    ltnorm(COMMAND)
    before = sorted(tmp_path.rglob("*"))
    answer = ltnorm(f"retrain {RUN} --method crt --norm-mode shifted --dry-run")
    assert answer.code == 0, answer.err
    assert "norm: shifted" in answer.out
    [planned] = [line for line in answer.out.splitlines() if line.startswith("results/")]
    assert planned.startswith(f"{RUN.replace('-ce', '-ce-crt-shifted')}  ")
    assert planned.endswith("new")
    assert sorted(tmp_path.rglob("*")) == before
    command = "train --recipe tiny.yaml --norm gn --set retrain.method=crt --dry-run"
    assert "no running" in failing(f"{command} --set retrain.norm=shifted --quiet", code=2)
    stages = ltnorm(command).out.splitlines()[-2:]
    assert ["-crt/" in line for line in stages] == [False, True]


def test_a_copied_run_is_retrained_into_results(ltnorm, failing, tmp_path):
    ltnorm(COMMAND)
    ltnorm(f"{COMMAND} --loss ldam")
    shutil.copytree(RUN, tmp_path / "alone")
    answer = ltnorm("retrain alone --method ncm --quiet")
    assert answer.code == 0, answer.err
    assert RUN.replace("-ce", "-ce-ncm") in answer.out
    shutil.copy(Path(RUN.replace("-ce", "-ldam")) / "checkpoint.pt", tmp_path / "alone")
    assert "is not of the run" in failing("retrain alone --method ncm --quiet", code=1)


def test_a_tag_of_the_second_stage_leaves_the_first_alone(ltnorm):
    ltnorm(COMMAND)
    answer = ltnorm(f"retrain {RUN} --method ncm --tag again --quiet")
    directory = RUN.replace("-ce", "-ce-ncm-again")
    assert directory in answer.out
    assert "tag again" in answer.out
    with open(f"{directory}/result.csv") as file:
        assert next(csv.DictReader(file))["tag"] == "again"
    repeated = ltnorm(f"train --recipe {directory} --dry-run")
    assert f"{RUN}  " in repeated.out


def test_sigmoid_losses_start_a_second_stage_at_equal_probabilities(stages):
    flags = {"loss.name": "cb", "retrain.loss.name": "cb", "retrain.lr": 1e-9}
    _, after, *_ = stages("crt", **flags)
    torch.testing.assert_close(after.fc.bias.sigmoid(), torch.full((4,), 0.25))


@pytest.fixture
def fits(monkeypatch):
    """What the training of second stages was given, noted as it starts."""
    seen = []
    fit = twostage.fit

    def watching(objective, loader, train, progress, **more):
        objective.train()
        modes = {name for name, m in objective.model.named_modules() if m.training}
        seen.append((objective, modes, loader.sampler(0.0), train))
        return fit(objective, loader, train, progress, **more)

    monkeypatch.setattr(twostage, "fit", watching)
    return seen


def test_a_second_stage_trains_as_it_says(stages, fits):
    flags = {"retrain.loss.name": "balanced-softmax", "retrain.lr": 0.03}
    flags |= {"train.mixup": 1.0, "train.optimizer": "adamw", "train.weight_decay": 0.1}
    stages("crt", "compound", **flags)
    [(objective, modes, q, train)] = fits
    assert type(objective.loss.per_image).__name__ == "BalancedSoftmax"
    assert (train.epochs, train.lr, train.schedule, train.warmup_epochs) == (2, 0.03, "cosine", 0)
    assert (train.optimizer, train.momentum, train.weight_decay) == ("sgd", 0.9, 0.1)
    assert train.mixup == 0
    assert q.tolist() == [0.25] * 4
    assert modes == set()


@pytest.mark.parametrize("mode", ["shifted", "adapting"])
def test_only_norm_layers_are_in_training(stages, fits, mode):
    flags = {"retrain.norm": mode, "norm.consistency": 1.0, "retrain.sampler.name": "sqrt"}
    stages("crt", "compound", **flags)
    [(objective, modes, q, _)] = fits
    layers = norm_layers(objective.model, "compound")
    inside = {
        f"{path}.{name}" if name else path
        for path, layer in layers.items()
        for name, _ in layer.named_modules()
    }
    assert modes == inside
    assert objective.projector is None
    counts = torch.tensor([30.0, 13, 6, 3]).sqrt()
    torch.testing.assert_close(torch.from_numpy(q).float(), counts / counts.sum())
