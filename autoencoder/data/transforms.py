"""Crops of pixels (H, W, C) and of the mask (H, W) that says which are valid; they keep the dtype.

A crop is cut from the image scaled by a factor. Only the crop is resampled: its box in the unscaled image, with the
neighbourhood that the filter reaches, gives the same pixels as scaling the whole image first. A pixel of a resampled crop is
valid where the filter reaches valid pixels only: what stands in the missing ones changes no valid pixel of a crop.
"""

import math

import numpy as np
from PIL import Image

from autoencoder.data_config import DataConfig

_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
_REACH = {"lanczos": 3.0, "bicubic": 2.0, "bilinear": 1.0, "box": 0.5}


Size = tuple[int, int]
"""(height, width)."""


def train_crop(
    pixels: np.ndarray, config: DataConfig, rng: np.random.Generator, valid: np.ndarray | None = None, size: Size | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """A training crop (R, R, C), and of the mask, by four uniform draws of `rng`: zoom, row, column, flip; then one of a channel order.

    The image is scaled (`resize`, then the zoom where crops are random), enlarged where it is smaller than the crop,
    cut and perhaps mirrored, and its channels perhaps put into another order. A crop of a `size` of its own (h, w, C) is cut from the
    image scaled to cover it, then zoomed; `resize` does not count.
    """
    zoom, row, column, mirror = rng.random(4)
    order = rng.permutation(pixels.shape[2]) if config.shuffle_channels else slice(None)
    if config.crop == "random":
        low, high = config.zoom
        scaled = _scaled(pixels, config, size, low * (high / low) ** zoom)
        top, left = (math.floor(draw * (room + 1)) for draw, room in zip((row, column), _room(scaled, config, size), strict=True))
    else:
        scaled = _scaled(pixels, config, size)
        top, left = (room // 2 for room in _room(scaled, config, size))
    crop, crop_valid = _cut(pixels, valid, scaled, (top, left), size or _square(config), config)
    if config.flip and mirror < 0.5:
        crop, crop_valid = mirrored(crop), None if crop_valid is None else mirrored(crop_valid)
    return crop[:, :, order], crop_valid


def validation_crop(
    pixels: np.ndarray, config: DataConfig, k: int, valid: np.ndarray | None = None, size: Size | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Crop k, row by row, of the grid of crops (R, R, C) around the image's centre, and of the mask.

    They lie side by side where the scaled image has room for them, and overlap evenly where it has not. With a `size` of their own they
    are cut from the image scaled to cover it.
    """
    scaled, wanted = _scaled(pixels, config, size), size or _square(config)
    cells, grid = divmod(k, config.validation_grid), config.validation_grid
    top, left = (_grid_offset(length, side, cell, grid) for length, side, cell in zip(scaled, wanted, cells, strict=True))
    return _cut(pixels, valid, scaled, (top, left), wanted, config)


def mirrored(crop: np.ndarray) -> np.ndarray:
    """A crop, or its mask, with left and right exchanged."""
    return crop[:, ::-1]


def _square(config: DataConfig) -> Size:
    return config.resolution, config.resolution


def _scaled(pixels: np.ndarray, config: DataConfig, size: Size | None, zoom: float = 1.0) -> Size:
    """Height and width of the scaled image, at least those of a crop."""
    height, width = pixels.shape[:2]
    crop_height, crop_width = size or _square(config)
    cover = max(crop_height / height, crop_width / width)
    plain = cover if size is not None else config.resize / min(height, width) if config.resize else 1.0
    scale = max(plain * zoom, cover)
    return max(crop_height, round(height * scale)), max(crop_width, round(width * scale))


def _room(scaled: Size, config: DataConfig, size: Size | None) -> Size:
    """How far down and across a crop can be moved."""
    crop_height, crop_width = size or _square(config)
    return scaled[0] - crop_height, scaled[1] - crop_width


def _grid_offset(length: int, side: int, cell: int, cells: int) -> int:
    span = min(cells * side, length)
    step = (span - side) / max(1, cells - 1)
    return (length - span) // 2 + round(cell * step)


def _cut(
    pixels: np.ndarray, valid: np.ndarray | None, scaled: Size, place: tuple[int, int], size: Size, config: DataConfig
) -> tuple[np.ndarray, np.ndarray | None]:
    """The crop of `size` at `place` (top, left) of the image `scaled`, and of the mask."""
    (top, left), (height, width) = place, size
    if scaled == pixels.shape[:2]:
        window = np.s_[top : top + height, left : left + width]
        return pixels[window], None if valid is None else valid[window]
    down, across = pixels.shape[0] / scaled[0], pixels.shape[1] / scaled[1]
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    # Pixels beyond the filter's reach have no weight; converting them to PIL would cost more than the resampling.
    margin_y, margin_x = (math.ceil(_REACH[config.filter] * max(1.0, scale)) + 1 for scale in (down, across))
    y, x = max(0, math.floor(box[1]) - margin_y), max(0, math.floor(box[0]) - margin_x)
    near = np.s_[y : math.ceil(box[3]) + margin_y, x : math.ceil(box[2]) + margin_x]
    rows, columns = pixels[near].shape[:2]
    # Rounding may put the far edge an ulp beyond the image, which PIL refuses.
    inside = (box[0] - x, box[1] - y, min(box[2] - x, columns), min(box[3] - y, rows))
    crop_valid = None if valid is None else _resample_valid(valid[near], inside, size, config.filter)
    return _resample(pixels[near], inside, size, config.filter), crop_valid


def _resample(pixels: np.ndarray, box: tuple[float, float, float, float], size: Size, filter: str) -> np.ndarray:
    def resized(plane: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(plane).resize((size[1], size[0]), _FILTERS[filter], box))

    channels = pixels.shape[2]
    if pixels.dtype == np.uint8 and channels in (1, 3):
        return resized(pixels if channels == 3 else pixels[:, :, 0]).reshape(*size, -1)
    if pixels.dtype == np.uint8:
        return np.stack([resized(np.ascontiguousarray(pixels[:, :, channel])) for channel in range(channels)], axis=2)
    # PIL resamples other values as floating point only, a channel at a time.
    planes = np.stack([resized(pixels[:, :, channel].astype(np.float32)) for channel in range(channels)], axis=2)
    if pixels.dtype == np.float32:
        return planes
    ends = np.iinfo(pixels.dtype)
    return planes.round().clip(ends.min, ends.max).astype(pixels.dtype)


def _resample_valid(valid: np.ndarray, box: tuple[float, float, float, float], size: Size, filter: str) -> np.ndarray:
    """Which pixels of the resampled box no missing pixel has a weight in: those of whose neighbourhood none is missing."""
    missing = np.zeros((valid.shape[0] + 1, valid.shape[1] + 1), np.int64)
    missing[1:, 1:] = (~valid).cumsum(0).cumsum(1)
    (top, bottom), (left, right) = (
        _neighbourhoods(box[axis], box[axis + 2], side, length, _REACH[filter])
        for axis, side, length in ((1, size[0], valid.shape[0]), (0, size[1], valid.shape[1]))
    )
    bottom, top = bottom[:, None], top[:, None]
    none_missing: np.ndarray = missing[bottom, right] - missing[top, right] - missing[bottom, left] + missing[top, left] == 0
    return none_missing


def _neighbourhoods(start: float, end: float, side: int, length: int, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """First and last (exclusive) source pixel that the filter weighs, of each of `side` pixels between `start` and `end`."""
    scale = (end - start) / side
    centre = start + (np.arange(side) + 0.5) * scale
    support = reach * max(1.0, scale)
    first, last = np.floor(centre - support + 0.5), np.floor(centre + support + 0.5)
    return first.clip(0, length).astype(np.int64), last.clip(0, length).astype(np.int64)
