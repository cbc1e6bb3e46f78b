import numpy as np
import pytest
import torch

from ltnorm.data.loader import Loader, crop_and_flip, cutout, normalize
from ltnorm.recipe import Train

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def loader(count=50, seed=0, size=8, **train):
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, size=(count, size, size, 3), dtype=np.uint8)
    settings = Train(**{"batch_size": 16, "crop_padding": 2, **train})
    return Loader(
        images,
        np.arange(count),
        mean=MEAN,
        std=STD,
        train=settings,
        seed=seed,
        device=torch.device("cpu"),
    ), images


def test_every_image_comes_once_an_epoch():
    made, _ = loader(50)
    labels = [y for _, y in made.epoch(1)]
    assert [len(y) for y in labels] == [16, 16, 16, 2]
    assert sorted(torch.cat(labels).tolist()) == list(range(50))
    assert len(made) == 4
    assert made.images_per_epoch == 50


def test_a_last_batch_of_one_image_is_dropped():
    made, _ = loader(49)
    assert [len(y) for _, y in made.epoch(1)] == [16, 16, 16]
    assert len(made) == 3
    assert made.images_per_epoch == 48


def test_order_follows_from_seed_and_epoch_alone():
    def order(seed, epoch, **train):
        made, _ = loader(seed=seed, **train)
        return torch.cat([y for _, y in made.epoch(epoch)]).tolist()

    assert order(0, 3) == order(0, 3) == order(0, 3, cutout=4, flip=False)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)
    first, second = (next(iter(loader(seed=2)[0].epoch(5)))[0] for _ in range(2))
    assert torch.equal(first, second)


def test_without_augmentation_images_are_only_normalized():
    made, images = loader(crop_padding=0, flip=False)
    for x, y in made.epoch(1):
        expected = (images[y] / 255 - MEAN) / STD
        np.testing.assert_allclose(x.permute(0, 2, 3, 1).numpy(), expected, rtol=1e-4, atol=1e-5)
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_crops_and_flips_are_windows_of_the_padded_image():
    images = torch.randint(1, 256, (1, 6, 6, 3), dtype=torch.uint8)
    padded = torch.nn.functional.pad(images, (0, 0, 2, 2, 2, 2))
    windows = {
        (top, left, flip): padded[0, top : top + 6, left : left + 6].flip(1 if flip else ())
        for top in range(5)
        for left in range(5)
        for flip in (False, True)
    }
    rng = torch.Generator().manual_seed(0)
    crops = crop_and_flip(padded, torch.zeros(2000, dtype=torch.long), 6, True, rng)
    seen = {}
    for crop in crops:
        [key] = [k for k, window in windows.items() if torch.equal(window, crop)]
        seen[key] = seen.get(key, 0) + 1
    # Each of the 50 is expected 40 times; 6.3 standard deviations would be 0 or 80.
    assert len(seen) == 50
    assert max(seen.values()) < 80


def test_cutout_zeroes_a_square():
    x = torch.ones(300, 3, 8, 8)
    cut = cutout(x, 4, torch.Generator().manual_seed(0)) == 0
    assert torch.equal(cut[:, 0], cut[:, 2])
    rows, columns = cut[:, 0].any(2).sum(1), cut[:, 0].any(1).sum(1)
    assert torch.equal(cut[:, 0].sum((1, 2)), rows * columns)
    assert rows.max() == columns.max() == 4
    assert rows.min() >= 2


def test_normalize_is_exact_at_the_ends():
    x = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 1, 3)
    y = normalize(x, MEAN, STD)
    torch.testing.assert_close(y[0].flatten(), -torch.tensor(MEAN) / torch.tensor(STD))
    torch.testing.assert_close(y[1].flatten(), (1 - torch.tensor(MEAN)) / torch.tensor(STD))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batches_have_the_memory_format_asked_for(layout):
    made, _ = loader()
    made.memory_format = layout
    x, _ = next(iter(made.epoch(1)))
    assert x.is_contiguous(memory_format=layout)
