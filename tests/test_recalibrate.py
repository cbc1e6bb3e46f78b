import copy
import csv
import json

import pytest
import torch
from torch import nn

from ltnorm import registry
from ltnorm.models import build
from ltnorm.norms import norm_layer, recalibrate, route
from ltnorm.norms.recalibrate import recalibrating, running_layers
from ltnorm.training import recalibrate as runs
from ltnorm.training.build import build_model

WITH_STATISTICS = [n for n in registry.NORMS if running_layers(norm_layer(n)(4))]


def batches(count=6, images=8):
    rng = torch.Generator().manual_seed(0)
    for i in range(count):
        yield torch.randn(images, 3, 16, 16, generator=rng) * (1 + i / 10) + i


def network(norm="bn", **options):
    torch.manual_seed(0)
    model = build("resnet8", 3, norm_layer(norm, **options))
    for x in batches(2):
        with route(model, torch.arange(len(x)) % 2):
            model(x)
    return model.eval()


def test_statistics_are_the_average_over_the_batches():
    """torch's own cumulative average, from fresh statistics."""
    model = network()
    peer = copy.deepcopy(model)
    for m in running_layers(peer):
        m.reset_running_stats()
        m.momentum = None
        m.train()
    with torch.no_grad():
        for x in batches():
            peer(x)
    recalibrate(model, batches())
    for ours, theirs in zip(running_layers(model), running_layers(peer), strict=True):
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_only_statistics_change_and_modes_come_back():
    model = network("compound")
    model.fc.train()
    before = copy.deepcopy(model)
    recalibrate(model, batches())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(layer.momentum == 0.1 for layer in running_layers(model))
    assert not any(layer._forward_pre_hooks for layer in running_layers(model))
    assert not torch.equal(model.norm.running_mean, before.norm.running_mean)


def test_what_fails_leaves_the_layers_as_they_were():
    model = network("compound")

    def fail():
        with recalibrating(model):
            model(next(batches()))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not model.norm.training
    assert model.norm.momentum == 0.1
    assert not model.norm._forward_pre_hooks


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_every_norm_with_running_statistics(name):
    model = network(name)
    groups = torch.arange(8) % 2
    recalibrate(model, ((x, groups) for x in batches()))
    assert all(b.isfinite().all() for b in model.buffers())
    assert model(next(batches())).isfinite().all()


def test_a_mixture_becomes_that_of_all_batches():
    """Two clusters: the average over batches is nearer to them than the last batch's weight."""
    layer = norm_layer("compound", components=2)(2)
    rng = torch.Generator().manual_seed(1)

    def draw():
        which = torch.rand(40, generator=rng) < 0.25
        x = torch.randn(40, 2, 4, 4, generator=rng) / 2 + 6 * which[:, None, None, None]
        return x, which.long()

    batches = [draw() for _ in range(60)]
    for x, groups in batches[:5]:
        with route(layer, groups):
            layer(x)
    recalibrate(layer, (x for x, _ in batches))
    share = float(torch.cat([g for _, g in batches]).double().mean())
    assert float(layer.mixing_weight[1]) == pytest.approx(share, abs=1e-3)
    torch.testing.assert_close(
        layer.running_mean, torch.tensor([[0.0, 0.0], [6.0, 6.0]]), atol=0.05, rtol=0
    )
    torch.testing.assert_close(layer.running_var, torch.full((2, 2), 0.25), atol=0.02, rtol=0)


def test_it_needs_statistics_and_a_batch():
    with pytest.raises(ValueError, match="no layer with running statistics"):
        recalibrate(network("gn"), batches())
    with pytest.raises(ValueError, match="no batch"):
        recalibrate(nn.Sequential(nn.BatchNorm2d(3)), iter(()))


@pytest.mark.parametrize("sampling", ["natural", "balanced"])
def test_a_pass_takes_the_classes_as_asked(tiny_recipe, tiny_set, monkeypatch, sampling):
    passed = []

    class Objective(nn.Module):
        def forward(self, images, labels, *_):
            passed.append(labels)

    monkeypatch.setattr(runs, "build_objective", lambda *_: Objective())
    recipe = tiny_recipe()
    runs.recalibrated(recipe, network(), tiny_set, sampling, torch.device("cpu"))
    counts = torch.cat(passed).bincount().tolist()
    if sampling == "natural":
        assert counts == tiny_set.counts
    else:
        assert sum(counts) == sum(tiny_set.counts)
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("norm", ["bn", "split", "compound"])
def test_a_pass_has_the_mixing_of_training(tiny_recipe, tiny_set, norm):
    def statistics(**flags):
        recipe = tiny_recipe(norm=norm, **flags)
        model = build_model(recipe, [9, 5, 3, 2], 8)
        made = runs.recalibrated(recipe, model, tiny_set, "balanced", torch.device("cpu"))
        return made.norm.running_var.mean()

    plain, mixed = statistics(), statistics(**{"train.mixup": 1.0})
    assert mixed.isfinite()
    assert mixed != plain
    assert mixed == statistics(**{"train.mixup": 1.0})


def test_eval_shows_rows_of_their_own(ltnorm):
    answer = ltnorm("train --recipe tiny.yaml --norm bn --norm compound --set train.epochs=1")
    directory = answer.out.splitlines()[-1].strip()
    plain = ltnorm(f"eval {directory}")
    both = ltnorm(f"eval {directory} --recalibrate natural --recalibrate balanced")
    assert both.code == 0, both.err
    rows = [" ".join(line.split()[:2]) for line in both.out.splitlines()[1:6] if line.strip()]
    assert rows[0] == "model all"
    assert rows[2].startswith("trained")
    assert rows[3:] == ["recalibrated natural", "recalibrated balanced"]
    document = json.loads(
        ltnorm(f"eval {directory} --json --recalibrate natural --recalibrate balanced").out
    )
    alone = json.loads(ltnorm(f"eval {directory} --json").out)
    assert alone["recalibrated"] == {}
    recalibrated = document.pop("recalibrated")
    alone.pop("recalibrated")
    assert document == alone  # the run's own numbers are what they were
    assert set(recalibrated) == {"natural", "balanced"}
    assert recalibrated["natural"]["nll"] != document["nll"]
    assert recalibrated["balanced"]["nll"] != recalibrated["natural"]["nll"]
    with open(f"{directory}/result.csv") as file:
        assert float(next(csv.DictReader(file))["nll"]) == pytest.approx(document["nll"])
    assert "trained" not in plain.out


def test_eval_refuses_what_cannot_be_recalibrated(ltnorm, failing):
    directory = ltnorm("train --recipe tiny.yaml --norm gn --set train.epochs=1").out.split()[-1]
    error = failing(f"eval {directory} --recalibrate natural", code=2)
    assert "gn has no running statistics" in error
    assert "did you mean 'natural'" in failing(f"eval {directory} --recalibrate natral", code=2)


def test_batches_may_be_lists_and_renormalization_does_not_pull_to_what_was():
    model, again = network("brn", warmup=0, ramp=0), network("brn", warmup=0, ramp=0)
    groups = torch.zeros(8, dtype=torch.int64)
    recalibrate(model, ([x, groups] for x in batches()))
    for layer in running_layers(again):
        layer.running_mean += 3  # stale
    recalibrate(again, batches())
    for ours, theirs in zip(running_layers(model), running_layers(again), strict=True):
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        assert ours.corrects
