"""Images that stay files: decoded in workers, the same whatever the number of workers."""

import atexit
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from ranks import on_ranks
from torch import nn
from torchvision.transforms import v2

from ltnorm.console import Output
from ltnorm.data import files as decoding
from ltnorm.data.decode import decode
from ltnorm.data.files import Decoded, worker_count, workers_watched
from ltnorm.data.loader import Loader, batches, normalize
from ltnorm.data.prepared import PreparedSet
from ltnorm.data.source import IMAGENET_MEAN, IMAGENET_STD, Files
from ltnorm.errors import LtnormError, UsageError
from ltnorm.evaluation.evaluate import predict
from ltnorm.evaluation.inspection import Inspector
from ltnorm.evaluation.posthoc import outputs
from ltnorm.recipe import Train
from ltnorm.training.build import build_loader, build_model, check
from ltnorm.training.log import Log
from ltnorm.training.recalibrate import recalibrated
from ltnorm.training.resume import Keeper
from ltnorm.training.run import run
from ltnorm.training.together import alone
from ltnorm.training.twostage import _retrained

CPU = torch.device("cpu")
COUNT, SIZE, RESIZE = 21, 16, 20
EVERYTHING = {"color_jitter": 0.4, "auto_augment": "randaugment", "cutout": 4, "mixup": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of COUNT images of different shapes, most of them JPEGs, one of a strange name."""
    root, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for i in range(COUNT):
        shape = (24 + i, 40 - i, 3)
        image = Image.fromarray(rng.integers(256, size=(4, 4, 3), dtype=np.uint8))
        image = image.resize(shape[1::-1], Image.Resampling.BICUBIC)
        image.save(root / NAMES[i])
    return root


NAMES = [f"{i}.png" if i % 5 == 0 else f"ä, '{i}'.jpg" for i in range(COUNT)]


def files_of(root, names=NAMES):
    paths = np.array([os.fsencode(name) for name in names])
    return Files(root, paths, np.arange(len(names)), image_size=SIZE, resize=RESIZE)


def loader(files, workers=0, seed=0, **train):
    return Loader(
        files,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        train=Train(**{"batch_size": 8, **train}),
        seed=seed,
        device=CPU,
        workers=workers,
    )


def same(first, second):
    pairs = zip(first, second, strict=True)
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs
    )


@pytest.mark.parametrize("train", [{}, EVERYTHING])
def test_batches_follow_from_seed_and_epoch_whatever_the_number_of_workers(folder, train):
    files = files_of(folder)
    alone = loader(files, 0, **train)
    first, second = list(alone.epoch(1)), list(alone.epoch(2))
    assert [len(batch.labels) for batch in first] == [8, 8, 5]
    assert sorted(torch.cat([batch.labels for batch in first]).tolist()) == list(range(COUNT))
    assert not same(first, second)
    for workers in (1, 2, 3):
        made = loader(files, workers, **train)
        assert same(made.epoch(1), first)
        assert same(made.epoch(2), second)
        assert same(made.epoch(1), first)
    assert not same(loader(files, 0, seed=1, **train).epoch(1), first)


def test_an_image_drawn_twice_is_cropped_twice(folder):
    made = Decoded(files_of(folder), Train(batch_size=4), CPU, 0)
    [batch] = made.batches(torch.full((4,), 7), 4, torch.Generator().manual_seed(0))
    assert len({bytes(image.flatten().tolist()) for image in batch}) == 4


def test_crops_are_torchvisions(folder):
    """The same boxes from the same random numbers, and the same values, as users would have."""
    files = files_of(folder)
    peer = v2.Compose([v2.RandomResizedCrop(SIZE, (0.2, 0.9)), v2.ColorJitter(0.4, 0.4, 0.4)])
    train = Train(crop_scale=(0.2, 0.9), flip=False, color_jitter=0.4)
    images = decoding._Images(files, decoding._Training(train, SIZE))
    for i in range(COUNT):
        image = decoding.image_of(str(folder / NAMES[i]))
        torch.manual_seed(100 + i)
        expected = peer(image).permute(1, 2, 0)
        assert torch.equal(images[i, 100 + i], expected)


def test_half_of_the_crops_are_mirrored(folder):
    files = files_of(folder)
    plain, flipped = (
        decoding._Images(files, decoding._Training(Train(flip=flip), SIZE))
        for flip in (False, True)
    )
    mirrored = 0
    for seed in range(60):
        crop, made = plain[1, seed], flipped[1, seed]
        turned = torch.equal(made, crop.flip(1)) and not torch.equal(made, crop)
        assert turned or torch.equal(made, crop)
        mirrored += turned
    assert 15 < mirrored < 45


def test_colours_and_policies_do_not_change_the_crops(folder):
    files = files_of(folder)
    for seed in range(30):
        plain, brighter = (
            decoding._Images(files, decoding._Training(train, SIZE))[1, seed]
            for train in (Train(), Train(color_jitter=[0.5]))
        )
        # (Brightness multiplies: what is the largest stays the largest.)
        order = plain.float().flatten().argsort(stable=True)
        assert (brighter.flatten()[order].float().diff() >= 0).all()


def test_of_the_global_random_numbers_none_are_used(folder):
    def state():
        of_numpy = np.random.get_state()[1].tolist()
        return torch.get_rng_state().tolist(), random.getstate(), of_numpy

    before = state()
    for workers in (0, 2):
        list(loader(files_of(folder), workers, **EVERYTHING).epoch(1))
        list(batches(files_of(folder), 8, workers))
    assert state() == before


def test_what_is_evaluated_is_the_centre_in_order(folder):
    change = v2.Compose([v2.Resize(RESIZE), v2.CenterCrop(SIZE)])
    expected = torch.stack(
        [change(decoding.image_of(str(folder / name))).permute(1, 2, 0) for name in NAMES]
    )
    for workers in (0, 1, 3):
        parts = list(batches(files_of(folder), 8, workers))
        assert [len(part) for part in parts] == [11, 10]
        assert torch.equal(torch.cat(parts), expected)
    upright = np.asarray(decode(folder / NAMES[1]))
    assert np.array_equal(decoding.image_of(str(folder / NAMES[1])).permute(1, 2, 0), upright)


@pytest.mark.parametrize("kind", ["L", "P", "RGBA", "I;16", "CMYK", "EXIF"])
def test_every_kind_of_file_comes_out_as_pillow_says(kind, tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(24, 30, 3), dtype=np.uint8)
    image, path, more = Image.fromarray(pixels), tmp_path / "x.png", {}
    if kind == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif kind == "EXIF":
        more["exif"] = Image.Exif()
        more["exif"][0x0112] = 6
    else:
        image = image.convert(kind)
    if kind in ("L", "CMYK", "EXIF"):
        path = tmp_path / "x.jpg"
    image.save(path, **more)
    found = decoding.image_of(str(path))
    assert found.shape == ((3, 30, 24) if kind == "EXIF" else (3, 24, 30))
    assert np.array_equal(found.permute(1, 2, 0), np.asarray(decode(path)))


class Mean(nn.Module):
    """Its logits are the mean colours."""

    def forward(self, images):
        return images.mean((2, 3))


def test_logits_of_files_are_those_of_their_centres_whatever_the_number_of_workers(folder):
    files = files_of(folder)
    [centres] = batches(files, COUNT, 0)
    expected = normalize(centres, IMAGENET_MEAN, IMAGENET_STD).mean((2, 3))
    for workers in (0, 2):
        given = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "device": CPU, "workers": workers}
        torch.testing.assert_close(predict(Mean(), files, **given), expected)


def broken(folder, tmp_path, content=None):
    """The files of a folder, of which one is missing or holds other bytes."""
    for name in NAMES:
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / NAMES[11]).unlink()
    if content is not None:
        (tmp_path / NAMES[11]).write_bytes(content)
    return files_of(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [None, b"", b"\xff\xd8\xff\xe0 no image", "truncated"])
def test_a_broken_file_is_one_error_that_names_it(folder, tmp_path, workers, content):
    if content == "truncated":
        content = (folder / NAMES[11]).read_bytes()[:-200]
    files = broken(folder, tmp_path, content)
    for made in (
        lambda: list(loader(files, workers, batch_size=4).epoch(1)),
        lambda: list(batches(files, 4, workers)),
    ):
        with pytest.raises(LtnormError) as caught:
            made()
        assert str(tmp_path / NAMES[11]) in caught.value.message
        assert "\n" not in caught.value.message
        assert "ltnorm prepare" in caught.value.hint


def test_batches_before_a_broken_file_come_and_the_loader_goes_on_after(folder, tmp_path):
    made = loader(broken(folder, tmp_path), 2, batch_size=2)

    def seen(epoch, before):
        for batch in made.epoch(epoch):
            before.append(batch.labels)

    for epoch in (1, 2):
        before, order = [], made._order(epoch, 0.0).tolist()
        with pytest.raises(LtnormError):
            seen(epoch, before)
        assert len(before) == order.index(11) // 2


def test_an_epoch_that_is_left_does_not_disturb_the_next(folder):
    files = files_of(folder)
    expected = list(loader(files, batch_size=2).epoch(2))
    made = loader(files, 2, batch_size=2)
    next(made.epoch(1))
    assert same(made.epoch(2), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_be_entered_in_its_midst(folder, workers):
    made = loader(files_of(folder), workers, batch_size=4, **EVERYTHING)
    whole = list(made.epoch(2))
    assert same(made.epoch(2, first=3), whole[3:])
    assert same(made.epoch(2), whole)


def pids(made):
    return [worker.pid for worker in made.crops.loader._iterator._workers]


def test_workers_live_from_epoch_to_epoch(folder):
    made = loader(files_of(folder), 2)
    list(made.epoch(1))
    before = pids(made)
    list(made.epoch(2))
    assert pids(made) == before
    assert len(set(before)) == 2


# Torch's handler of SIGCHLD raises wherever Python is just then: within a callback of the garbage
# collector, say (hypothesis sets one), the error is only printed and the loader's own poll tells.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_worker_is_one_error(folder):
    def train():
        made = loader(files_of(folder), 2, batch_size=2)
        for _ in made.epoch(1):
            os.kill(pids(made)[0], signal.SIGKILL)

    with pytest.raises(LtnormError, match="killed") as caught, workers_watched():
        train()
    assert "--workers" in caught.value.hint
    subprocess.run(["true"])  # a child that ends: torch looks at all workers that it still knows


def exits_with_workers(folder):
    """A process that ends while it holds workers which nobody has ended."""
    made = loader(files_of(folder), 2, batch_size=2)
    next(kept := made.epoch(1))
    globals()["kept"] = made, kept
    signal.raise_signal(signal.SIGCHLD)


def test_workers_that_nobody_has_ended_do_not_keep_a_process(folder):
    process = multiprocessing.get_context("fork").Process(target=_run_to_its_end, args=(folder,))
    start = time.monotonic()
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert time.monotonic() - start < 4


def _run_to_its_end(folder):
    atexit._clear()  # what pytest has registered is not this one's
    exits_with_workers(folder)
    atexit._run_exitfuncs()
    # What multiprocessing does then: it would wait for them.
    for child in multiprocessing.active_children():
        child.join()


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="shapes"), workers_watched():
        raise RuntimeError("shapes do not match")


def test_workers_are_as_asked_or_as_many_as_the_device_leaves_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert worker_count(5, CPU) == 5
    assert worker_count(0, torch.device("cuda")) == 0
    assert worker_count(None, torch.device("cuda")) == 6
    assert worker_count(None, CPU) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert worker_count(None, CPU) == 1


class FileSet(PreparedSet):
    """A prepared set of files: the same ones to train and to evaluate, of three classes."""

    def __init__(self, folder):
        counts = [COUNT - 10, 7, 3]
        manifest = {
            "set_id": "files",
            "index_sha256": "0" * 64,
            "counts": counts,
            "classes": ["a", "b", "c"],
            "image_size": SIZE,
            "decoded": False,
            "resize": RESIZE,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
        }
        super().__init__(path=folder, manifest=manifest)
        labels = np.repeat(np.arange(3), counts)
        self.__dict__["held"] = replace(files_of(folder), labels=labels)

    def open(self, split):
        return self.held


@pytest.fixture
def file_recipe(tiny_recipe):
    def make(workers=0, norm="bn", **train):
        flags = {"train.batch_size": 8, "train.crop_padding": 4, "train.epochs": 1, **train}
        return tiny_recipe(norm, workers=workers, **flags)

    return make


def test_a_run_on_files_has_one_result_whatever_the_number_of_workers(
    folder, file_recipe, tmp_path
):
    data, rows = FileSet(folder), []
    for workers in (0, 2):
        recipe = file_recipe(workers, **{"train.color_jitter": 0.4, "eval.every": 1})
        rows.append(run(recipe, data, tmp_path / str(workers), Output(quiet=True)))
    first, second = ({**asdict(row), "finished": "", "train_seconds": 0} for row in rows)
    del first["images_per_second"], second["images_per_second"]
    assert first == second
    assert first["images_processed"] == COUNT
    assert 0 <= first["all"] <= 100


def test_what_looks_at_a_model_takes_files(folder, file_recipe):
    recipe, data = file_recipe(), FileSet(folder)
    model = build_model(recipe, data.counts, SIZE)
    seen = outputs(model, data, "test", CPU, workers=1)
    assert seen.features.shape == (COUNT, 64)
    inspector = Inspector(model, "bn", data, "test", "thirds", CPU, workers=1)
    assert len(inspector.inspect().layers) == 7
    again = recalibrated(recipe, model, data, "balanced", CPU)
    before, after = model.state_dict(), again.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rsplit(".", 1)[1] for name in changed} >= {"running_mean", "running_var"}
    stage = file_recipe(**{"retrain.method": "crt", "retrain.epochs": 1})
    done = alone(_retrained(stage, model, data, CPU, Output(quiet=True), Keeper(), Log()))
    assert done.cost.images_processed == COUNT


def test_a_broken_file_ends_a_run_with_its_name(folder, file_recipe, tmp_path):
    data = FileSet(folder)
    data.__dict__["held"] = replace(broken(folder, tmp_path), labels=data.held.labels)
    with pytest.raises(LtnormError, match=re.escape(NAMES[11])):
        run(file_recipe(1), data, tmp_path / "out", Output(quiet=True))


@pytest.mark.parametrize(
    ("files", "train", "word"),
    [
        (True, {"train.crop": "padded"}, "train.crop"),
        (True, {"train.crop_padding": 2}, "train.crop_padding"),
        (False, {"train.crop_scale": (0.5, 1.0)}, "train.crop_scale"),
    ],
)
def test_a_crop_that_the_images_cannot_have_is_told(folder, file_recipe, files, train, word):
    recipe, data = file_recipe(**train), FileSet(folder)
    with pytest.raises(UsageError, match=word):
        check(recipe, data.counts, ["train", "test"], files)
    check(recipe, data.counts, ["train", "test"], not files)
    if files:
        with pytest.raises(UsageError, match=word):
            build_loader(recipe, data, data.open("train"), CPU)


def test_workers_are_a_flag_of_every_command_that_reads_images(ltnorm):
    made = ltnorm("train --recipe tiny.yaml --norm bn --epochs 1 --workers 1 --quiet")
    assert made.code == 0, made.err
    run_directory = "results/synthetic-exp10/resnet8-bn-ce/seed0"
    again = ltnorm("train --recipe tiny.yaml --norm bn --epochs 1 --workers 0 --json")
    assert "is finished" in again.err  # another number of them is no other run
    for command in (
        f"eval {run_directory} --workers 0",
        f"inspect {run_directory} --workers 0",
        f"retrain {run_directory} --method crt --workers 0 --dry-run",
    ):
        assert ltnorm(command).code == 0
    assert "workers: 1" in Path(run_directory, "recipe.yaml").read_text()


def test_a_termination_of_all_processes_is_a_termination(tmp_path):
    # As a scheduler does it: every process of the group hears it.
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(256, size=(70, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.jpg")
    command = [sys.executable, "-m", "ltnorm", "train", "--dataset", "folder", "--root", "photos"]
    command += ["--model", "resnet8", "--batch-size", "4", "--epochs", "1000", "--workers", "2"]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [*command, "--set", "dataset.image_size=16"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    told = ""
    while "epoch 1/" not in told:
        told = process.stderr.readline()
        assert told, "it ended before its first epoch"
    os.killpg(process.pid, signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143, told
    assert [line.split(":")[0] for line in told.splitlines()[-2:]] == ["error", "hint"], told
    assert "Traceback" not in told


def batches_of_rank(rank, files):
    dist.init_process_group("gloo")
    made = [list(loader(files, **changes).epoch(1)) for changes in ({}, EVERYTHING)]
    dist.destroy_process_group()
    return made


def test_each_rank_decodes_its_part_of_a_batch(folder, tmp_path):
    files = files_of(folder)
    codes, ranks, printed = on_ranks(batches_of_rank, tmp_path, files)
    assert codes == [0, 0], printed
    for changes, *parts in zip(({}, EVERYTHING), *ranks, strict=True):
        whole = list(loader(files, **changes).epoch(1))
        for batch, first, second in zip(whole, *parts, strict=True):
            assert 0 <= len(first.images) - len(second.images) <= 1
            assert torch.equal(torch.cat([first.images, second.images]), batch.images)
            assert torch.equal(first.labels, batch.labels)
            assert (batch.other is None) == (not changes)
