"""The order of a run's endless stream of images: a permutation of the source for each epoch, open at any position."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from autoencoder.runtime.rng import generator


@dataclass(frozen=True, eq=False)
class Blocks:
    """Images that are read together, as the rows of a parquet file's row group are."""

    starts: np.ndarray
    """First image of each, ascending from 0."""
    images: int
    """Of all blocks."""
    together: int
    """Blocks that a process can keep: images are shuffled among so many."""

    def of(self, indices: np.ndarray) -> "Blocks | None":
        """The blocks of the images at ascending `indices`, counted anew; None in another order, which they say nothing of."""
        if np.any(np.diff(indices) < 0):
            return None
        block = np.searchsorted(self.starts, indices, side="right")
        return Blocks(np.flatnonzero(np.diff(block, prepend=-1)), len(indices), self.together)


def sample_index(seed: int, images: int, position: int, blocks: Blocks | None = None) -> int:
    """The index, in a source of `images`, of the image at `position` of the run; every epoch of `images` positions has each index once.

    Of a source in blocks each epoch permutes the blocks, and the images within windows of `blocks.together` blocks that follow each other
    in that permutation: a process that keeps so many reads each block once.
    """
    epoch, place = divmod(position, images)
    if blocks is None:
        return int(_permutation(seed, images, epoch)[place])
    ends = _windows(seed, blocks, epoch)[1]
    window = int(np.searchsorted(ends, place, side="right"))
    return int(_window(seed, blocks, epoch, window)[place - (ends[window - 1] if window else 0)])


def spread(count: int, most: int) -> np.ndarray:
    """At most `most` of the numbers below `count`, evenly spread and ascending: data sets come class by class."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(np.int64)


# A batch may reach over the end of an epoch or window, so two are kept.
@lru_cache(maxsize=2)
def _permutation(seed: int, images: int, epoch: int) -> np.ndarray:
    return generator(seed, "order", epoch).permutation(images)


@lru_cache(maxsize=2)
def _windows(seed: int, blocks: Blocks, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The blocks in an epoch's order; after how many images each window ends."""
    order = generator(seed, "blocks", epoch).permutation(len(blocks.starts))
    ends = np.diff(blocks.starts, append=blocks.images)[order].cumsum()
    last = np.arange(blocks.together - 1, len(order) + blocks.together - 1, blocks.together).clip(max=len(order) - 1)
    return order, ends[last]


@lru_cache(maxsize=2)
def _window(seed: int, blocks: Blocks, epoch: int, number: int) -> np.ndarray:
    """The images of a window, in its order."""
    order, ends = _windows(seed, blocks, epoch)
    bounds = np.append(blocks.starts, blocks.images)
    chosen = order[number * blocks.together : (number + 1) * blocks.together]
    images = np.concatenate([np.arange(bounds[block], bounds[block + 1]) for block in chosen])
    return images[generator(seed, "window", epoch * len(ends) + number).permutation(len(images))]
