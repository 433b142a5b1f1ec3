"""The order of a run's endless stream of images: a permutation of the source for each epoch, open at any position."""

from functools import lru_cache

import numpy as np

from autoencoder.runtime.rng import generator


def sample_index(seed: int, images: int, position: int) -> int:
    """The index, in a source of `images`, of the image at `position` of the run; every epoch of `images` positions has each index once."""
    epoch, place = divmod(position, images)
    return int(_permutation(seed, images, epoch)[place])


def spread(count: int, most: int) -> np.ndarray:
    """At most `most` of the numbers below `count`, evenly spread and ascending: data sets come class by class."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(np.int64)


# A batch may reach over the end of an epoch, so two are kept.
@lru_cache(maxsize=2)
def _permutation(seed: int, images: int, epoch: int) -> np.ndarray:
    return generator(seed, "order", epoch).permutation(images)
