"""Image files to pixels."""

import io
import os

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


class DecodeError(Exception):
    """A file that is not a whole image; the message is the reason, without the file's name."""


def decode_image(data: bytes | str | os.PathLike[str], channels: int) -> np.ndarray:
    """Decode a file's bytes or path to pixels (H, W, channels), uint8 or, for 16-bit grey files, uint16.

    EXIF orientation is applied. Transparent images are laid over white. One channel is the ITU-R 601 luma of a
    colour image; three channels repeat a grey one. Black-and-white images become 0 and 255, palettes and CMYK
    become RGB by their formulas; colour profiles are not applied. Of several frames the first counts.

    Raises DecodeError for broken, truncated and unknown files, and for floating-point images, which have no fixed range.
    """
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
        return _pixels(image, channels)
    except UnidentifiedImageError as error:
        raise DecodeError("not an image of a known format") from error
    except OSError as error:
        raise DecodeError(error.strerror or str(error)) from error
    # PIL's plugins raise whatever their parsing runs into.
    except Exception as error:
        raise DecodeError(f"{type(error).__name__}: {error}") from error


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    if image.mode == "I" or image.mode in _SIXTEEN_BIT:
        return np.repeat(_sixteen_bit(image)[:, :, None], channels, axis=2)
    if image.mode == "F":
        raise ValueError("floating-point images have no fixed range; convert them to 8 or 16 bits")
    pixels = np.asarray(_over_white(image).convert("L" if channels == 1 else "RGB"))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _sixteen_bit(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"32-bit values from {values.min()} to {values.max()} do not fit 16 bits")
    return values.astype(np.uint16)


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode not in _WITH_ALPHA and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
