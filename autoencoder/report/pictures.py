"""Crops in rows and originals beside reconstructions, as pictures. Pixels are uint8 (N, C, H, W) or (C, H, W), C = 1 or 3."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

GAP = 128
"""Grey of the space between crops: reads on light and on dark pages."""
SMALLEST_CROP = 128
"""Crops with a shorter side than this are magnified by a whole factor, so that single pixels stay visible."""


def grid(originals: Tensor, reconstructions: Tensor, columns: int) -> Image.Image:
    """Rows of `columns` originals, each with the row of their reconstructions right below.

    Both are uint8 (N, C, H, W) of one shape, else ValueError. Small crops are magnified by repeating pixels;
    nothing is ever interpolated. Cells left over in the last pair of rows stay grey.
    """
    _check(originals, reconstructions, axes=4)
    return _tiled([originals, reconstructions], columns)


def plain_grid(pixels: Tensor, columns: int) -> Image.Image:
    """Rows of `columns` pictures in reading order; uint8 (N, C, H, W) with N at least 1, else ValueError.

    Magnified and spaced as in `grid`. Cells left over in the last row stay grey.
    """
    _check(pixels, axes=4)
    return _tiled([pixels], columns)


def side_by_side(original: Tensor, reconstruction: Tensor) -> Image.Image:
    """The original left, its reconstruction right, at their own size; both uint8 (C, H, W), else ValueError."""
    _check(original, reconstruction, axes=3)
    left, right = _channels_last(original), _channels_last(reconstruction)
    gap = np.full((left.shape[0], max(2, left.shape[1] // 100), left.shape[2]), GAP, dtype=np.uint8)
    return _picture(np.concatenate([left, gap, right], axis=1))


def _tiled(stacks: Sequence[Tensor], columns: int) -> Image.Image:
    """Bands of `columns` crops, the i-th crops of all stacks below each other; every stack is (N, C, H, W)."""
    images, channels, height, width = stacks[0].shape
    columns = min(columns, images)
    bands = -(-images // columns)
    gap = max(1, min(height, width) // 32)
    between = 2 * gap if len(stacks) > 1 else gap  # what belongs together stands closer
    stride, pitch = width + gap, len(stacks) * (height + gap) - gap + between  # from crop to crop; from band to band
    canvas = np.full((bands * pitch - between, columns * stride - gap, channels), GAP, dtype=np.uint8)
    for row, crops in enumerate(stacks):
        for i, crop in enumerate(_channels_last(crops)):
            top, left = i // columns * pitch + row * (height + gap), i % columns * stride
            canvas[top : top + height, left : left + width] = crop
    factor = max(1, SMALLEST_CROP // min(height, width))
    return _picture(canvas.repeat(factor, axis=0).repeat(factor, axis=1))


def _check(*stacks: Tensor, axes: int) -> None:
    for pixels in stacks:
        if pixels.dtype != torch.uint8 or pixels.ndim != axes or pixels.shape[-3] not in (1, 3):
            raise ValueError(f"got {pixels.dtype} {tuple(pixels.shape)}; give uint8 with {axes} axes and 1 or 3 channels")
        if 0 in pixels.shape:
            raise ValueError(f"got {tuple(pixels.shape)}, which holds no pixel; give at least one picture")
    if len({pixels.shape for pixels in stacks}) > 1:
        first, second = stacks
        raise ValueError(f"originals are {tuple(first.shape)} but reconstructions {tuple(second.shape)}; give one shape")


def _channels_last(pixels: Tensor) -> np.ndarray:
    """(..., C, H, W) → (..., H, W, C) in host memory."""
    return pixels.detach().cpu().movedim(-3, -1).numpy()


def _picture(pixels: np.ndarray) -> Image.Image:
    """(H, W, 1 or 3) → a grey or RGB picture."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
