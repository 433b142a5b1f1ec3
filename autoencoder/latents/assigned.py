"""Which bucket each image of a segment is in, frozen beside the plan so that no worker has to look at the images' sizes again."""

import hashlib
import io
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from autoencoder.data.sizes import sizes
from autoencoder.data.sources import Source
from autoencoder.latents.buckets import Size

_BLOCK = 2**16
"""Images whose buckets are counted together: what is looked for is then in a few blocks."""
_CHUNK = 4096
"""Images that are assigned at once."""


def file_name(segment: int) -> str:
    """The file with the buckets of a segment's images."""
    return f"buckets-{segment:05d}.npy"


def nearest(images: Sequence[Size | None], buckets: Sequence[Size]) -> np.ndarray:
    """For each image's (height, width) the number of the bucket of the nearest logarithm of width / height; (n,) int64.

    Of several the one of the largest area, of these the first. An image without a size gets the first bucket.
    """
    heights, widths = np.array([size or (0, 0) for size in images], np.float64).reshape(-1, 2).T
    order = sorted(range(len(buckets)), key=lambda k: -buckets[k][0] * buckets[k][1])
    tall, wide = np.array([buckets[k] for k in order], np.float64).T
    # |log a - log b| grows with max(a / b, b / a), which is equal where they are equal: the products are whole numbers.
    one, other = widths[:, None] * tall, heights[:, None] * wide
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.maximum(one, other) / np.minimum(one, other)
    found = np.array(order)[np.argmin(factor, axis=1)]
    return np.where(heights > 0, found, 0)


class Assigned:
    """The number of each image's bucket, of each resolution: (resolutions, images) unsigned integers."""

    def __init__(self, numbers: np.ndarray) -> None:
        self._numbers = numbers

    @classmethod
    def of(cls, source: Source, indices: range | np.ndarray, buckets: Sequence[Sequence[Size]], channels: int | None) -> "Assigned":
        """Of these images of a source, by their sizes, in `buckets` for each resolution; `channels` that an image has to have."""
        most = max(map(len, buckets))
        numbers = np.empty((len(buckets), len(indices)), np.min_scalar_type(most - 1))
        found = sizes(source, indices, channels)
        for first in range(0, len(indices), _CHUNK):
            some = list(islice(found, _CHUNK))
            for row, each in zip(numbers, buckets, strict=True):
                row[first : first + len(some)] = nearest(some, each)
        return cls(numbers)

    @classmethod
    def read(cls, path: Path, wanted: str) -> "Assigned":
        """Of a file with what `to_bytes` gave, whose SHA-256 is `wanted`; OSError or ValueError for any other."""
        content = path.read_bytes()
        if _sha256(content) != wanted:
            raise ValueError(f"its {path.name} has been edited (its sha256 is not the plan's)")
        return cls(np.load(io.BytesIO(content), allow_pickle=False))

    def to_bytes(self) -> bytes:
        """As a file of NumPy."""
        into = io.BytesIO()
        np.save(into, self._numbers)
        return into.getvalue()

    def told(self, buckets: Sequence[Sequence[Size]]) -> dict[str, object]:
        """What a plan tells of it: `images` in each bucket of each resolution, and the `sha256` of its file."""
        counts = [np.bincount(row, minlength=len(each)).tolist() for row, each in zip(self._numbers, buckets, strict=True)]
        return {"images": counts, "sha256": _sha256(self.to_bytes())}

    def bucket(self, resolution: int, image: int) -> int:
        """The bucket of an image, counted from its segment's first."""
        return int(self._numbers[resolution, image])

    def images(self, resolution: int, bucket: int, first: int, last: int) -> np.ndarray:
        """Of the images in a bucket those with places `first` to `last` - 1, ascending, counted from the segment's first; int64."""
        before = self._before[resolution, :, bucket]
        block, stop = int(np.searchsorted(before, first, side="right")) - 1, int(np.searchsorted(before, last))
        found = np.flatnonzero(self._numbers[resolution, block * _BLOCK : stop * _BLOCK] == bucket) + block * _BLOCK
        return found[first - int(before[block]) : last - int(before[block])]

    def rows(self, resolution: int, bucket: int, first: int, last: int, *, start: int, step: int, each: int) -> list[int]:
        """The `each` rows from `start` + `step` · image on, of each of these images."""
        rows = start + step * self.images(resolution, bucket, first, last)[:, None] + np.arange(each)
        found: list[int] = rows.reshape(-1).tolist()
        return found

    @cached_property
    def _before(self) -> np.ndarray:
        """Images in each bucket before each block, and in all blocks; (resolutions, blocks + 1, buckets)."""
        resolutions, images = self._numbers.shape
        width = int(self._numbers.max(initial=0)) + 1
        starts: Iterable[int] = range(0, images, _BLOCK)
        counts = [[np.bincount(row[start : start + _BLOCK], minlength=width) for start in starts] for row in self._numbers]
        return np.concatenate([np.zeros((resolutions, 1, width), np.int64), np.cumsum(counts, axis=1)], axis=1)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
