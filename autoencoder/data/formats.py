"""Image files to the bands that stand in them: TIFF, .npy, PNG of deep colour, and what Pillow reads."""

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from autoencoder.data.bands import Bands, DecodeError
from autoencoder.data.deep_png import HEADER, is_deep_png, read_deep_png

Data = bytes | str | os.PathLike[str]

# They log what they raise, and what does not concern pixels.
for _library in ("tifffile", "PIL.TiffImagePlugin"):
    logging.getLogger(_library).setLevel(logging.CRITICAL)
# From 89 megapixels on; Pillow refuses what has twice as many.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NPY = b"\x93NUMPY"
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_GDAL_NODATA, ORIENTATION = 42113, 274
TURNED = (5, 6, 7, 8)
"""Orientations that exchange rows and columns."""
_ALPHA = (1, 2)
"""TIFF's ExtraSamples that are opacity."""


def kind_of(data: Data) -> str:
    """`tiff`, `npy`, `deep png` or `other`, by the file's first bytes; OSError where it cannot be read."""
    if isinstance(data, bytes):
        start = data[:HEADER]
    else:
        with open(data, "rb") as file:
            start = file.read(HEADER)
    if start[:4] in _TIFF:
        return "tiff"
    return "npy" if start.startswith(_NPY) else "deep png" if is_deep_png(start) else "other"


def read_bands(data: Data, expected: int | None = None) -> Bands:
    """All bands of a file's bytes or path, in its own dtype and upright; DecodeError for broken, truncated and unknown files.

    The bands of an array of three axes are the first or the last: the one of `expected` entries, else the shorter, and the last if both or
    neither tell. So are those of TIFFs that do not say. Palettes, CMYK and other ways to write colour become red, green and blue. Of
    several frames the first counts, but TIFF pages of one band and one size are bands.
    """
    with reasons():
        match kind_of(data):
            case "npy":
                return _npy(data, expected)
            case "tiff":
                return _tiff(data, expected)
            case "deep png":
                return _deep_png(data)
            case _:
                return pillow_bands(open_upright(data))


@contextmanager
def reasons() -> Iterator[None]:
    """Whatever decoding raises becomes a DecodeError with its reason."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise DecodeError("not an image of a known format") from error
    except OSError as error:
        raise DecodeError(error.strerror or str(error)) from error
    except DecodeError:
        raise
    # Parsers raise whatever they run into.
    except Exception as error:
        raise DecodeError(f"{type(error).__name__}: {error}") from error


def open_upright(data: Data) -> Image.Image:
    """Pillow's image, decoded and turned as its EXIF orientation says."""
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    return image


def pillow_bands(image: Image.Image) -> Bands:
    """All bands of a PIL image, palettes and CMYK as red, green and blue."""
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB")
    if image.mode in ("I", "F", *_SIXTEEN_BIT):
        return Bands(np.asarray(image)[:, :, None], colour=True)
    if image.mode not in ("1", "L", "LA", "RGB", "RGBA"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, "RGB"))
    values = np.asarray(image)
    return Bands(values if values.ndim == 3 else values[:, :, None], colour=True, alpha=image.mode in ("LA", "RGBA"))


def _deep_png(data: Data) -> Bands:
    whole = data if isinstance(data, bytes) else Path(data).read_bytes()
    with Image.open(io.BytesIO(whole)) as image:
        orientation = image.getexif().get(ORIENTATION, 1)
    values = read_deep_png(whole)
    return Bands(np.ascontiguousarray(_upright(values, orientation)), colour=True, alpha=values.shape[2] in (2, 4))


def _npy(data: Data, expected: int | None) -> Bands:
    values = np.load(io.BytesIO(data) if isinstance(data, bytes) else data, allow_pickle=False)
    return array_bands(bands_last(values, expected))


def array_bands(values: np.ndarray) -> Bands:
    """An array (H, W, bands) of numbers; DecodeError for one of anything else."""
    if values.dtype.kind not in "buif":
        raise DecodeError(f"an array of {values.dtype}; give integers or floating-point numbers")
    return Bands(np.ascontiguousarray(values.astype(values.dtype.newbyteorder("="), copy=False)))


def bands_last(values: np.ndarray, expected: int | None) -> np.ndarray:
    """(H, W, bands) of an array of two or three axes, as `read_bands` tells them apart."""
    if values.ndim == 2:
        return values[:, :, None]
    if values.ndim != 3 or 0 in values.shape:
        raise DecodeError(f"an array of shape {values.shape}; give (H, W), (H, W, bands) or (bands, H, W)")
    first, last = values.shape[0], values.shape[2]
    bands_first = first == expected if (first == expected) != (last == expected) else first < last
    return np.moveaxis(values, 0, 2) if bands_first else values


def _tiff(data: Data, expected: int | None) -> Bands:
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data) if isinstance(data, bytes) else data) as file:
        page, series = file.pages[0], file.series[0]
        assert isinstance(page, tifffile.TiffPage)
        samples = [int(sample) for sample in page.extrasamples]
        alpha = len(samples) == 1 and samples[0] in _ALPHA
        of_colour = page.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.MINISBLACK) and len(samples) == alpha
        count = page.samplesperpixel
        nodata = _number(page.tags.valueof(_GDAL_NODATA))
        try:
            values = series.asarray(maxworkers=1)
        except (ValueError, KeyError) as error:
            return _tiff_by_pillow(data, page, nodata, error)
        axes, orientation = series.axes, int(page.tags.valueof(ORIENTATION, 1))
    values = tiff_bands_last(values, axes, expected)
    colour = of_colour and values.shape[2] == count and count - alpha in (1, 3)
    return Bands(np.ascontiguousarray(_upright(values, orientation)), colour, alpha and values.shape[2] == count, nodata)


def tiff_bands_last(values: np.ndarray, axes: str, expected: int | None) -> np.ndarray:
    """(H, W, bands) of a TIFF's values by the names of its axes: S are the samples of a pixel, C the channels of a microscope."""
    named = next((axes.index(name) for name in "SC" if name in axes and len(axes) == 3), None)
    return np.moveaxis(values, named, 2) if named is not None and values.ndim == 3 else bands_last(values, expected)


def _tiff_by_pillow(data: Data, page: Any, nodata: float | None, error: Exception) -> Bands:
    """Pillow's own libtiff knows compressions that tifffile needs a package for, but takes all colour for 8-bit."""
    if "imagecodecs" not in str(error):
        raise error
    if page.dtype != np.uint8 and page.samplesperpixel > 1:
        compression, kind = getattr(page.compression, "name", page.compression), f"{page.dtype} in {page.samplesperpixel} bands"
        remedy = "`pip install imagecodecs`, or write it uncompressed or deflated without floating-point predictor"
        raise DecodeError(f"{kind}, compressed by {compression}, needs the package imagecodecs; {remedy}") from error
    bands = pillow_bands(open_upright(data))
    values = bands.values
    return Bands(values if page.dtype is None or values.dtype == np.uint8 else values.astype(page.dtype), bands.colour, bands.alpha, nodata)


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """TIFF 6.0, tag 274: 5 to 8 have rows and columns exchanged; then each says where row 0 and column 0 are."""
    if orientation in TURNED:
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return values[:, ::-1] if orientation in (2, 3, 6, 7) else values
