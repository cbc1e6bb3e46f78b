import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ltnorm.console import Output
from ltnorm.data.augment import Batch
from ltnorm.norms import norm_layer
from ltnorm.recipe import Train
from ltnorm.reporting import schema
from ltnorm.resolve import Overrides, resolve
from ltnorm.training import optim
from ltnorm.training.build import (
    build_loader,
    build_loss,
    build_model,
    build_objective,
    concrete,
)
from ltnorm.training.loop import fit, step
from ltnorm.training.objective import SinglePath
from ltnorm.training.run import run
from ltnorm.training.together import alone


def at(train, epoch):
    """The learning rate of an epoch of a budget of epochs."""
    return optim.learning_rate(train, epoch, optim.part_done(train, epoch - 1, 0, 0.0))


@pytest.mark.parametrize(
    ("epoch", "lr"),
    [
        (1, 0.02),
        (4, 0.08),
        (5, 0.1),
        (6, 0.1),
        (160, 0.1),
        (161, 0.001),
        (180, 0.001),
        (181, 0.00001),
        (200, 0.00001),
    ],
)
def test_the_step_schedule_is_ldam_drws(epoch, lr):
    assert at(Train(), epoch) == pytest.approx(lr, rel=1e-9)


def test_the_cosine_schedule_starts_at_lr_and_falls_towards_zero():
    train = Train(epochs=20, lr=0.4, schedule="cosine", warmup_epochs=2)
    rates = [at(train, epoch) for epoch in range(1, 21)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.4])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[11] == pytest.approx(0.2)
    assert 0 < rates[-1] < 0.01


def test_warm_up_can_be_left_out():
    train = Train(epochs=10, warmup_epochs=0)
    assert [at(train, e) for e in (1, 8, 9, 10)] == pytest.approx([0.1, 0.1, 0.001, 0.00001])


@given(st.integers(1, 500), st.sampled_from([0.5, 0.6, 0.75, 0.8, 0.9]))
def test_a_milestone_lies_at_the_first_epoch_that_starts_after_its_part(epochs, milestone):
    train = Train(epochs=epochs, warmup_epochs=0, milestones=(milestone,))
    dropped = [e for e in range(1, epochs + 1) if at(train, e) < 0.1]
    # In integers, since 0.9 * 200 is not one in floating point.
    expected = [e for e in range(1, epochs + 1) if (e - 1) * 100 >= round(milestone * 100) * epochs]
    assert dropped == expected


@pytest.mark.parametrize("settings", [{}, {"nesterov": True}, {"momentum": 0.0}])
def test_sgd_is_torchs_bit_for_bit(settings):
    train = Train(lr=0.1, weight_decay=0.01, **settings)
    reference = lambda p: torch.optim.SGD(  # noqa: E731
        p, 0.1, momentum=train.momentum, nesterov=train.nesterov, weight_decay=0.01
    )
    assert_equal_steps(train, reference)


def test_adamw_is_torchs_bit_for_bit():
    train = Train(optimizer="adamw", lr=0.1, weight_decay=0.05, betas=(0.8, 0.99))
    reference = lambda p: torch.optim.AdamW(  # noqa: E731
        p, 0.1, betas=(0.8, 0.99), weight_decay=0.05
    )
    assert_equal_steps(train, reference)


def assert_equal_steps(train, reference):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(4, 3, generator=generator) for _ in range(3)]
    ours, theirs = ([nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizer, expected = optim.build(train, ours), reference(theirs)
    for i in range(5):
        optimizer.lr = expected.param_groups[0]["lr"] = 0.1 / (i + 1)
        optimizer.zero_grad()
        expected.zero_grad()
        for k, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            if k == 2 and i < 2:
                continue  # no gradient yet
            p.grad = torch.randn(4, 3, generator=generator)
            q.grad = p.grad.clone()
        optimizer.step()
        expected.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_spares_norms_where_asked(optimizer):
    def after_a_step(decay_norm):
        weight, gamma = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        train = Train(optimizer=optimizer, weight_decay=0.5, decay_norm=decay_norm)
        stepping = optim.build(train, [weight, gamma], undecayed=[gamma])
        weight.grad, gamma.grad = torch.zeros(2), torch.zeros(2)
        stepping.step()
        return weight.mean().item(), gamma.mean().item()

    weight, gamma = after_a_step(decay_norm=False)
    assert (weight, gamma) == (pytest.approx(0.95), 1.0)
    assert after_a_step(decay_norm=True) == (pytest.approx(0.95), pytest.approx(0.95))


@given(st.floats(0, 1, exclude_max=True), st.sampled_from(["step", "cosine"]))
def test_rates_of_a_budget_of_steps_or_seconds_are_of_its_parts(done, schedule):
    """A slower norm has the same schedule in the same time, whatever its epochs."""
    train = Train(seconds=60, lr=0.4, warmup=0.1, schedule=schedule, decay=0.5)
    if done < 0.1:
        expected = 0.004 + 0.396 * done / 0.1
    elif schedule == "cosine":
        expected = 0.2 * (1 + math.cos(math.pi * (done - 0.1) / 0.9))
    else:
        expected = 0.4 * 0.5 ** ((done >= 0.8) + (done >= 0.9))
    for epoch in (1, 7):
        assert optim.learning_rate(train, epoch, done) == pytest.approx(expected)


class Quadratic(SinglePath):
    """The loss 1/2 p' A p, whatever the images."""

    def __init__(self, matrix, start):
        super().__init__(nn.BatchNorm1d(2, affine=False), nn.Identity(), torch.zeros(1))
        self.matrix, self.p = matrix, nn.Parameter(start.clone())

    def forward(self, images, labels, other=None, share=1.0):
        self.model(images)
        return 0.5 * self.p @ self.matrix @ self.p


MATRIX = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
START = torch.tensor([1.0, -2.0], dtype=torch.float64)
NOTHING = Batch(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))


def stepped(**settings):
    train = Train(lr=0.1, momentum=0.0, weight_decay=0.0, precision="fp32", **settings)
    objective = Quadratic(MATRIX, START)
    step(objective, optim.build(train, objective.parameters()), NOTHING, train)
    return objective


def test_sam_steps_by_the_gradient_uphill():
    rho = 0.3
    gradient = MATRIX @ START
    uphill = START + rho * gradient / gradient.norm()
    objective = stepped(optimizer="sam", sam_rho=rho)
    torch.testing.assert_close(objective.p.detach(), START - 0.1 * (MATRIX @ uphill))
    # Its second forward leaves no trace in running statistics.
    assert objective.model.num_batches_tracked == 1
    plain = stepped()
    torch.testing.assert_close(objective.model.running_mean, plain.model.running_mean)
    torch.testing.assert_close(plain.p.detach(), START - 0.1 * gradient)


def test_a_large_gradient_is_clipped_to_its_norm():
    gradient = MATRIX @ START
    assert gradient.norm() > 0.5
    clipped = START - 0.1 * 0.5 * gradient / gradient.norm()
    torch.testing.assert_close(stepped(clip_grad=0.5).p.detach(), clipped, rtol=1e-5, atol=1e-6)
    assert torch.equal(stepped(clip_grad=1e6).p, stepped().p)


@pytest.mark.parametrize("norm", ["bn", "split", "compound", "brn"])
def test_uphill_the_same_function_is_asked(norm):
    """With rho towards 0 SAM is SGD, also where training reads the running state that it moves."""

    def after(optimizer):
        made = recipe_of(norm, **{"train.optimizer": optimizer})
        model = build_model(made, [9, 5, 3, 2], 8)
        objective = build_objective(made, model, [9, 5, 3, 2])
        train = made.train.model_copy(update={"sam_rho": 1e-8})
        stepping = optim.build(train, objective.parameters())
        for seed in range(3):
            images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
            batch = Batch(images, torch.tensor([0, 0, 0, 1, 1, 2, 2, 3]))
            step(objective, stepping, batch, train)
        return model

    sam, sgd = after("sam"), after("sgd")
    for ours, theirs in zip(sam.state_dict().values(), sgd.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def recipe_of(norm, **flags):
    options = {"norm.warmup": 0, "norm.ramp": 1} if norm == "brn" else {}
    base = {"model": {"name": "resnet8"}, "train": {"lr": 0.01, "precision": "fp32"}}
    return resolve(base, Overrides(flags | options, norms=[norm]))[0]


@pytest.mark.parametrize("norm", ["bn", "compound"])
def test_the_average_is_of_weights_and_statistics(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm_layer(norm)(4))
    average = optim.Average(model, 0.9)
    expected = None
    for n in range(30):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
            model(torch.randn(4, 3, 2, 2))
        average.update(model)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        decay = min(0.9, (1 + n) / (10 + n))
        if expected is None:
            expected = state
        for k, v in state.items():
            floating = v.is_floating_point()
            expected[k] = decay * expected[k] + (1 - decay) * v if floating else v
    for k, v in average.model.state_dict().items():
        torch.testing.assert_close(v, expected[k], rtol=1e-4, atol=1e-5)


def test_averaged_weights_are_what_is_evaluated(tiny_recipe, tiny_set, tmp_path):
    def accuracy(ema, **flags):
        recipe, _ = concrete(tiny_recipe(**{"train.ema": ema, "eval.every": 1, **flags}))
        return run(recipe, tiny_set, tmp_path / str(ema), Output(quiet=True)).nll

    assert accuracy(0.0) != accuracy(0.5)


def test_a_budget_of_steps_ends_within_an_epoch(tiny_recipe, tiny_set, tmp_path):
    batches = -(-sum(tiny_set.counts) // 16)
    recipe, _ = concrete(tiny_recipe(**{"train.steps": batches + 2}))
    assert recipe.train.epochs is None
    result = run(recipe, tiny_set, tmp_path, Output(quiet=True))
    assert result.steps == batches + 2
    assert result.images_processed == sum(tiny_set.counts) + 32
    assert 1 < result.epochs < 2


def test_a_budget_of_as_many_steps_costs_that_of_epochs(tiny_recipe, tiny_set, tmp_path):
    batches = -(-sum(tiny_set.counts) // 16)
    results = [
        run(concrete(tiny_recipe(**flags))[0], tiny_set, tmp_path, Output(quiet=True))
        for flags in ({"train.epochs": 3}, {"train.steps": 3 * batches})
    ]
    for column in ("epochs", "steps", "images_processed", "images_backpropagated"):
        assert getattr(results[0], column) == getattr(results[1], column)


class Watched(SinglePath):
    """Notes what each step is done with."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.seen = []

    def forward(self, images, labels, other=None, share=1.0):
        self.seen.append((self.loss.active_weight.max().item(), labels.tolist()))
        return super().forward(images, labels, other, share)


@pytest.fixture
def watched(tiny_recipe, tiny_set, monkeypatch):
    """Trains a tiny recipe: watched(**flags) -> epochs, and for each step weight, labels, rate."""

    def make(**flags):
        recipe, _ = concrete(tiny_recipe(**flags))
        model = build_model(recipe, tiny_set.counts, 8)
        objective = Watched(model, build_loss(recipe.loss, tiny_set.counts), torch.zeros(4).long())
        device = torch.device("cpu")
        loader = build_loader(recipe, tiny_set, tiny_set.open("train"), device)
        rates, plain = [], optim.Optimizer.step

        def noting(self):
            rates.append(self.lr)
            plain(self)

        monkeypatch.setattr(optim.Optimizer, "step", noting)
        with Output(quiet=True).training("", None) as progress:
            epochs = alone(fit(objective, loader, recipe.train, progress))
        return epochs, [(*seen, rate) for seen, rate in zip(objective.seen, rates, strict=True)]

    return make


def test_epochs_have_their_rates_weights_and_draws(watched):
    flags = {"train.epochs": 10, "train.warmup_epochs": 2, "train.schedule": "cosine"}
    flags |= {"loss.schedule": "drw", "sampler.name": "progressive"}
    epochs, steps = watched(**flags)
    cosine = [0.025 * (1 + math.cos(math.pi * t / 8)) for t in range(8)]
    assert [e.lr for e in epochs] == pytest.approx([0.025, 0.05, *cosine])
    assert [rate for *_, rate in steps] == pytest.approx([e.lr for e in epochs for _ in range(4)])
    weights = [weight for weight, *_ in steps]
    assert weights[:32] == [1.0] * 32  # of 10 epochs of 4 steps the first 8
    assert all(weight > 1.5 for weight in weights[32:])
    draws = torch.tensor([sum(y.count(3) for _, y, _ in steps[i : i + 4]) for i in range(0, 40, 4)])
    assert draws[0] <= 4  # of 52 images 3 are of the last class, at the end nearly a quarter
    assert draws[-1] >= 11
    assert (draws.diff() >= -1).all()


def test_steps_have_rates_and_weights_of_their_own(watched):
    flags = {"train.steps": 10, "train.warmup": 0.2, "train.schedule": "cosine"}
    _, steps = watched(**flags, **{"loss.schedule": "drw"})
    cosine = [0.025 * (1 + math.cos(math.pi * t / 8)) for t in range(8)]
    warm = [0.05 * (0.01 + 0.99 * t / 2) for t in range(2)]
    assert [rate for *_, rate in steps] == pytest.approx([*warm, *cosine])
    assert [weight > 1 for weight, *_ in steps] == [False] * 8 + [True] * 2


def test_a_budget_of_seconds_ends_when_they_are_over(tiny_recipe, tiny_set, tmp_path):
    recipe, _ = concrete(tiny_recipe(**{"train.seconds": 1.0}))
    result = run(recipe, tiny_set, tmp_path, Output(quiet=True))
    assert result.train_seconds >= 1.0
    assert result.epochs > 1


@given(st.floats(0.1, 1e4), st.floats(0, 1))
def test_seconds_done_grow_to_one(seconds, part):
    train = Train(seconds=seconds)
    assert optim.part_done(train, 3, 7, part * seconds) == pytest.approx(part)
    assert optim.part_done(Train(steps=10), 3, 7, 0) == 0.7


def test_every_optimizer_trains(tiny_recipe, tiny_set, tmp_path):
    losses = {}
    for name, lr in (("sgd", 0.05), ("sam", 0.05), ("adamw", 0.003)):
        recipe, _ = concrete(
            tiny_recipe(**{"train.optimizer": name, "train.lr": lr, "train.epochs": 16})
        )
        result = run(recipe, tiny_set, tmp_path, Output(quiet=True))
        rows = (schema.run_directory(recipe, tmp_path) / "epochs.csv").read_text().splitlines()
        first, last = (float(row.split(",")[2]) for row in (rows[1], rows[-1]))
        assert last < 0.85 * first
        losses[name] = last
        passes = 2 if name == "sam" else 1
        assert result.images_processed == passes * 16 * sum(tiny_set.counts)
    assert len(set(losses.values())) == 3


def test_a_run_spares_its_norms_from_weight_decay(tiny_recipe, tiny_set, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(optim.SGD, "_update", lambda self, p, g, decay: seen.append((p, decay)))
    for decay_norm in (True, False):
        seen.clear()
        flags = {"train.decay_norm": decay_norm, "train.weight_decay": 0.1}
        recipe, _ = concrete(tiny_recipe("compound", **flags))
        run(recipe, tiny_set, tmp_path, Output(quiet=True))
        decays = {decay: {tuple(q.shape) for q in p} for p, decay in seen}
        assert ((2, 16) in decays[0.1]) == decay_norm  # weight and bias of two components
        assert (16, 3, 3, 3) in decays[0.1]
        assert decays.get(0.0, {(2, 16)}) >= {(2, 16)}
        assert (0.0 in decays) != decay_norm
