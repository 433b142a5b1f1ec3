"""Image files to pixels."""

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from autoencoder.data.bands import Decoded, DecodeError, Misfit, select
from autoencoder.data.formats import Data, kind_of, open_upright, read_bands, reasons
from autoencoder.pixel_recipe import PixelRecipe

__all__ = ["DecodeError", "Decoded", "Misfit", "decode_image"]

_BITS_PER_SAMPLE = 258
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


def decode_image(data: Data, recipe: PixelRecipe) -> Decoded:
    """Decode a file's bytes or path to the pixels that the recipe takes; `select` says what becomes of other bands.

    EXIF orientation is applied. Transparent 8-bit images are laid over white where grey or colour is taken. One channel is the ITU-R 601
    luma of a colour image; three channels repeat a grey one. Black-and-white images become 0 and 255, palettes and CMYK
    become RGB by their formulas; colour profiles are not applied. Of several frames the first counts.

    Raises DecodeError for broken, truncated and unknown files, and its subclass Misfit for images that the recipe cannot take.
    """
    plain = recipe.channels in (1, 3) and recipe.bands is None and recipe.nodata is None and not recipe.ranged
    if plain and (pixels := _eight_bit(data, recipe.channels)) is not None:
        return Decoded(pixels, None, pixels.dtype)
    return select(read_bands(data, recipe.channels if recipe.bands is None else None), recipe)


def _eight_bit(data: Data, channels: int) -> np.ndarray | None:
    """Grey or colour by Pillow's own conversions; None for what is not 8-bit, or no image to Pillow."""
    with reasons():
        if kind_of(data) in ("npy", "deep png"):
            return None
        try:
            image = open_upright(data)
        except UnidentifiedImageError:
            return None
        # Pillow keeps 8 bits of the 16 that a colour TIFF may have.
        deep_colour = isinstance(image, TiffImageFile) and max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,))) > 8
        if deep_colour or image.mode in ("I", "F") or image.mode.startswith("I;16"):
            return None
        pixels = np.asarray(_over_white(image).convert("L" if channels == 1 else "RGB"))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode not in _WITH_ALPHA and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
