"""A few training images of some classes, to look at."""

import os
from collections.abc import Iterable

import numpy as np

from ltnorm.data.decode import decode
from ltnorm.data.prepared import PreparedSet
from ltnorm.data.source import Pixels


def sample(data: PreparedSet, classes: Iterable[int], each: int) -> dict[int, list[np.ndarray]]:
    """Up to `each` training images of classes, uint8 [H, W, 3], drawn by the data seed."""
    images = data.open("train")
    chosen = {}
    for label in classes:
        rng = np.random.default_rng([data.spec.data_seed, label])
        index = rng.permutation(np.flatnonzero(images.labels == label))[:each]
        if isinstance(images, Pixels):
            chosen[label] = [images.images[i] for i in index]
        else:
            paths = (images.root / os.fsdecode(images.paths[i]) for i in index)
            chosen[label] = [np.asarray(decode(path)) for path in paths]
    return chosen
