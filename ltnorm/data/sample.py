"""A few training images, to look at."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from ltnorm.data.decode import decode
from ltnorm.data.source import Images, Pixels


def sample(images: Images, chosen: Mapping[int, Sequence[int]]) -> dict[int, list[np.ndarray]]:
    """The chosen images, uint8 [H, W, 3], by class. `chosen` are the indices of each class."""

    def one(index: int) -> np.ndarray:
        if isinstance(images, Pixels):
            return images.images[index]
        return np.asarray(decode(images.root / os.fsdecode(images.paths[index])))

    return {label: [one(index) for index in indices] for label, indices in chosen.items()}
