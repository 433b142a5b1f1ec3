"""Pixels (integers in the file's depth) to images (floating point in [-1, 1]) and back."""

import torch
from torch import Tensor

_LEVELS = {torch.uint8: 256, torch.uint16: 65536}


def levels_of(pixels: Tensor) -> int:
    """Levels that uint8 (256) or uint16 (65536) pixels have."""
    return _LEVELS[pixels.dtype]


def to_images(pixels: Tensor) -> Tensor:
    """k / ((L - 1) / 2) - 1: uint8 (L = 256) or uint16 (L = 65536) pixels of any shape to float32 images in [-1, 1].

    Floating-point input is images already and comes back as it is. ValueError for other dtypes.
    """
    if pixels.is_floating_point():
        return pixels
    if pixels.dtype not in _LEVELS:
        raise ValueError(f"pixels are uint8, uint16 or floating point (images), not {pixels.dtype}")
    return pixels.to(torch.float32) / ((_LEVELS[pixels.dtype] - 1) / 2) - 1


def to_pixels(images: Tensor, levels: int = 256) -> Tensor:
    """The nearest of `levels` (256: uint8, 65536: uint16) for images clamped to [-1, 1]; `to_pixels(to_images(p), levels) == p`."""
    if levels not in _LEVELS.values():
        raise ValueError(f"levels are 256 or 65536, not {levels}")
    exact = images.to(torch.promote_types(images.dtype, torch.float32))
    counts = ((exact.clamp(-1, 1) + 1) * ((levels - 1) / 2)).round()
    return counts.to(torch.uint8 if levels == 256 else torch.uint16)
