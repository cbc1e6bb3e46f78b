"""Augmentations: free functions on a batch, each with its source of random numbers."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# RandomResizedCrop's, which no benchmark changes: the ratio of width to height, and the tries.
RATIO, TRIES = (3 / 4, 4 / 3), 10


class Batch(NamedTuple):
    """A training batch; `objective(*batch)` is its loss.

    Attributes:
        images: float32 [B, 3, H, W]; on several ranks, those of this rank.
        labels: int64 [B], of all ranks.
        other: the labels of the images mixed in, int64 [B]; None where nothing is.
        share: that of `labels` in the images; 1 - share is that of `other`.
    """

    images: Tensor
    labels: Tensor
    other: Tensor | None = None
    share: float = 1.0


def crop_and_flip(
    padded: Tensor, index: Tensor, size: int, flip: bool, rng: torch.Generator
) -> Tensor:
    """Random crops of `size` and horizontal flips of padded[index], uint8 [B, size, size, 3].

    Both are one gather: a row of source rows and a row of source columns for each image.
    """
    device, (_, height, width, channels) = padded.device, padded.shape
    count, steps = len(index), torch.arange(size, device=device)
    top = torch.randint(height - size + 1, (count, 1), generator=rng, device=device)
    left = torch.randint(width - size + 1, (count, 1), generator=rng, device=device)
    columns = left + steps
    if flip:
        mirrored = torch.rand(count, 1, generator=rng, device=device) < 0.5
        columns = torch.where(mirrored, left + steps.flip(0), columns)
    pixels = (index[:, None] * height + top + steps)[:, :, None] * width + columns[:, None, :]
    return padded.view(-1, channels)[pixels.view(-1)].view(count, size, size, channels)


def resized_crop_and_flip(
    images: Tensor, index: Tensor, scale: tuple[float, float], flip: bool, rng: torch.Generator
) -> Tensor:
    """Random boxes of images[index] made as large as the images, and flips, uint8 [B, H, W, 3].

    Bilinear, without antialiasing: a box is never larger than what is made of it. As torchvision's
    RandomResizedCrop, from a crop alone: at its edges nothing of what lies beyond comes in.
    """
    _, height, width, _ = images.shape
    top, left, heights, widths = random_boxes(len(index), (height, width), scale, rng)
    rows, columns = _sources(top, heights, height), _sources(left, widths, width)
    if flip:
        mirrored = torch.rand(len(index), 1, generator=rng, device=images.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    grid = torch.empty(len(index), height, width, 2, device=images.device)
    grid[..., 0], grid[..., 1] = columns[:, None, :], rows[:, :, None]
    pixels = images[index].permute(0, 3, 1, 2).float()
    made = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return made.round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _sources(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Where the `size` pixels of a line come from, [B, size], in grid_sample's -1 .. 1."""
    steps = (torch.arange(size, device=start.device) + 0.5) / size
    inside = (steps * length[:, None] - 0.5).clamp_min(0).minimum(length[:, None] - 1)
    return (2 * (start[:, None] + inside) + 1) / size - 1


def random_boxes(
    count: int, shape: tuple[int, int], scale: tuple[float, float], rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height and width, float32 [count] each, of boxes in images of `shape`.

    As torchvision's RandomResizedCrop: a part of the area uniform in `scale`, a ratio of width to
    height log-uniform in RATIO, drawn until both sides fit; after TRIES in vain, the largest box
    in the middle whose ratio is in RATIO.
    """

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=rng, device=rng.device)

    height, width = shape
    area = height * width * uniform(*scale, count, TRIES)
    ratio = uniform(math.log(RATIO[0]), math.log(RATIO[1]), count, TRIES).exp()
    widths, heights = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.int().argmax(1, keepdim=True)
    found = fits.any(1)
    middle_height = min(height, round(width / RATIO[0]))
    middle_width = min(width, round(height * RATIO[1]))
    heights = heights.gather(1, first)[:, 0].where(found, float(middle_height))
    widths = widths.gather(1, first)[:, 0].where(found, float(middle_width))
    top = (uniform(0, 1, count) * (height - heights + 1)).floor()
    left = (uniform(0, 1, count) * (width - widths + 1)).floor()
    top = top.where(found, ((height - heights) / 2).floor())
    left = left.where(found, ((width - widths) / 2).floor())
    return top, left, heights, widths


def of_one_image(
    color_jitter: Sequence[float], auto_augment: str
) -> Callable[[Tensor], Tensor] | None:
    """What changes the colours of one image, uint8 [3, H, W]; None changes nothing.

    Args:
        color_jitter: strengths of brightness, contrast, saturation and hue, as torchvision's
            ColorJitter; all 0 is none.
        auto_augment: see `policy`; "none" is none.
    """
    if not any(color_jitter) and auto_augment == "none":
        return None
    from torchvision.transforms import v2  # takes long to import, and few runs ask for it

    steps: list[Callable[[Tensor], Tensor]] = []
    if any(color_jitter):
        steps.append(v2.ColorJitter(*color_jitter))
    if auto_augment != "none":
        steps.append(policy(auto_augment))
    return v2.Compose(steps)


def policy(name: str) -> Callable[[Tensor], Tensor]:
    """A policy of torchvision's for one image, uint8 [3, H, W], with its defaults.

    cifar10, imagenet, svhn    AutoAugment (Cubuk et al. 2019, arXiv 1805.09501)
    randaugment                RandAugment (Cubuk et al. 2020, arXiv 1909.13719)
    trivialaugment             TrivialAugment, wide (Müller & Hutter 2021, arXiv 2103.10158)
    """
    from torchvision.transforms import v2

    if name == "randaugment":
        return v2.RandAugment()
    if name == "trivialaugment":
        return v2.TrivialAugmentWide()
    return v2.AutoAugment(v2.AutoAugmentPolicy(name))


def auto_augment(images: Tensor, policy: Callable[[Tensor], Tensor], seed: int) -> Tensor:
    """`policy` on each image of a batch, uint8 [B, H, W, 3] -> the same.

    In a loop, because torchvision makes one choice for all that it is given.
    """
    # torchvision draws from the CPU's global generator alone, wherever the images are;
    # torch.manual_seed would set those of the other devices too.
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        changed = [policy(image) for image in images.permute(0, 3, 1, 2)]
    return torch.stack(changed).permute(0, 2, 3, 1)


def cutout(images: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """Zero a square of `size` at a random centre of each image [N, C, H, W], clipped at the edge.

    DeVries & Taylor 2017, arXiv 1708.04552.
    """
    count, _, height, width = images.shape
    inside = []
    for length in (height, width):
        centre = torch.randint(length, (count, 1), generator=rng, device=images.device)
        distance = torch.arange(length, device=images.device) - (centre - size // 2)
        inside.append((distance >= 0) & (distance < size))
    rows, columns = inside
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


# torchvision.transforms.v2 has MixUp and CutMix. They draw from global generators and give
# one-hot targets, but losses here take integer labels: some correct logits or set margins by them.


def mixup(batch: Batch, alpha: float, rng: np.random.Generator) -> Batch:
    """x = share * x + (1 - share) * x[p], p a permutation, share ~ Beta(alpha, alpha), one a batch.

    Zhang et al. 2018, arXiv 1710.09412.
    """
    share = float(rng.beta(alpha, alpha))
    partner = _permutation(batch, rng)
    images = batch.images.lerp(batch.images[partner], 1 - share)
    return Batch(images, batch.labels, batch.labels[partner], share)


def cutmix(batch: Batch, alpha: float, rng: np.random.Generator) -> Batch:
    """One box of the images comes from those of a permutation, the same box for all.

    Its sides are sqrt(1 - a) of the image's, a ~ Beta(alpha, alpha), its centre is uniform and
    it is clipped at the edge; share = 1 - the part of the image that it covers then.

    Yun et al. 2019, arXiv 1905.04899.
    """
    height, width = batch.images.shape[2:]
    side = (1 - rng.beta(alpha, alpha)) ** 0.5
    rows, columns = (_interval(length, side, rng) for length in (height, width))
    partner = _permutation(batch, rng)
    images = batch.images.clone()
    images[:, :, rows, columns] = batch.images[:, :, rows, columns][partner]
    covered = (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    return Batch(images, batch.labels, batch.labels[partner], 1 - covered)


def _interval(length: int, part: float, rng: np.random.Generator) -> slice:
    """`part` of `length` about a random centre, clipped."""
    inside = int(length * part)
    start = int(rng.integers(length)) - inside // 2
    return slice(max(start, 0), min(start + inside, length))


def _permutation(batch: Batch, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.permutation(len(batch.labels))).to(batch.labels.device)


def mix(batch: Batch, mixup_alpha: float, cutmix_alpha: float, rng: np.random.Generator) -> Batch:
    """Mixup or CutMix, whichever has an alpha above 0; of both, either with probability 1/2."""
    ways = [w for w in ((mixup, mixup_alpha), (cutmix, cutmix_alpha)) if w[1] > 0]
    if not ways:
        return batch
    way, alpha = ways[rng.integers(len(ways))]
    return way(batch, alpha, rng)
