import threading
import tracemalloc
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from ltnorm import losses
from ltnorm.console import Output
from ltnorm.data import augment
from ltnorm.data import loader as loading
from ltnorm.data.augment import Batch
from ltnorm.data.loader import Loader, batches, crops, normalize
from ltnorm.data.pixels import Mapped, Resident
from ltnorm.data.sampling import progressive
from ltnorm.data.source import Pixels
from ltnorm.recipe import Train
from ltnorm.training.loop import fit
from ltnorm.training.objective import SinglePath
from ltnorm.training.together import alone

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def loader(count=50, seed=0, size=8, sampler=None, labels=None, **train):
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, size=(count, size, size, 3), dtype=np.uint8)
    settings = Train(**{"batch_size": 16, "crop_padding": 2, **train})
    return Loader(
        Pixels(images, np.arange(count) if labels is None else labels),
        mean=MEAN,
        std=STD,
        train=settings,
        seed=seed,
        device=torch.device("cpu"),
        sampler=sampler,
    ), images


def test_every_image_comes_once_an_epoch():
    made, _ = loader(50)
    labels = [batch.labels for batch in made.epoch(1)]
    assert [len(y) for y in labels] == [16, 16, 16, 2]
    assert sorted(torch.cat(labels).tolist()) == list(range(50))
    assert len(made) == 4
    assert made.images_per_epoch == 50


def test_a_last_batch_of_one_image_is_dropped():
    made, _ = loader(49)
    assert [len(batch.labels) for batch in made.epoch(1)] == [16, 16, 16]
    assert len(made) == 3
    assert made.images_per_epoch == 48


def test_views_are_the_images_of_a_batch_again_augmented_anew():
    (made, _), (single, _) = loader(35, size=16, views=3), loader(35, size=16)
    for batch, plain in zip(made.epoch(2), single.epoch(2), strict=True):
        views = batch.labels.view(3, -1)
        assert torch.equal(views, plain.labels.expand(3, -1))
        images = batch.images.unflatten(0, (3, -1))
        assert all(not torch.equal(images[0], images[i]) for i in (1, 2))
    assert (len(made), made.images_per_epoch) == (len(single), 35)


@pytest.mark.parametrize("kind", [Resident, Mapped])
@pytest.mark.parametrize("crop", ["padded", "resized"])
def test_an_epoch_can_be_entered_in_its_midst(monkeypatch, kind, crop):
    """Its batches are those that they would have been, whatever draws random numbers."""
    limit = 0 if kind is Mapped else 1 << 40
    monkeypatch.setattr(loading, "RESIDENT_CPU", limit)
    more = {"cutout": 2, "mixup": 0.5, "cutmix": 0.5, "auto_augment": "randaugment"}
    made, _ = loader(50, crop=crop, labels=np.arange(50) % 5, **more)
    assert isinstance(made.crops, kind)
    whole = list(made.epoch(3))
    for first in range(len(whole) + 1):
        rest = list(made.epoch(3, first=first))
        assert len(rest) == len(whole) - first
        for a, b in zip(rest, whole[first:], strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)
            assert torch.equal(a.other, b.other)
            assert a.share == b.share


def order(made, epoch, progress=0.0):
    return torch.cat([batch.labels for batch in made.epoch(epoch, progress)]).tolist()


AUGMENTATIONS = [
    {"cutout": 4, "flip": False},
    {"mixup": 1.0},
    {"cutmix": 1.0},
    {"mixup": 1.0, "cutmix": 0.5, "auto_augment": "cifar10"},
    {"auto_augment": "randaugment"},
]
RESIZED = [
    {"crop": "resized", "crop_padding": 4},
    {"crop": "resized", "crop_padding": 4, "crop_scale": (0.3, 0.6), "cutout": 4, "mixup": 1.0},
    {"color_jitter": 0.4},
    {"crop": "resized", "crop_padding": 4, "color_jitter": [0.4, 0, 0, 0.1], "flip": False},
]


@pytest.mark.parametrize("sampler", [None, lambda t: np.arange(1, 51) / 1275])
def test_order_follows_from_seed_and_epoch_alone(sampler):
    def made(seed=0, **train):
        return loader(seed=seed, sampler=sampler, **train)[0]

    assert order(made(), 3) == order(made(), 3)
    for train in AUGMENTATIONS:
        assert order(made(**train), 3) == order(made(), 3)
    assert order(made(), 3) != order(made(), 4)
    assert order(made(), 3) != order(made(seed=1), 3)


def test_without_a_sampler_the_order_is_torchs_permutation():
    made, _ = loader()
    for seed, epoch in ((0, 1), (5, 9)):
        made.seed = seed
        state = np.random.SeedSequence([seed, epoch, 0]).generate_state(1, np.uint64)[0]
        rng = torch.Generator().manual_seed(int(state) // 2)
        assert order(made, epoch) == torch.randperm(50, generator=rng).tolist()


@pytest.mark.parametrize("train", [{}, *AUGMENTATIONS, *RESIZED])
def test_augmentation_follows_from_seed_and_epoch_alone(train):
    first, again, later, other = (
        list(loader(seed=seed, **train)[0].epoch(epoch))
        for seed, epoch in ((2, 5), (2, 5), (2, 6), (3, 5))
    )
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.images, b.images)
        assert a.share == b.share
        assert a.other is b.other is None or torch.equal(a.other, b.other)
    shares = [[batch.share for batch in made] for made in (first, later, other)]
    if first[0].other is None:
        assert shares == [[1.0] * 4] * 3
    else:
        assert shares[0] != shares[1]
        assert shares[0] != shares[2]
        assert len(set(shares[0])) > 1
    assert not torch.equal(first[0].images, later[0].images)
    assert not torch.equal(first[0].images, other[0].images)


@pytest.mark.parametrize("both", [{}, {"cutout": 4}, {"auto_augment": "trivialaugment"}])
def test_mixing_mixes_the_very_batches_that_come_without_it(both):
    plain = loader(**both)[0].epoch(1)
    for x, mixed in zip(plain, loader(mixup=1.0, **both)[0].epoch(1), strict=True):
        place = {label: i for i, label in enumerate(x.labels.tolist())}
        partner = x.images[[place[label] for label in mixed.other.tolist()]]
        expected = mixed.share * x.images + (1 - mixed.share) * partner
        torch.testing.assert_close(mixed.images, expected, rtol=1e-5, atol=1e-5)


def test_crops_are_the_same_under_a_policy():
    """Policies that leave pixels alone in half of the cases: then they are those without it."""
    plain = torch.cat([batch.images for batch in loader(200)[0].epoch(1)])
    made = torch.cat([b.images for b in loader(200, auto_augment="imagenet")[0].epoch(1)])
    same = (plain == made).flatten(1).all(1)
    assert 0 < same.sum() < 200
    assert same[100:].any()


def test_every_batch_has_choices_of_its_own_under_a_policy():
    made, _ = loader(48, auto_augment="randaugment", crop_padding=0, flip=False)
    made.crops.images[:] = made.crops.images[0].clone()
    first, second, third = (batch.images for batch in made.epoch(1))
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert not torch.equal(first, next(iter(made.epoch(2))).images)


def test_a_policy_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    list(loader(auto_augment="svhn", mixup=1.0)[0].epoch(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sampler_draws_the_classes_by_the_progress():
    counts = [60, 30, 10]
    labels = np.repeat(np.arange(3), counts)
    made, _ = loader(100, sampler=partial(progressive, counts), labels=labels)
    for progress, q in ((0.0, (0.6, 0.3, 0.1)), (0.5, (28 / 60, 19 / 60, 13 / 60))):
        drawn = np.bincount(order(made, 1, progress))
        assert drawn.sum() == 100
        assert (np.abs(drawn - 100 * np.array(q)) < 1).all()
    assert order(made, 1) == order(made, 1, 0.0)


def test_training_tells_the_sampler_its_progress():
    told = []

    def sampler(progress):
        told.append(progress)
        return np.ones(50) / 50

    made, _ = loader(sampler=sampler, epochs=4, lr=1e-3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 50))
    objective = SinglePath(model, losses.build("ce", [1] * 50), torch.zeros(50, dtype=torch.int64))
    with Output(quiet=True).training("", 4) as progress:
        alone(fit(objective, made, made.train, progress))
    assert told == [0.0, 0.25, 0.5, 0.75]


def test_without_augmentation_images_are_only_normalized():
    made, images = loader(crop_padding=0, flip=False)
    for x, y, other, share in made.epoch(1):
        assert (other, share) == (None, 1.0)
        expected = (images[y] / 255 - MEAN) / STD
        np.testing.assert_allclose(x.permute(0, 2, 3, 1).numpy(), expected, rtol=1e-4, atol=1e-5)
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_normalize_is_exact_at_the_ends():
    x = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 1, 3)
    y = normalize(x, MEAN, STD)
    torch.testing.assert_close(y[0].flatten(), -torch.tensor(MEAN) / torch.tensor(STD))
    torch.testing.assert_close(y[1].flatten(), (1 - torch.tensor(MEAN)) / torch.tensor(STD))


@pytest.mark.parametrize("channels_first", [False, True])
def test_normalize_is_the_formula_to_the_bit(channels_first):
    images = torch.randint(256, (4, 7, 5, 3), dtype=torch.uint8)
    if channels_first:
        images = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    mean, std = (torch.tensor(v) * 255 for v in (MEAN, STD))
    expected = (images.float() - mean) / std
    assert torch.equal(normalize(images, MEAN, STD), expected.permute(0, 3, 1, 2))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("train", [{}, *AUGMENTATIONS, *RESIZED])
def test_batches_have_the_memory_format_asked_for(layout, train):
    made, _ = loader(**train)
    made.memory_format = layout
    assert next(iter(made.epoch(1))).images.is_contiguous(memory_format=layout)


def epoch_by_hand(images, train, seed, epoch):
    """An epoch of padded crops as it always was, written out: seeds and order of all draws."""

    def numbers(*more):
        return (
            int(np.random.SeedSequence((seed, epoch, *more)).generate_state(1, np.uint64)[0]) // 2
        )

    rng = torch.Generator().manual_seed(numbers(1))
    mixing = np.random.default_rng(numbers(2))
    pad = train.crop_padding
    padded = torch.from_numpy(np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0))))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(numbers(0)))
    for i, index in enumerate(order.split(train.batch_size)):
        x = augment.crop_and_flip(padded, index, images.shape[1], train.flip, rng)
        if train.auto_augment != "none":
            x = augment.auto_augment(x, augment.policy(train.auto_augment), numbers(3, i))
        x = normalize(x, MEAN, STD)
        if train.cutout:
            x = augment.cutout(x, train.cutout, rng)
        yield augment.mix(Batch(x, index), train.mixup, train.cutmix, mixing)


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert a.share == b.share
        assert a.other is b.other is None or torch.equal(a.other, b.other)


@pytest.mark.parametrize("train", [{}, *AUGMENTATIONS])
def test_batches_are_those_that_they_always_were(train):
    made, images = loader(**train, seed=3)
    assert isinstance(made.crops, Resident)
    assert_same(made.epoch(7), epoch_by_hand(images, made.train, 3, 7))


@pytest.fixture
def mapped(monkeypatch, tmp_path):
    """A loader whose images lie in a memory map, too large to be held."""
    monkeypatch.setattr(loading, "RESIDENT_CPU", 100)

    def make(count=50, size=8, **train):
        images = np.random.default_rng(0).integers(1, 256, (count, size, size, 3), dtype=np.uint8)
        np.save(tmp_path / "images.npy", images)
        pixels = Pixels(np.load(tmp_path / "images.npy", mmap_mode="r"), np.arange(count))
        settings = Train(**{"batch_size": 16, "crop_padding": 2, **train})
        cpu = torch.device("cpu")
        return Loader(pixels, mean=MEAN, std=STD, train=settings, seed=0, device=cpu), pixels

    return make


@pytest.mark.parametrize("train", [{}, {"batch_size": 3}, *AUGMENTATIONS, *RESIZED])
def test_batches_of_a_memory_map_are_those_of_images_in_memory(mapped, monkeypatch, train):
    from_disk, _ = mapped(**train)
    assert isinstance(from_disk.crops, Mapped)
    monkeypatch.undo()
    held, _ = loader(**train)
    assert isinstance(held.crops, Resident)
    for epoch in (1, 2):
        assert_same(from_disk.epoch(epoch), held.epoch(epoch))


def test_a_memory_map_is_never_copied_whole(mapped):
    made, pixels = mapped(2000, 64)
    whole = pixels.images.nbytes
    assert isinstance(made.crops.images, np.memmap)
    tracemalloc.start()
    try:
        sizes = [len(batch.labels) for batch in made.epoch(1)]
        sizes += [len(part) for part in batches(pixels, 50, 0)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(sizes) == 2 * 2000
    assert peak < whole / 10


def test_an_epoch_that_is_left_ends_the_reading(mapped):
    made, _ = mapped(batch_size=2)
    epoch = made.epoch(1)
    first = next(epoch)
    epoch.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]
    assert torch.equal(next(made.epoch(1)).images, first.images)


def test_what_does_not_fit_the_device_stays_on_disk():
    one, cpu = np.zeros((1, 4, 4, 3), np.uint8), torch.device("cpu")
    assert isinstance(crops(Pixels(one, np.zeros(1, np.int64)), Train(), cpu), Resident)
    many = np.broadcast_to(one, (1 << 26, 4, 4, 3))  # takes no memory
    assert many.nbytes > loading.RESIDENT_CPU
    assert isinstance(crops(Pixels(many, np.zeros(1, np.int64)), Train(), cpu), Mapped)


def test_evaluation_sees_all_images_in_order(mapped):
    _, pixels = mapped()
    for images in (pixels, Pixels(np.array(pixels.images), pixels.labels)):
        parts = list(batches(images, 20, 0))
        assert [len(part) for part in parts] == [25, 25]
        assert torch.equal(torch.cat(parts), torch.from_numpy(np.array(pixels.images)))


def test_resized_crops_of_the_whole_area_are_the_images_themselves():
    """Only a square box has room then, and its pixels are those of the image."""
    made, images = loader(100, crop="resized", crop_padding=4, crop_scale=(1, 1), flip=False)
    for x, y, *_ in made.epoch(1):
        assert torch.equal(x, normalize(torch.from_numpy(images[y]), MEAN, STD))


def test_colours_change_and_crops_do_not():
    plain = torch.cat([batch.images for batch in loader(100)[0].epoch(1)])
    jittered = torch.cat([b.images for b in loader(100, color_jitter=[0.5])[0].epoch(1)])
    assert not torch.equal(plain, jittered)
    # Brightness multiplies each image: zeros, of the padding, stay, and what is larger stays so.
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    before, after = ((x * std + mean).mul(255).round() for x in (plain, jittered))
    for x, y in zip(before.flatten(1), after.flatten(1), strict=True):
        assert (y[x.argsort(stable=True)].diff() >= 0).all()
        assert (y[x == 0] == 0).all()
