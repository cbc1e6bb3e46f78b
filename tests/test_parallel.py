"""One run on two gloo processes against the same run on one."""

import contextlib
import json
import os
import signal

import pytest
import torch
import yaml
from conftest import TINY
from ranks import on_ranks

from ltnorm import cli, parallel
from ltnorm import resolve as recipes
from ltnorm.data.prepare import prepare
from ltnorm.errors import LtnormError, UsageError
from ltnorm.reporting import schema
from ltnorm.training import distributed, loop, optim
from ltnorm.training.build import build_loader, build_model, build_objective
from ltnorm.training.run import norm_parameters

STEPS = 3
MIXED = {"train.mixup": 0.4, "train.cutmix": 1.0, "train.cutout": 3}
# Of the norms those that meet the training in a way of their own; each is tested by itself.
CASES = {
    "bn": {"loss.name": "cb", **MIXED},
    "gn": {"loss.name": "ldam", "loss.schedule": "drw", "loss.drw_start": 0.4},
    "none": {"train.optimizer": "adamw", "train.lr": 0.001, "train.ema": 0.5},
    "nbn": {"train.optimizer": "sam", "train.clip_grad": 0.1, "train.decay_norm": False},
    "split": {"loss.name": "weighted-ce", **MIXED},
    "compound": {"norm.consistency": 0.5, "loss.name": "seesaw", "train.mixup": 0.4},
    "mode": {"model.name": "resnet8", "sampler.name": "progressive"},
}
FULL = {"norm.aux_gradient": "full", "norm.consistency": 0.5, **MIXED}


def recipe_of(norm, flags):
    # A batch of 7 is 4 and 3 images.
    flags = {"train.batch_size": 7, "train.epochs": 2} | flags
    [made] = recipes.resolve(TINY, recipes.Overrides(flags, norms=[norm], seeds=[0]))
    return made


def trained(norm, flags, data):
    """Losses of some steps in float64, and then all weights and statistics."""
    recipe = recipe_of(norm, flags)
    model = build_model(recipe, data.counts, data.image_size)
    objective = build_objective(recipe, model, data.counts).double().train()
    objective.set_progress(0.5)
    undecayed = norm_parameters(model, norm)
    optimizer = optim.build(recipe.train, objective.parameters(), undecayed)
    average = optim.Average(model, recipe.train.ema or 0.9)
    loader = build_loader(recipe, data, data.open("train"), torch.device("cpu"))
    losses = []
    for _, batch in zip(range(STEPS), loader.epoch(1, 0.5), strict=False):
        batch = batch._replace(images=batch.images.double())
        losses.append(float(loop.step(objective, optimizer, batch, recipe.train)))
        average.update(model)
    return losses, dict(objective.state_dict()), dict(average.model.state_dict())


def all_trained(data):
    cases = {norm: trained(norm, flags, data) for norm, flags in CASES.items()}
    return cases | {"both paths": trained("compound", FULL, data)}


def on_rank(rank, data):
    with distributed.joined("cpu"):
        return all_trained(data)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return prepare(recipe_of("bn", {}).dataset, folder / "raw", folder / "data")


def test_steps_on_two_ranks_are_those_of_one_process(data, tmp_path):
    codes, ranks, printed = on_ranks(on_rank, tmp_path, data)
    assert codes == [0, 0], printed
    for case, (losses, *states) in all_trained(data).items():
        for other, *others in (rank[case] for rank in ranks):
            assert losses == pytest.approx(other, rel=1e-10), case
            assert len(set(losses)) == STEPS
            for state, theirs in zip(states, others, strict=True):
                assert state.keys() == theirs.keys()
                for key in state:
                    apart = (state[key] - theirs[key]).abs().max()
                    assert apart <= 1e-10 * (1 + state[key].abs().max()), (case, key)
    for case, (_, first, _) in ranks[0].items():  # of which one writes, and the other goes on
        second = ranks[1][case][1]
        assert all(torch.equal(first[key], second[key]) for key in first), case


def command(rank, *arguments):
    return cli.main(["train", "--recipe", "../tiny.yaml", *arguments])


def rows(out):
    found = [schema.read_result(file) for file in out.rglob(schema.RESULT)]
    return {(row.norm, row.retrain): row for row in found}


def test_the_command_does_on_two_ranks_what_it_does_on_one(tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    second_stage = ["method=crt", "norm=adapting", "epochs=1"]
    asked = ["--norm", "bn", "--set", "eval.every=1"]
    asked += [word for key in second_stage for word in ("--set", f"retrain.{key}")]
    codes, given, (first, second) = on_ranks(command, tmp_path / "two", *asked)
    assert (codes, given) == ([0, 0], [0, 0]), first + second
    assert second == ""
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    assert command(0, *asked) == 0
    ones, twos = (rows(tmp_path / number / "results") for number in ("one", "two"))
    assert ones.keys() == twos.keys()
    assert len(ones) == 2
    for run, one in ones.items():
        two = twos[run]
        assert two.device.startswith("2 x cpu")
        assert two.images_processed == one.images_processed
        assert two.fingerprint == one.fingerprint
        assert two.train_loss == pytest.approx(one.train_loss, rel=1e-3)
        assert two.nll == pytest.approx(one.nll, rel=1e-3)
        assert two.all == pytest.approx(one.all, abs=100 / 24)  # one of its test images


def test_what_fails_on_rank_0_fails_on_all_and_the_next_run_goes_on(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    taken = tmp_path / "ranks/results/synthetic-exp10/resnet8-bn-ce/seed0" / schema.EPOCHS
    (taken / "in the way").mkdir(parents=True)
    asked = ["--norm", "bn", "--norm", "gn", "--epochs", "1"]
    codes, given, (first, second) = on_ranks(command, tmp_path / "ranks", *asked)
    assert (codes, given) == ([0, 0], [1, 1]), first + second
    error, hint = first.splitlines()[-2:]
    assert error.startswith("error: cannot read or write")
    assert error.endswith("(1 of 2 runs failed)")
    assert hint.startswith("hint: ")
    assert second == ""
    assert rows(tmp_path / "ranks/results").keys() == {("gn", None)}


def command_left_by_rank_1(rank, kill):
    steps, step = [], loop.step

    def last(*arguments):
        steps.append(0)
        if rank == 1 and len(steps) == 3:
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise LtnormError("a file does not decode", "mend it")
        return step(*arguments)

    loop.step = last
    return command(rank, "--norm", "bn", "--norm", "gn")


@pytest.mark.parametrize("kill", [True, False])
def test_a_lost_rank_ends_all_with_one_clear_error(tmp_path, kill):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    codes, given, (first, second) = on_ranks(command_left_by_rank_1, tmp_path / "ranks", kill)
    assert codes == [0, -signal.SIGKILL if kill else 0]
    assert given == [1, None if kill else 1]
    assert second == ""
    error, hint = first.splitlines()[-2:]
    why = "rank 1 of 2 is gone" if kill else "rank 1: a file does not decode"
    assert error.startswith(f"error: {why}")
    assert hint.startswith("hint: ")
    assert first.count("error:") == 1
    assert "Traceback" not in first
    [status] = (tmp_path / "ranks/results").rglob("status.json")
    told = json.loads(status.read_text())
    assert told["state"] == "failed"
    assert told["error"].startswith(why)


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {}])
def test_only_train_is_started_by_torchrun(monkeypatch, capsys, variables):
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"} | variables
    for key, value in ranks.items():
        monkeypatch.setenv(key, value)
    assert cli.main(["compare", "results"]) == 2
    assert capsys.readouterr().err.startswith("" if variables else "error: torchrun starts")
    assert cli.main(["train", "--device", "cuda:1", "--norm", "bn"]) == 2
    err = capsys.readouterr().err
    assert ("device 'cuda:1' is one" in err) == (not variables)


def test_a_batch_that_the_ranks_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 4)
    parallel.check_batches(52, 16)
    parallel.check_batches(53, 13)  # the last one is dropped
    for images, size in ((54, 13), (52, 3)):
        with pytest.raises(UsageError) as refused:
            parallel.check_batches(images, size)
        better = int(refused.value.hint.split()[-1])
        parallel.check_batches(images, better)
        assert images % better in (0, 1, *range(4, better))


def command_stopped_in_epoch_2(rank, step_of_signal):
    """Both ranks get SIGTERM, as from torchrun, not at the same time."""
    steps, step = [], loop.step

    def asked(*arguments):
        loss = step(*arguments)
        steps.append(0)
        if len(steps) == step_of_signal - rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    loop.step = asked
    return command(rank, "--norm", "compound", "--epochs", "3")


def test_ranks_that_are_stopped_go_on_as_if_nothing_had_happened(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    asked = ["--norm", "compound", "--epochs", "3"]
    [run] = ["results/synthetic-exp10/resnet8-compound-ce/seed0"]
    codes, _, printed = on_ranks(command, tmp_path / "whole", *asked)
    assert codes == [0, 0], printed
    _, given, (first, _) = on_ranks(command_stopped_in_epoch_2, tmp_path / "parts", 6)
    assert given[0] == 143, first
    [last] = (tmp_path / "parts" / run).glob("resume-00001-00000006-*")
    code = main_alone(tmp_path / "parts", asked)
    assert code == 1  # another number of processes: refused
    codes, given, (first, _) = on_ranks(command, tmp_path / "parts", *asked)
    assert (codes, given) == ([0, 0], [0, 0]), first
    assert "goes on after step 2 of epoch 2" in first
    whole, parts = (
        torch.load(tmp_path / name / run / "checkpoint.pt", weights_only=True)["model"]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert not last.exists()


def main_alone(folder, asked):
    with contextlib.chdir(folder):
        return command(0, *asked)
