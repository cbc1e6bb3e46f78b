import json

import pytest
import torch
import yaml
from conftest import TINY

from ltnorm.console import Output
from ltnorm.data.prepare import prepare
from ltnorm.models import classifier
from ltnorm.norms import norm_layers
from ltnorm.reporting import schema
from ltnorm.resolve import Overrides, resolve
from ltnorm.training import build, twostage
from ltnorm.training.run import load_run
from ltnorm.training.run import run as train_run

QUIET = Output(quiet=True)


@pytest.fixture
def stages(tmp_path, tiny_set):
    """Both stages: stages(method, norm="bn", **flags) -> models before and after, results."""

    def make(method, norm="bn", **flags):
        given = {"retrain.method": method, "retrain.epochs": 2} | flags
        if method in ("tau-norm", "ncm"):
            del given["retrain.epochs"]
        [recipe] = resolve(TINY, Overrides(given, norms=[norm], seeds=[0]))
        recipe, _ = build.concrete(recipe)
        first = twostage.first_stage(recipe)
        data = prepare(recipe.dataset, tmp_path / "raw", tmp_path / "data")
        before = train_run(first, data, tmp_path / "out", QUIET)

        def load(r):
            directory = schema.run_directory(r, tmp_path / "out")
            return load_run(directory, tmp_path / "raw", tmp_path / "data")

        after = twostage.run(recipe, load(first), before, tmp_path / "out", QUIET)
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
    assert second.images_processed > first.images_processed
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
    _, means, *_ = stages("ncm")
    torch.testing.assert_close(means.fc.weight.norm(dim=1), torch.ones(4))


def test_tau_is_tuned_on_validation_images(stages):
    *_, second = stages("tau-norm", **{"dataset.val": 5, "eval.split": "val"})
    tuned = second.tau
    accuracies = {}
    for tau in (0.0, tuned, 1.0, 2.0):
        *_, result = stages(
            "tau-norm", **{"dataset.val": 5, "eval.split": "val", "retrain.tau": tau}
        )
        accuracies[tau] = result.all
    assert accuracies[tuned] == max(accuracies.values())


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
    ltnorm(f"retrain {RUN} --method ncm --quiet")
    cosine = RUN.replace("-ce", "-ldam")
    cases = {
        f"retrain {RUN} --method crd": "retrain.method",
        f"retrain {RUN} --method crt --epochs 0": "retrain.epochs",
        f"retrain {RUN} --method ncm --epochs 3": "ncm does not train",
        f"retrain {RUN} --method ncm --norm-mode shifted": "retrain.norm",
        f"retrain {RUN} --method crt --tau 1": "method=tau-norm",
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
    assert document["posthoc"]["logit-adjust 0"]["nll"] == pytest.approx(document["nll"])
    # The rows of eval are those of retrain.
    for method, row in (("ncm", "ncm"), ("tau-norm --tau 1", "tau-norm 1")):
        [made] = json.loads(ltnorm(f"retrain {RUN} --method {method} --json --quiet").out)["runs"]
        assert made["all"] == document["posthoc"][row]["all"]
        assert made["tail"] == document["posthoc"][row]["tail"]
    cosine = RUN.replace("-ce", "-ldam")
    assert ltnorm(f"eval {cosine} --logit-adjust 1 --ncm").code == 0
    assert "cosine" in failing(f"eval {cosine} --tau-norm --tau 1", code=2)
    assert "validation" in failing(f"eval {RUN} --tau-norm", code=2)
    assert "validation" in failing(f"eval {RUN} --logit-adjust auto", code=2)
    assert "--logit-adjust 'x'" in failing(f"eval {RUN} --logit-adjust x", code=2)
    assert "--tau-norm" in failing(f"eval {RUN} --tau 1", code=2)


def test_corrections_are_tuned_on_validation_images_alone(ltnorm, tmp_path):
    """Labels of the test set change no tau."""
    ltnorm(f"{COMMAND} --val 5")
    command = f"eval {RUN} --tau-norm --logit-adjust auto --json"
    before = json.loads(ltnorm(command).out)["posthoc"]
    recipe = yaml.safe_load((tmp_path / RUN / "recipe.yaml").read_text())
    assert recipe["dataset"]["val"] == 5
    on_val = json.loads(ltnorm(f"{command} --split val").out)["posthoc"]
    assert list(before) == list(on_val)  # the names hold the taus
