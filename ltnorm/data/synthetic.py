"""Embedded data: procedural textures, so that every command runs without a download."""

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from ltnorm.data.source import Pixels, Raw, Source

WAVES = 4


def synthetic(
    raw: Raw,
    *,
    classes: PositiveInt = 10,
    image_size: PositiveInt = 32,
    train_per_class: PositiveInt = 500,
    test_per_class: PositiveInt = 100,
    generator_seed: NonNegativeInt = 0,
) -> Source:
    """Textures of plane waves, one set of waves a class, each image drawn anew.

    A class is WAVES wave vectors, each with a colour. An image of it has random phases (so only
    the texture counts, not the position), random amplitudes, is mirrored half of the time, and
    carries the waves of one other class as a distractor of random strength, random contrast and
    brightness, and pixel noise. The distractor makes some images truly ambiguous, so that no
    model saturates; contrast, brightness and noise have the same distribution in all classes,
    so that nothing is made for any normalization layer.

    `raw` is that of every data set, and not used.
    """
    rng = np.random.default_rng([generator_seed, classes, image_size])
    # Mirrored waves need their own basis columns, so both signs of k_x are listed.
    wave_vectors = rng.integers([-6, 0], [7, 7], size=(classes, WAVES, 2))
    colours = rng.normal(size=(classes, WAVES, 3))
    colours /= np.linalg.norm(colours, axis=2, keepdims=True)

    y, x = np.mgrid[:image_size, :image_size] / image_size
    mirrored = wave_vectors * np.array([-1, 1])
    angles = (
        2
        * np.pi
        * (
            np.stack([wave_vectors, mirrored])[..., :1, None] * x
            + np.stack([wave_vectors, mirrored])[..., 1:, None] * y
        )
    )
    basis = np.concatenate([np.cos(angles), np.sin(angles)], axis=2)
    basis = basis.reshape(2 * classes, 2 * WAVES, image_size**2).astype(np.float32)

    def draw(per_class: int) -> Pixels:
        labels = np.repeat(np.arange(classes), per_class)
        others = (labels + rng.integers(1, max(classes, 2), size=len(labels))) % classes
        strength = rng.uniform(0.1, 1.0, size=(len(labels), 1, 1))
        pixels = _waves(rng, labels, colours, basis)
        pixels += strength * _waves(rng, others, colours, basis)
        pixels *= rng.uniform(0.4, 1.2, size=(len(labels), 1, 1))
        pixels += rng.normal(0, 0.4, size=(len(labels), 1, 3))
        pixels += rng.normal(0, 0.6, size=pixels.shape)
        images = np.clip(127.5 + 40 * pixels, 0, 255).astype(np.uint8)
        return Pixels(images.reshape(-1, image_size, image_size, 3), labels.astype(np.int64))

    return Source(
        train=draw(train_per_class),
        test=draw(test_per_class),
        classes=[f"texture-{i}" for i in range(classes)],
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        checksums={},
    )


def _waves(
    rng: np.random.Generator, labels: np.ndarray, colours: np.ndarray, basis: np.ndarray
) -> np.ndarray:
    """The waves of each label's class with fresh phases and amplitudes, [N, pixels, 3]."""
    count, classes = len(labels), len(colours)
    amplitude = rng.uniform(0.3, 1.0, size=(count, WAVES))
    phase = rng.uniform(0, 2 * np.pi, size=(count, WAVES))
    mirror = rng.integers(0, 2, size=count)
    weights = np.concatenate([amplitude * np.cos(phase), -amplitude * np.sin(phase)], axis=1)
    coloured = weights[:, :, None] * np.tile(colours[labels], (1, 2, 1))
    pixels = np.empty((count, basis.shape[2], 3), dtype=np.float32)
    for label in range(classes):
        for side in range(2):
            chosen = np.flatnonzero((labels == label) & (mirror == side))
            block = coloured[chosen].astype(np.float32)
            pixels[chosen] = np.einsum(
                "nwc,wp->npc", block, basis[side * classes + label], optimize=True
            )
    return pixels
