"""Crops of pixels (H, W, C), uint8 or uint16; they keep the dtype.

A crop is cut from the image scaled by a factor. Only the crop is resampled: its box in the unscaled image, with the
neighbourhood that the filter reaches, gives the same pixels as scaling the whole image first.
"""

import math

import numpy as np
from PIL import Image

from autoencoder.config import DataConfig

_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
_REACH = {"lanczos": 3.0, "bicubic": 2.0, "bilinear": 1.0, "box": 0.5}


def train_crop(pixels: np.ndarray, config: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """A training crop (R, R, C) by four uniform draws of `rng`: zoom, row, column, flip; then one of a channel order.

    The image is scaled (`resize`, then the zoom where crops are random), enlarged where it is smaller than the crop,
    cut and perhaps mirrored, and its channels perhaps put into another order.
    """
    zoom, row, column, mirror = rng.random(4)
    order = rng.permutation(pixels.shape[2]) if config.shuffle_channels else slice(None)
    if config.crop == "random":
        low, high = config.zoom
        height, width = _scaled(pixels, config, low * (high / low) ** zoom)
        top = math.floor(row * (height - config.resolution + 1))
        left = math.floor(column * (width - config.resolution + 1))
    else:
        height, width = _scaled(pixels, config)
        top, left = (height - config.resolution) // 2, (width - config.resolution) // 2
    crop = _cut(pixels, (height, width), top, left, config)
    crop = crop[:, ::-1] if config.flip and mirror < 0.5 else crop
    return crop[:, :, order]


def validation_crop(pixels: np.ndarray, config: DataConfig, k: int) -> np.ndarray:
    """Crop k, row by row, of the grid of crops (R, R, C) around the image's centre.

    They lie side by side where the scaled image has room for them, and overlap evenly where it has not.
    """
    size = _scaled(pixels, config)
    row, column = divmod(k, config.validation_grid)
    top, left = (_grid_offset(length, config, cell) for length, cell in zip(size, (row, column), strict=True))
    return _cut(pixels, size, top, left, config)


def _scaled(pixels: np.ndarray, config: DataConfig, zoom: float = 1.0) -> tuple[int, int]:
    """Height and width of the scaled image, at least those of a crop."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    scale = max((config.resize / short if config.resize else 1.0) * zoom, config.resolution / short)
    return max(config.resolution, round(height * scale)), max(config.resolution, round(width * scale))


def _grid_offset(length: int, config: DataConfig, cell: int) -> int:
    span = min(config.validation_grid * config.resolution, length)
    step = (span - config.resolution) / max(1, config.validation_grid - 1)
    return (length - span) // 2 + round(cell * step)


def _cut(pixels: np.ndarray, size: tuple[int, int], top: int, left: int, config: DataConfig) -> np.ndarray:
    """The crop at (top, left) of the image scaled to `size`."""
    side = config.resolution
    if size == pixels.shape[:2]:
        return pixels[top : top + side, left : left + side]
    down, across = pixels.shape[0] / size[0], pixels.shape[1] / size[1]
    box = (left * across, top * down, (left + side) * across, (top + side) * down)
    # Pixels beyond the filter's reach have no weight; converting them to PIL would cost more than the resampling.
    margin_y, margin_x = (math.ceil(_REACH[config.filter] * max(1.0, scale)) + 1 for scale in (down, across))
    y, x = max(0, math.floor(box[1]) - margin_y), max(0, math.floor(box[0]) - margin_x)
    near = pixels[y : math.ceil(box[3]) + margin_y, x : math.ceil(box[2]) + margin_x]
    # Rounding may put the far edge an ulp beyond the image, which PIL refuses.
    inside = (box[0] - x, box[1] - y, min(box[2] - x, near.shape[1]), min(box[3] - y, near.shape[0]))
    return _resample(near, inside, side, config.filter)


def _resample(pixels: np.ndarray, box: tuple[float, float, float, float], side: int, filter: str) -> np.ndarray:
    def resized(plane: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(plane).resize((side, side), _FILTERS[filter], box))

    if pixels.dtype == np.uint8:
        return resized(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]).reshape(side, side, -1)
    # PIL resamples 16-bit values as floating point only, a channel at a time.
    planes = [resized(pixels[:, :, channel].astype(np.float32)) for channel in range(pixels.shape[2])]
    return np.stack(planes, axis=2).round().clip(0, 65535).astype(np.uint16)
