import json

import numpy as np
import pytest
import torch

from ltnorm import bench, floor, models, peer, race
from ltnorm.data.augment import Batch
from ltnorm.data.source import Pixels
from ltnorm.norms import norm_layer
from ltnorm.validation import validate

CPU = torch.device("cpu")
RACE = "bench --peer --batch-size 4 --image-size 8 --rounds 2 --device cpu --precision fp32"


def recipe(**train):
    data = {"model": {"name": "resnet8"}, "train": {"precision": "fp32", **train}, "device": "cpu"}
    return validate(data)


def pixels(count=8, size=8):
    """Images of one colour each: where they are cropped and flipped makes no difference."""
    colours = np.random.default_rng(0).integers(0, 256, (count, 1, 1, 3), dtype=np.uint8)
    return Pixels(np.tile(colours, (1, size, size, 1)), np.arange(count) % 10)


def give(state, to):
    """Load a state by order: the peer names its layers otherwise."""
    to.load_state_dict(dict(zip(to.state_dict(), state.values(), strict=True)))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def small_machine(monkeypatch):
    """What the machine can do is measured on little."""
    monkeypatch.setitem(floor.PRODUCT, "cpu", 64)
    monkeypatch.setitem(floor.STREAM, "cpu", 1 << 20)


def test_the_peers_resnet32_is_the_published_one_and_computes_what_ours_does():
    torch.manual_seed(0)
    theirs, ours = peer.CifarResNet(32, 10), models.build("resnet32", 10, norm_layer("bn"))
    assert sum(p.numel() for p in theirs.parameters()) == 464_154
    assert sum(p.numel() for p in peer.CifarResNet(32, 100).parameters()) == 470_004
    give(ours.state_dict(), theirs)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    results = []
    for model in (ours.double().train(), theirs.double().train()):
        logits = model(images)
        logits.square().sum().backward()
        results.append((logits, [p.grad for p in model.parameters()], list(model.buffers())))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_both_loops_make_the_same_updates():
    settings = recipe(batch_size=8)
    theirs = peer.Peer(settings, pixels(), 10, CPU, workers=0)
    ours = race.Ours(bench.Variant("bn", settings, "peer"), bench.Batch(8, 8), pixels(), CPU)
    give(ours.subject.model.state_dict(), theirs.model)
    labels = torch.arange(8)
    for _ in range(3):
        images = torch.randn(8, 3, 8, 8)
        batch = Batch(images.contiguous(memory_format=torch.channels_last), labels)
        expected = ours.step(batch)
        assert theirs.step((images, labels)) == pytest.approx(float(expected), rel=1e-4)
    weights = [list(m.parameters()) for m in (ours.subject.model, theirs.model)]
    close(*weights)


def test_both_loops_see_the_same_images_in_the_whole_epoch():
    settings = recipe(batch_size=4, crop_padding=0)
    theirs = peer.Peer(settings, pixels(), 10, CPU, workers=1)
    ours = race.Ours(bench.Variant("bn", settings, "peer"), bench.Batch(4, 8), pixels(), CPU)
    epochs = []
    for batches in (theirs.batches(), ours.batches()):
        images, labels = (torch.cat(parts) for parts in zip(*(b[:2] for b in batches), strict=True))
        epochs.append([t[labels.argsort()] for t in (images, labels)])
    close(*epochs)
    shifted = peer.Photos(pixels(), 4)
    cut = [bool((shifted[0][0] == shifted[0][0][:, :1, :1]).all()) for _ in range(20)]
    assert not all(cut)  # black from the padding


def test_of_a_turn_only_the_steps_in_the_midst_of_an_epoch_are_timed(monkeypatch):
    clock, open_iterators = [0.0], []

    class Slow:
        untimed, passes = 2, (1, 1)

        def batches(self):
            open_iterators.append(self)
            try:
                yield from [100.0, 100.0, 1.0, 2.0, 4.0, 100.0]
            finally:
                open_iterators.remove(self)

        def step(self, batch):
            clock[0] += batch

    monkeypatch.setattr(race.time, "perf_counter", lambda: clock[0])
    assert race.turn(Slow(), 3, CPU) == 7
    assert not open_iterators


@pytest.mark.usefixtures("small_machine")
def test_the_race_is_a_document_of_rows(ltnorm):
    answer = ltnorm(f"{RACE} --json --norm gn --norm compound")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["steps"] == race.STEPS
    assert found["workers"] == peer.default_workers()
    assert found["rates"]["fp32"]["flops"] > 0
    rows = found["rows"]
    assert [(row["label"], row["norm"]) for row in rows] == [
        ("peer", "bn"),
        ("gn", "gn"),
        ("compound", "compound"),
    ]
    first, gn, compound = rows
    assert (first["speed"], first["speed_low"], first["speed_high"]) == (1, 1, 1)
    assert first["memory_format"] == "contiguous_format"
    assert gn["memory_format"] == "channels_last"
    for row in rows:
        assert row["images_per_second"] == pytest.approx(4000 / row["step_ms"])
        assert row["speed"] == pytest.approx(first["step_ms"] / row["step_ms"])
        least = max(row["arithmetic_ms"], row["memory_ms"])
        assert row["floor_images_per_second"] == pytest.approx(4000 / least)
        assert row["floor_reached"] == pytest.approx(least / row["step_ms"])
    assert first["arithmetic_ms"] == gn["arithmetic_ms"]
    # Its second path is a third of a step more, but for the first layer's gradient.
    assert 1.3 < compound["arithmetic_ms"] / gn["arithmetic_ms"] < 1.4


@pytest.mark.usefixtures("small_machine")
def test_the_table_of_a_race(ltnorm):
    shown = ltnorm(f"{RACE} --norm gn --quiet")
    assert shown.code == 0, shown.err
    title, headings, _, first, gn, *legend = shown.out.splitlines()
    assert title.startswith("resnet8 · batch 4 · 8x8 · 10 classes · fp32")
    assert headings.split()[:4] == ["loop", "precision", "img/s", "speed"]
    assert first.startswith("peer ")
    assert "1.00x ± 0.00" in first
    assert gn.startswith("gn ")
    for word in ("2 rounds of 4 steps", "GFLOP/s", "GB/s", "workers", torch.__version__):
        assert word in " ".join(legend)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("--baseline gn", "--baseline"),
        ("--loss focal", "no loss like this"),
        ("--set train.mixup=0.2", "no train.mixup"),
        ("--set train.crop=resized", "no train.crop"),
        ("--set loss.label_smoothing=0.1", "no loss like this"),
        ("--norm gnn", "did you mean 'gn'"),
    ],
)
def test_what_the_peer_does_not_do_is_not_compared(failing, arguments, word):
    assert word in failing(f"{RACE} --quiet {arguments}", code=2)
