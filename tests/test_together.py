"""How steps are computed changes no result: together, as a graph, compiled, deterministic."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from test_resume import metrics, same

from ltnorm.console import Output
from ltnorm.errors import LtnormError, UsageError
from ltnorm.launch import Place
from ltnorm.recipe import Train
from ltnorm.reporting import schema
from ltnorm.training import device, graph, loop, optim, run
from ltnorm.training.build import build_loader, build_model, build_objective, concrete
from ltnorm.training.loop import fit
from ltnorm.training.together import alone, together

QUIET = Output(quiet=True)
FULL = {"norm.aux_gradient": "full", "norm.consistency": 0.5}


def trained(recipe, data, **computing):
    """A generator of a training that comes to its weights and the losses of its epochs."""
    recipe, _ = concrete(recipe)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=computing)})
    loader = build_loader(recipe, data, data.open("train"), torch.device("cpu"))
    model = build_model(recipe, data.counts, data.image_size)
    objective = build_objective(recipe, model, data.counts)
    with QUIET.training("", None) as progress:
        epochs = yield from fit(objective, loader, recipe.train, progress)
    weights = {k: v.cpu() for k, v in objective.state_dict().items()}
    return weights, [epoch.loss for epoch in epochs]


@pytest.mark.parametrize(("norm", "flags"), [("bn", {}), ("compound", FULL)])
def test_seeds_trained_together_are_those_trained_alone(
    tiny_recipe, tiny_set, tmp_path, norm, flags
):
    recipes = [tiny_recipe(norm, seed, **flags) for seed in range(3)]
    for recipe in recipes:
        run.run(recipe, tiny_set, tmp_path / "alone", QUIET)
    together([run.steps(recipe, tiny_set, tmp_path / "together", QUIET) for recipe in recipes])
    for recipe in recipes:
        a, b = (schema.run_directory(recipe, tmp_path / name) for name in ("alone", "together"))
        assert same(a, b)


def drawing(seed: int, steps: int, graph: bool = False):
    """A training whose model draws from the global generator, as dropout does."""

    class Draw:
        train = Train(graph=graph)

        def make(self):
            return torch.rand(())

    torch.manual_seed(seed)
    found = []
    for _ in range(steps):
        made = yield Draw()
        found += [float(made.loss), float(torch.rand(())), made.share]
    return found


def test_each_draws_its_own_random_numbers():
    apart = [alone(drawing(seed, 3)) for seed in (0, 1)]
    beside = together([drawing(seed, 3) for seed in (0, 1)])
    for one, other in zip(apart, beside, strict=True):
        assert [n for i, n in enumerate(one) if i % 3 < 2] == [
            n for i, n in enumerate(other) if i % 3 < 2
        ]
        assert one[2::3] == [1.0] * 3
        assert other[2::3] == [0.5] * 3


def test_what_a_graph_draws_goes_on_from_step_to_step(monkeypatch):
    made = lambda self, updates: [update.make() for update in updates]  # noqa: E731
    monkeypatch.setattr(graph.Graphs, "make", made)
    drawn = [n for run in together([drawing(s, 3, graph=True) for s in (0, 1)]) for n in run[::3]]
    assert len(set(drawn)) == 6


def test_evaluating_one_is_not_charged_to_another(tiny_recipe, tiny_set, tmp_path, monkeypatch):
    evaluate = run.evaluate_split

    def slowly(*arguments):
        time.sleep(0.5)
        return evaluate(*arguments)

    monkeypatch.setattr(run, "evaluate_split", slowly)
    recipes = [tiny_recipe("bn", seed, **{"eval.every": 1}) for seed in range(3)]
    made = together([run.steps(recipe, tiny_set, tmp_path, QUIET) for recipe in recipes])
    assert max(result.train_seconds for result in made) < 0.5


def test_each_is_told_as_it_ends():
    told = []
    together([drawing(0, 3), drawing(1, 1)], [lambda _: told.append(0), lambda _: told.append(1)])
    assert told == [1, 0]


def test_a_compiler_that_fails_is_an_error_of_the_run(tiny_recipe, tiny_set, tmp_path, monkeypatch):
    from torch._inductor.exc import InductorError

    def broken(forward, **options):
        def fails(*inputs):
            raise InductorError(RuntimeError("no C++ compiler\nat length"), None)

        return fails

    monkeypatch.setattr(torch, "compile", broken)
    recipe = tiny_recipe("bn", **{"train.compile": True})
    with pytest.raises(LtnormError, match=r"torch\.compile failed") as raised:
        run.run(recipe, tiny_set, tmp_path, QUIET)
    assert "C++" in raised.value.hint


def test_the_time_of_those_who_end_goes_to_the_others():
    short, long = together([drawing(0, 1), drawing(0, 3)])
    assert short[2::3] == [0.5]
    assert long[2::3] == [0.5, 1.0, 1.0]


def test_one_that_fails_ends_alone(tiny_recipe, tiny_set):
    well = alone(trained(tiny_recipe("bn"), tiny_set))
    diverging = trained(tiny_recipe("gn"), tiny_set, lr=1e30)
    failed, other = together([diverging, trained(tiny_recipe("bn"), tiny_set)])
    assert isinstance(failed, LtnormError)
    assert "--lr" in failed.hint
    assert other[1] == well[1]


def test_a_step_that_runs_out_of_memory_is_an_error_of_its_run(
    tiny_recipe, tiny_set, tmp_path, monkeypatch
):
    plain = loop.step

    def step(objective, *rest):
        if isinstance(objective.model.norm, torch.nn.GroupNorm):
            raise torch.OutOfMemoryError("no more")
        return plain(objective, *rest)

    monkeypatch.setattr(loop, "step", step)
    recipes = [tiny_recipe(norm, **{"train.epochs": 1}) for norm in ("gn", "bn")]
    failed, made = together([run.steps(r, tiny_set, tmp_path, QUIET) for r in recipes])
    assert "out of memory" in failed.message
    assert made.norm == "bn"


def test_a_stack_that_is_asked_to_end_keeps_all_its_runs(ltnorm, monkeypatch):
    command = "train --recipe tiny.yaml --stack-seeds --seeds 0-2 --epochs 3 --quiet --out"
    assert ltnorm(f"{command} whole").code == 0
    plain, left = loop.step, iter(range(14))

    def step(*arguments):
        if next(left, None) == 13:  # in the second epoch, of the second of three
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    monkeypatch.setattr(loop, "step", step)
    answer = ltnorm(f"{command} results")
    assert answer.code == 143
    assert "0 of 3 runs finished" in answer.err
    setting = "synthetic-exp10/resnet8-bn-ce"
    kept = [list(Path(f"results/{setting}/seed{seed}").glob("resume-*")) for seed in range(3)]
    assert all(kept)
    monkeypatch.setattr(loop, "step", plain)
    answer = ltnorm(f"{command} results", "--json")
    assert answer.code == 0
    for seed in range(3):
        here, there = Path(f"results/{setting}/seed{seed}"), Path(f"whole/{setting}/seed{seed}")
        assert same(here, there)
        assert '"stack": true' in metrics(here)["settings"].replace('""', '"')


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"train.momentum": 0, "train.clip_grad": 0.5},
        {"train.nesterov": True, "train.schedule": "cosine", "train.steps": 20},
        {"train.optimizer": "adamw", "train.lr": 0.002},
        {
            "train.optimizer": "sam",
            "loss.name": "ldam",
            "loss.schedule": "drw",
            "loss.drw_start": 0.5,
        },
    ],
)
def test_replayed_steps_are_those_made_one_by_one(tiny_recipe, tiny_set, monkeypatch, flags):
    budget = {} if "train.steps" in flags else {"train.epochs": 3}
    recipes = [tiny_recipe("compound", seed, **budget | flags) for seed in range(2)]
    plain = [alone(trained(recipe, tiny_set)) for recipe in recipes]
    captured = []

    def capture(make):  # in place of a GPU's
        captured.append(make)
        return make

    def reads_the_rate(update, *arguments, lr, **more):
        assert isinstance(lr, torch.Tensor)  # a graph would repeat a number of Python for ever
        update(*arguments, lr=lr, **more)

    monkeypatch.setattr(graph, "capture", capture)
    for name in ("sgd", "adamw"):
        monkeypatch.setattr(optim, name, partial(reads_the_rate, getattr(optim, name)))
    replayed = together([trained(recipe, tiny_set, graph=True) for recipe in recipes])
    assert len(captured) == 1
    for (weights, losses), (other, others) in zip(plain, replayed, strict=True):
        assert others == pytest.approx(losses, rel=1e-4)
        for name, value in weights.items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


def test_a_graph_is_captured_anew_when_a_training_has_ended(tiny_recipe, tiny_set, monkeypatch):
    captured = []
    monkeypatch.setattr(graph, "capture", lambda make: captured.append(make) or make)
    recipes = [tiny_recipe(seed=s, **{"train.epochs": 2 + 2 * s}) for s in range(2)]
    short, long = together([trained(recipe, tiny_set, graph=True) for recipe in recipes])
    assert len(captured) == 2
    assert (len(short[1]), len(long[1])) == (2, 4)
    assert long[1] == pytest.approx(alone(trained(recipes[1], tiny_set))[1], rel=1e-4)


def test_a_compiled_training_is_compiled_once(tiny_recipe, tiny_set, tmp_path, monkeypatch):
    graphs, counts = [], []

    def backend(module, inputs):
        graphs.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])
        return module.forward

    def counting(steps):
        """Notes after each step how much was compiled."""
        update = next(steps)
        while True:
            made = yield update
            counts.append(len(graphs))
            try:
                update = steps.send(made)
            except StopIteration as end:
                return end.value

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", partial(compile_, backend=backend))
    flags = {"train.epochs": 2, "eval.every": 1, "train.ema": 0.9, "train.precision": "bf16"}
    recipe = tiny_recipe("bn", **flags, **{"train.compile": True})
    compiled = alone(counting(run.steps(recipe, tiny_set, tmp_path / "compiled", QUIET)))
    assert counts[0] > 0
    assert set(counts) == {counts[0]}
    plain = run.run(tiny_recipe("bn", **flags), tiny_set, tmp_path / "plain", QUIET)
    assert compiled.all == plain.all
    assert compiled.nll == pytest.approx(plain.nll, rel=1e-3)


def test_deterministic_is_set_anew_by_each_run(tiny_recipe, tiny_set, tmp_path):
    flags = {"train.epochs": 1}
    run.run(tiny_recipe(**flags, **{"train.deterministic": True}), tiny_set, tmp_path, QUIET)
    assert torch.are_deterministic_algorithms_enabled()
    run.run(tiny_recipe(**flags), tiny_set, tmp_path, QUIET)
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_cannot_be_computed_is_refused_before_work_starts(failing, monkeypatch):
    train = "train --recipe tiny.yaml --device cpu --norm bn"
    said = failing(f"{train} --set train.graph=true", code=2)
    assert "train.graph" in said
    assert "cuda" in said
    assert "--jobs" in failing(f"{train} --stack-seeds --jobs 2", code=2)
    here = Place(rank=0, local_rank=0, world_size=2, local_world_size=2)
    monkeypatch.setattr(device, "place", lambda: here)
    for flag in ("stack", "compile"):
        train = Train(**{flag: True})
        with pytest.raises(UsageError, match="torchrun"):
            device.check_computing(train, torch.device("cpu"))


def test_a_graph_cannot_mix_images(tiny_recipe):
    train = tiny_recipe(**{"train.graph": True, "train.mixup": 0.5}).train
    with pytest.raises(UsageError, match="mixed images"):
        device.check_computing(train, torch.device("cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("norm", ["bn", "gn", "split", "compound"])
def test_on_a_gpu_graphs_and_stacks_are_eager_training(tiny_recipe, tiny_set, tmp_path, norm):
    flags = {"device": "cuda", "train.epochs": 4, "train.precision": "fp32"}
    plain = run.run(tiny_recipe(norm, **flags), tiny_set, tmp_path / "plain", QUIET)
    flags |= {"train.graph": True, "train.stack": True}
    recipes = [tiny_recipe(norm, seed, **flags) for seed in range(3)]
    made = together([run.steps(r, tiny_set, tmp_path / "together", QUIET) for r in recipes])
    assert made[0].nll == pytest.approx(plain.nll, rel=1e-2)
    assert len({result.nll for result in made}) == 3
