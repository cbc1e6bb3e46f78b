import typing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from ltnorm import losses, models, registry
from ltnorm.data import augment
from ltnorm.data.augment import Batch, auto_augment, crop_and_flip, cutmix, cutout, mixup
from ltnorm.norms import norm_layer
from ltnorm.recipe import Train
from ltnorm.training import optim
from ltnorm.training.dual import DualPath
from ltnorm.training.loop import step
from ltnorm.training.objective import RoutedPath, SinglePath

POLICIES = set(typing.get_args(Train.model_fields["auto_augment"].annotation)) - {"none"}
GROUPS = torch.tensor([0, 0, 1, 1])


def noise(count=8, size=8, seed=0):
    """A batch whose labels are places in it."""
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(count, 3, size, size, generator=generator), torch.arange(count))


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


def boxes(count, shape, scale, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.stack(augment.random_boxes(count, shape, scale, rng), 1)


def box_of(peer, shape):
    params = peer.make_params([torch.zeros(3, *shape)])
    return [params[key] for key in ("top", "left", "height", "width")]


@pytest.mark.parametrize(
    ("shape", "scale"),
    [((64, 64), (0.08, 1.0)), ((40, 60), (0.3, 0.9)), ((20, 90), (0.5, 1.0))],
)
def test_boxes_are_distributed_as_torchvisions(shape, scale):
    """Places, areas and ratios; in the last shape a box seldom fits, and the middle is taken."""
    torch.manual_seed(0)
    peer = v2.RandomResizedCrop(8, scale)
    theirs = np.array([box_of(peer, shape) for _ in range(2000)], float).T
    top, left, height, width = ours = boxes(2000, shape, scale).double().numpy().T
    for start, length, whole in ((top, height, shape[0]), (left, width, shape[1])):
        assert (start >= 0).all()
        assert (length >= 1).all()
        assert (start + length <= whole).all()
    for of in (
        lambda top, left, height, width: height * width,
        lambda top, left, height, width: width / height,
        lambda top, left, height, width: top,
        lambda top, left, height, width: left,
    ):
        assert stats.ks_2samp(of(*ours), of(*theirs)).pvalue > 0.001


@pytest.mark.parametrize("shape", [(10, 100), (100, 10), (7, 100), (16, 16)])
def test_where_no_box_fits_the_middle_is_taken(shape):
    expected = box_of(v2.RandomResizedCrop(8, (1.0, 1.0)), shape)
    assert boxes(50, shape, (1.0, 1.0)).tolist() == [expected] * 50


def test_resized_crops_have_torchvisions_values():
    images = torch.randint(256, (5, 12, 12, 3), dtype=torch.uint8)
    index, scale = torch.arange(60) % 5, (0.1, 1.0)
    rng = torch.Generator().manual_seed(3)
    made = augment.resized_crop_and_flip(images, index, scale, True, rng)
    assert made.shape == (60, 12, 12, 3)
    assert made.dtype == torch.uint8
    mirrored = 0
    for box, i, crop in zip(boxes(60, (12, 12), scale, 3), index, made, strict=True):
        image = images[i].permute(2, 0, 1).float()
        expected = functional.resized_crop(image, *map(int, box), [12, 12], antialias=True)
        ways = (expected, expected.flip(2))
        errors = [(crop.permute(2, 0, 1) - way).abs().max() for way in ways]
        assert min(errors) < 0.502  # what is rounded
        mirrored += errors[1] < errors[0]
    assert 15 < mirrored < 45


def test_what_changes_colours_is_torchvisions():
    image = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    assert augment.of_one_image((0.0, 0.0, 0.0, 0.0), "none") is None
    peer = v2.Compose([v2.ColorJitter(0.4, 0.3, 0.2, 0.1), v2.RandAugment()])
    made = augment.of_one_image((0.4, 0.3, 0.2, 0.1), "randaugment")
    for seed in range(5):
        torch.manual_seed(seed)
        expected = peer(image)
        torch.manual_seed(seed)
        assert torch.equal(made(image), expected)


def test_cutout_zeroes_a_square():
    x = torch.ones(300, 3, 8, 8)
    cut = cutout(x, 4, torch.Generator().manual_seed(0)) == 0
    assert torch.equal(cut[:, 0], cut[:, 2])
    rows, columns = cut[:, 0].any(2).sum(1), cut[:, 0].any(1).sum(1)
    assert torch.equal(cut[:, 0].sum((1, 2)), rows * columns)
    assert rows.max() == columns.max() == 4
    assert rows.min() >= 2


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_policy_chooses_for_each_image_by_itself(name):
    policy = augment.policy(name)
    image = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8)
    batch = image.repeat(20, 1, 1, 1)
    before = torch.get_rng_state()
    changed = auto_augment(batch, policy, 7)
    assert torch.equal(torch.get_rng_state(), before)
    assert changed.shape == batch.shape
    assert changed.dtype == torch.uint8
    assert len({bytes(x.flatten().tolist()) for x in changed}) > 5
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        by_hand = [policy(image[0].permute(2, 0, 1)).permute(1, 2, 0) for _ in batch]
    assert torch.equal(changed, torch.stack(by_hand))
    assert not torch.equal(changed, auto_augment(batch, policy, 8))


def test_policies_are_torchvisions():
    for name in ("cifar10", "imagenet", "svhn"):
        assert augment.policy(name).policy.value == name
    assert type(augment.policy("randaugment")) is v2.RandAugment
    assert type(augment.policy("trivialaugment")) is v2.TrivialAugmentWide


def test_mixup_is_the_weighted_mean_of_an_image_and_its_partner():
    batch = noise()
    mixed = mixup(batch, 1.0, np.random.default_rng(0))
    assert 0 < mixed.share < 1
    assert torch.equal(mixed.labels, batch.labels)
    assert sorted(mixed.other.tolist()) == batch.labels.tolist() != mixed.other.tolist()
    x, partner = batch.images.double(), batch.images.double()[mixed.other]
    expected = mixed.share * x + (1 - mixed.share) * partner
    torch.testing.assert_close(mixed.images, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixups_share_is_beta_distributed(alpha):
    rng, batch = np.random.default_rng(1), noise(2, 1)
    shares = [mixup(batch, alpha, rng).share for _ in range(2000)]
    assert np.mean(shares) == pytest.approx(0.5, abs=5 * 0.5 / 2000**0.5)
    assert stats.kstest(shares, "beta", args=(alpha, alpha)).pvalue > 0.01


@pytest.mark.parametrize("alpha", [1e-300, 1e-9, 1e3, 1e300])
def test_extreme_alphas_are_limits(alpha):
    batch = noise()
    for seed in range(20):
        for way in (mixup, cutmix):
            mixed = way(batch, alpha, np.random.default_rng(seed))
            assert mixed.images.isfinite().all()
            assert 0 <= mixed.share <= 1
            if alpha < 1:  # one image or the other
                rows = batch.images[mixed.other if mixed.share < 0.5 else mixed.labels]
                assert way is cutmix or torch.equal(mixed.images, rows)
            elif way is mixup:
                assert mixed.share == pytest.approx(0.5, abs=0.1)


def test_cutmix_puts_a_box_of_the_partner_into_each_image():
    batch = noise(6, 9)._replace(images=torch.randn(6, 3, 9, 7))
    before, sizes, corners = batch.images.clone(), set(), set()
    for seed in range(200):
        mixed = cutmix(batch, 1.0, np.random.default_rng(seed))
        own, partner = mixed.images == batch.images, mixed.images == batch.images[mixed.other]
        assert (own | partner).all()
        boxes = ~own[mixed.other != mixed.labels][:, 0]
        if not len(boxes):
            continue
        assert torch.equal(own[:, 0], own[:, 2])
        assert (boxes == boxes[0]).all()  # one box a batch
        rows, columns = boxes[0].any(1).nonzero(), boxes[0].any(0).nonzero()
        assert boxes[0].sum() == len(rows) * len(columns)
        assert mixed.share == 1 - int(boxes[0].sum()) / 63
        sizes.add(len(rows))
        if len(rows):
            assert int(rows[-1] - rows[0]) == len(rows) - 1
            assert int(columns[-1] - columns[0]) == len(columns) - 1
            corners.add((int(rows[0]), int(columns[0])))
    assert torch.equal(batch.images, before)
    assert sizes >= set(range(8))
    assert len(corners) > 20


def test_cutmixs_share_is_that_of_the_clipped_box():
    """A side r = sqrt(u), u uniform for alpha = 1, keeps r - r^2 / 4 of itself on average.

    So E covered = E (r - r^2 / 4)^2 = 1/2 - 1/5 + 1/48.
    """
    rng, batch = np.random.default_rng(0), noise(2, 128)
    shares = [cutmix(batch, 1.0, rng).share for _ in range(2000)]
    # A standard error is 0.006, and sides are cut to whole pixels.
    assert 1 - np.mean(shares) == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.025)


def test_of_mixup_and_cutmix_each_takes_half_of_the_batches():
    batch, rng = noise(16), np.random.default_rng(0)
    assert augment.mix(batch, 0.0, 0.0, rng) is batch

    def copies(mixed):  # pixels that are an image's own, or its partner's
        own, partner = batch.images, batch.images[mixed.other]
        return bool(((mixed.images == own) | (mixed.images == partner)).all())

    for alphas, share in (((1.0, 0.0), 0), ((0.0, 1.0), 1), ((1.0, 1.0), 0.5)):
        cut = [copies(augment.mix(batch, *alphas, rng)) for _ in range(400)]
        # (Five standard errors, none where one way is left.)
        assert abs(np.mean(cut) - share) <= 5 * (share * (1 - share) / 400) ** 0.5


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_the_loss_of_a_mixed_batch_is_that_of_soft_targets(share):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4, 4)).double()
    objective = SinglePath(model, losses.build("ce", [4, 3, 2, 1]), GROUPS)
    images = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    labels, other = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 1, 0, 2])
    loss = objective(*Batch(images, labels, other, share))
    soft = share * F.one_hot(labels, 4) + (1 - share) * F.one_hot(other, 4)
    expected = F.cross_entropy(model(images), soft.double())
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    if share == 1:
        assert torch.equal(loss, objective(images, labels))


def objective(kind, norm, **options):
    torch.manual_seed(0)
    model = models.build("resnet8", 4, norm_layer(norm))
    return kind(model, losses.build("ce", [10, 6, 4, 2]), GROUPS, **options)


MIXED = Batch(
    torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 1, 2, 3, 0, 0, 1, 2]),
    torch.tensor([2, 0, 3, 0, 1, 2, 3, 1]),
)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7])
def test_a_mixed_image_goes_to_the_group_of_its_larger_share(share):
    groups = GROUPS[MIXED.labels if share >= 0.5 else MIXED.other].tolist()
    main = [-1] * 8
    for made, expected in (
        (objective(RoutedPath, "split"), [groups]),
        (objective(DualPath, "compound"), [groups, None]),
        (objective(DualPath, "compound", aux_gradient="full"), [main + groups]),
        (objective(DualPath, "compound", dual_path=False), [None]),
    ):
        seen = []
        made.model.norm.register_forward_hook(
            lambda m, i, o, seen=seen: seen.append(None if m.routed is None else m.routed.tolist())
        )
        made(*MIXED._replace(share=share))
        assert seen == expected


def test_both_paths_of_the_full_dual_path_have_both_labels():
    dual = objective(DualPath, "compound", aux_gradient="full", aux_weight=3.0)
    logits = []
    dual.model.fc.register_forward_hook(lambda m, i, o: logits.append(o))
    loss = dual(*MIXED._replace(share=0.3))
    soft = 0.3 * F.one_hot(MIXED.labels, 4) + 0.7 * F.one_hot(MIXED.other, 4)
    main, aux = (F.cross_entropy(half, soft) for half in logits[0].chunk(2))
    torch.testing.assert_close(loss, (main + 3 * aux) / 4)


@pytest.mark.parametrize("norm", list(registry.NORMS))
def test_every_norm_trains_on_mixed_batches(norm):
    made = objective(registry.load(registry.NORMS[norm].objective), norm)
    before = [p.detach().clone() for p in made.parameters()]
    train = Train(lr=0.01, precision="fp32")
    optimizer = optim.build(train, made.parameters())
    for share in (0.7, 0.2):
        assert step(made, optimizer, MIXED._replace(share=share), train).isfinite()
    for p, old in zip(made.parameters(), before, strict=True):
        assert p.isfinite().all()
        assert not torch.equal(p, old)
    assert all(b.isfinite().all() for b in made.buffers())
