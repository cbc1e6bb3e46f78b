import json
from functools import partial

import pytest
import torch
from torch import nn

from ltnorm import bench, registry

TINY = "bench --batch-size 4 --image-size 8 --rounds 2 --device cpu --precision fp32"
CPU = torch.device("cpu")


def document(answer):
    assert answer.code == 0, answer.err
    return json.loads(answer.out)


def test_any_norm_is_measured_against_bn(ltnorm):
    every = " ".join(f"--norm {name}" for name in registry.NORMS)
    measured = document(ltnorm(f"{TINY} --json --quiet {every}"))
    assert measured["batch_size"] == 4
    assert measured["rounds"] == 2
    assert {"model", "device", "threads", "torch", "precision"} < measured.keys()
    rows = {row["norm"]: row for row in measured["rows"]}
    assert list(rows) == list(registry.NORMS)
    for row in rows.values():
        assert row["against"] == "bn"
        assert row["train_ms"] > 0
        assert row["memory_mib"] > 0
        assert row["train_images_per_second"] == pytest.approx(4000 / row["train_ms"])
        for what in ("train", "eval"):
            assert row[f"{what}_ratio_low"] <= row[f"{what}_ratio_high"]
            expected = row[f"{what}_ms"] / rows["bn"][f"{what}_ms"]
            assert row[f"{what}_ratio"] == pytest.approx(expected)
    exact = ("train_ratio", "train_ratio_low", "train_ratio_high", "eval_ratio", "memory_ratio")
    assert [rows["bn"][name] for name in exact] == [1.0] * 5


def test_without_a_norm_the_main_ones_are_measured(ltnorm):
    rows = document(ltnorm(f"{TINY} --json --quiet"))["rows"]
    assert [row["norm"] for row in rows] == ["bn", "gn", "split", "compound"]


def test_the_table_says_what_was_measured_on_what(ltnorm):
    shown = ltnorm(f"{TINY} --norm gn --norm compound --set norm.assign=position --loss ce")
    assert shown.code == 0, shown.err
    title, headings, _, bn, gn, compound, *legend = shown.out.splitlines()
    assert title.startswith("resnet8 · batch 4 · 8x8 · 10 classes · fp32")
    assert " ".join(headings.split()) == "norm train img/s time eval img/s time memory"
    assert bn.startswith("bn ")
    assert "(1.00x)" in bn
    assert gn.startswith("gn ")
    assert compound.startswith("compound (assign=position)")
    for word in ("2 rounds", "against bn", "quartile", "cpu (", torch.__version__):
        assert word in " ".join(legend)
    assert "warming up gn" in shown.err
    assert ltnorm(f"{TINY} --norm bn --quiet").err == ""


def test_the_baseline_can_be_another_norm(ltnorm):
    rows = document(ltnorm(f"{TINY} --norm bn --baseline gn --json"))["rows"]
    assert [(row["norm"], row["against"]) for row in rows] == [("gn", "gn"), ("bn", "gn")]
    assert rows[0]["train_ratio"] == 1


def test_a_recipe_is_measured_as_it_would_be_trained(ltnorm, tmp_path):
    text = (tmp_path / "tiny.yaml").read_text() + "norm: {name: compound, components: 3}\n"
    (tmp_path / "compound.yaml").write_text(text)
    measured = document(ltnorm("bench --recipe compound.yaml --rounds 1 --image-size 8 --json"))
    assert measured["batch_size"] == 16
    assert [row["label"] for row in measured["rows"]] == ["bn", "compound (components=3)"]


def test_a_larger_batch_takes_more_memory(ltnorm):
    small, large = (
        document(ltnorm(f"{TINY} --norm bn --json --batch-size {size}"))["rows"][0]["memory_mib"]
        for size in (8, 32)
    )
    assert small < large < 4 * small


def test_gradients_through_both_paths_take_nearly_twice_the_memory(ltnorm):
    command = f"{TINY} --batch-size 64 --norm compound --baseline compound --json --set norm."
    alone, full = (
        document(ltnorm(command + option))["rows"][0]["memory_mib"]
        for option in ("dual_path=false", "aux_gradient=full")
    )
    assert 1.5 < full / alone < 2.1


def test_nothing_global_is_changed(ltnorm):
    def state():
        return torch.get_rng_state().tolist(), torch.get_num_threads(), torch.is_grad_enabled()

    before = state()
    assert ltnorm(f"{TINY} --norm split").code == 0
    assert state() == before


def test_peak_memory_by_hand():
    kept = []

    def passing():
        a, b = torch.zeros(1000), torch.zeros(2000)
        del a
        kept.append(torch.zeros(500))
        del b

    assert bench.peak_bytes(passing, CPU) == 4 * (1000 + 2000)
    assert bench.peak_bytes(kept.clear, CPU) == 0

    layers = nn.Sequential(*(nn.Sigmoid() for _ in range(3)))
    x = torch.zeros(1000, requires_grad=True)
    outputs = []
    # Three outputs are kept for the backward; without one, only a layer's in- and output.
    assert bench.peak_bytes(lambda: outputs.append(layers(x)), CPU) == 3 * 4000
    with torch.no_grad():
        assert bench.peak_bytes(lambda: layers(x), CPU) == 2 * 4000
    # The gradient that is given, and those of a layer's out- and input.
    assert bench.peak_bytes(lambda: outputs[0].backward(torch.ones(1000)), CPU) == 3 * 4000


def test_actions_take_turns_and_every_other_round_goes_backwards():
    calls = []
    actions = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = bench.take_turns(actions, 3)
    assert "".join(calls) == "abccbaabc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_the_ratio_is_that_of_the_medians_between_the_quartiles_of_the_rounds():
    assert bench.ratio([2, 4, 6], [1, 2, 2]) == (2, 2, 2.5)


def test_compiled_rows_stand_beside_the_others(ltnorm, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    rows = document(ltnorm(f"{TINY} --norm bn --norm gn --compile --json"))["rows"]
    assert [row["label"] for row in rows] == ["bn", "bn compiled", "gn", "gn compiled"]
    assert [row["compiled"] for row in rows] == [False, True, False, True]
    assert {row["against"] for row in rows} == {"bn"}


def test_what_cannot_be_compiled_says_so(failing, monkeypatch):
    def broken(forward, **options):
        raise RuntimeError("Failed to find C++ compiler\nat length")

    monkeypatch.setattr(torch, "compile", broken)
    text = failing(f"{TINY} --norm bn --compile", code=1)
    assert "bn compiled fails" in text
    assert "Failed to find C++ compiler" in text
    assert "at length" not in text
    assert "leave out --compile" in text


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_out_of_memory(failing, monkeypatch, error):
    def full(batch):
        raise error

    monkeypatch.setattr(bench, "random_batch", full)
    text = failing(TINY, code=1)
    assert "out of memory: resnet8 with bn, 4 images of 8x8" in text
    assert "--batch-size" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--norm compond", ["unknown norm 'compond'", "did you mean 'compound'"]),
        ("--baseline bnn", ["unknown norm 'bnn'", "did you mean 'bn'"]),
        ("--model resnet9", ["unknown model", "resnet8"]),
        ("--batch-size 1", ["train.batch_size", "got 1"]),
        ("--image-size 0", ["--image-size"]),
        ("--classes 1", ["--classes"]),
        ("--rounds 0", ["--rounds"]),
        ("--precision fp16", ["train.precision", "bf16"]),
        ("--device cuda:99", ["cuda:99"]),
        ("--norm gn --set norm.componentz=3", ["none of the norms", "componentz"]),
        ("--norm compound --set norm.components=11", ["more than the 10 classes"]),
        ("--set norm.name=gn", ["no row 'bn'"]),
    ],
)
def test_bad_usage(failing, arguments, words):
    text = failing(f"bench --quiet {arguments}", code=2)
    for word in words:
        assert word in text
