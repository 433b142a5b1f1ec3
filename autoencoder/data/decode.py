"""Image files, and images that are read already, to pixels."""

from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from autoencoder.data.bands import Bands, Decoded, DecodeError, Misfit, select
from autoencoder.data.formats import Data, array_bands, kind_of, open_upright, pillow_bands, read_bands, reasons
from autoencoder.pixel_recipe import PixelRecipe

__all__ = ["DecodeError", "Decoded", "Misfit", "bands_of", "decode_image", "take_image"]

_BITS_PER_SAMPLE = 258
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""Modes of Pillow of more than 8 bits."""
FEW = 4
"""Rows that no image to train on has: so many at most along the first axis of an array are its channels."""
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


def decode_image(data: Data, recipe: PixelRecipe) -> Decoded:
    """Decode a file's bytes or path to the pixels that the recipe takes; `select` says what becomes of other bands.

    EXIF orientation is applied. Transparent 8-bit images are laid over white where grey or colour is taken. One channel is the ITU-R 601
    luma of a colour image; three channels repeat a grey one. Black-and-white images become 0 and 255, palettes and CMYK
    become RGB by their formulas; colour profiles are not applied. Of several frames the first counts.

    Raises DecodeError for broken, truncated and unknown files, and its subclass Misfit for images that the recipe cannot take.
    """
    if _plain(recipe) and (pixels := _eight_bit(data, recipe.channels)) is not None:
        return Decoded(pixels, None, pixels.dtype)
    return select(read_bands(data, recipe.channels if recipe.bands is None else None), recipe)


def take_image(image: Any, recipe: PixelRecipe) -> Decoded:
    """A PIL image, or an array (H, W) or (H, W, bands), as `decode_image` takes a file of it; DecodeError for anything else, and for an
    image file whose deeper colours Pillow has not kept."""
    if isinstance(image, Image.Image) and _plain(recipe):
        with reasons():
            pixels = _eight_bit_of(_upright(image), recipe.channels)
        if pixels is not None:
            return Decoded(pixels, None, pixels.dtype)
    return select(bands_of(image), recipe)


def bands_of(image: Any) -> Bands:
    """All bands of a PIL image, or of an array (H, W) or (H, W, bands); DecodeError for anything else."""
    with reasons():
        if isinstance(image, Image.Image):
            return pillow_bands(_upright(image))
        if not isinstance(image, np.ndarray):
            remedy = " (tensors: image.permute(1, 2, 0).numpy())" if hasattr(image, "permute") else ""
            raise DecodeError(f"a {type(image).__name__}; give a NumPy array (H, W) or (H, W, C), or a PIL image{remedy}")
        if image.ndim not in (2, 3) or not image.size:
            raise DecodeError(f"an array of shape {image.shape}; give (H, W) or (H, W, C)")
        if image.ndim == 3 and image.shape[0] <= FEW < min(image.shape[1:]):
            raise DecodeError(f"an array of shape {image.shape}, whose channels stand first; give (H, W, C): array.transpose(1, 2, 0)")
        return array_bands(image if image.ndim == 3 else image[:, :, None])


def _plain(recipe: PixelRecipe) -> bool:
    """Whether Pillow's own conversions make what it takes."""
    return recipe.channels in (1, 3) and recipe.bands is None and recipe.nodata is None and not recipe.ranged


def _eight_bit(data: Data, channels: int) -> np.ndarray | None:
    """Grey or colour by Pillow's own conversions; None for what is not 8-bit, or no image to Pillow."""
    with reasons():
        if kind_of(data) in ("npy", "deep png"):
            return None
        try:
            image = open_upright(data)
        except UnidentifiedImageError:
            return None
        return _eight_bit_of(image, channels)


def _eight_bit_of(image: Image.Image, channels: int) -> np.ndarray | None:
    if _loses_bits(image) or image.mode in _DEEP:
        return None
    opaque, mode = _over_white(image), "L" if channels == 1 else "RGB"
    # Converting to its own mode would copy it.
    pixels = np.asarray(opaque if opaque.mode == mode else opaque.convert(mode))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _loses_bits(image: Image.Image) -> bool:
    """Whether Pillow keeps 8 bits of more that the file has in its colours, as far as the image can still tell."""
    if image.mode in _DEEP:
        return False
    if isinstance(image, TiffImageFile):
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,))) > 8
    # What is to be read stands in the tiles until it is read.
    return isinstance(image, PngImageFile) and any(";16" in str(tile[-1]) for tile in image.tile)


def _upright(image: Image.Image) -> Image.Image:
    """A copy, turned as its EXIF orientation says."""
    # A copy no longer knows its file.
    if _loses_bits(image):
        raise DecodeError("Pillow keeps 8 of the 16 bits of this file's colours; give an array")
    return ImageOps.exif_transpose(image)


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode not in _WITH_ALPHA and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
