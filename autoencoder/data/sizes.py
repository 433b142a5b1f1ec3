"""Heights and widths of images as they will be decoded, from their headers, without decoding them."""

import functools
import io
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from autoencoder.data.bands import DecodeError
from autoencoder.data.formats import ORIENTATION, TURNED, Data, bands_last, kind_of, reasons, tiff_bands_last
from autoencoder.data.index.opening import told
from autoencoder.data.sources import BadImage, Source

THREADS = 16
"""Headers read at once: most of the time is waiting for the disk."""
_AHEAD = 4096
"""Images that are asked for before the first of them is taken."""


@runtime_checkable
class _Encoded(Protocol):
    def encoded(self, index: int) -> tuple[Data, str]: ...


def sizes(source: Source, indices: range | np.ndarray, expected: int | None = None) -> Iterator[tuple[int, int] | None]:
    """(height, width) of these images, in order, upright; None where an image cannot be read. `expected` is that of `read_bands`.

    What has no header that can be read is decoded, and so is everything of a source that has no files.
    """
    if not isinstance(source, _Encoded):
        yield from told((_by_decoding(source, int(index)) for index in indices), "images' sizes", of=len(indices))
        return
    size = functools.partial(_size, source, source, expected)
    with ThreadPoolExecutor(THREADS, "headers") as pool:
        # Handed over a few at a time, so that millions of them are never in memory.
        chunks = (indices[first : first + _AHEAD] for first in range(0, len(indices), _AHEAD))
        found = itertools.chain.from_iterable(pool.map(size, map(int, chunk)) for chunk in chunks)
        yield from told(found, "images' sizes", of=len(indices))


def upright_size(data: Data, expected: int | None = None) -> tuple[int, int]:
    """(height, width) of a file's bytes or path, by its header, turned as its EXIF orientation says; `expected` as of `read_bands`.

    Raises DecodeError. A PNG's orientation is not seen where it stands behind the pixels.
    """
    with reasons():
        match kind_of(data):
            case "npy":
                return _npy(data, expected)
            case "tiff":
                return _tiff(data, expected)
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            # Asked for its own, a PNG would be decoded first.
            orientation = Image.Image.getexif(image).get(ORIENTATION, 1)
            return _turned((image.height, image.width), orientation)


def _size(source: Source, encoded: _Encoded, expected: int | None, index: int) -> tuple[int, int] | None:
    try:
        return upright_size(encoded.encoded(index)[0], expected)
    except BadImage:
        return None
    except DecodeError:
        return _by_decoding(source, index)


def _by_decoding(source: Source, index: int) -> tuple[int, int] | None:
    try:
        height, width = source.read(index).pixels.shape[:2]
    except BadImage:
        return None
    return height, width


def _npy(data: Data, expected: int | None) -> tuple[int, int]:
    with io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb") as file:
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[np.lib.format.read_magic(file)[0]]
        shape, _, _ = read(file)
    # An array that takes no memory: the axes are found as they are where the values are.
    return bands_last(np.broadcast_to(np.uint8(0), shape), expected).shape[:2]


def _tiff(data: Data, expected: int | None) -> tuple[int, int]:
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data) if isinstance(data, bytes) else data) as file:
        page, series = file.pages[0], file.series[0]
        assert isinstance(page, tifffile.TiffPage)
        values = np.broadcast_to(np.uint8(0), series.shape)
        return _turned(tiff_bands_last(values, series.axes, expected).shape[:2], int(page.tags.valueof(ORIENTATION, 1)))


def _turned(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return (size[1], size[0]) if orientation in TURNED else size
