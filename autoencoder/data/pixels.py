"""Pixels (values as the files have them) to images (floating point in [-1, 1]) and back."""

from functools import lru_cache

import torch
from torch import Tensor

from autoencoder.pixel_recipe import PixelRecipe

_LEVELS = {torch.uint8: 256, torch.uint16: 65536}


def levels_of(pixels: Tensor, recipe: PixelRecipe | None = None) -> int:
    """Values that a band can take: the integer type's 256 or 65536, or those in the recipe's range; 0 where they are continuous."""
    if recipe is not None and recipe.ranged:
        return 0 if pixels.is_floating_point() else recipe.steps
    return _LEVELS[pixels.dtype]


def to_images(pixels: Tensor, recipe: PixelRecipe | None = None, valid: Tensor | None = None) -> Tensor:
    """Float32 images in [-1, 1]: 2 (v - low) / (high - low) - 1 of pixels (..., C, H, W) clipped to the recipe's range.

    Without a range it is the integer type's: uint8 (0 to 255) or uint16 (0 to 65535) pixels of any shape. Where `valid` (..., 1, H, W)
    is false, images are 0, the middle of the range. Without a recipe floating-point input is images already and comes back as it is.
    ValueError for other dtypes.
    """
    if recipe is None or recipe.low is None or recipe.high is None:
        images = _full_range(pixels, recipe)
    else:
        low, high = _ends(recipe.low, recipe.high, pixels.device)
        images = (pixels.to(torch.float32).clamp(low, high) - low) / ((high - low) / 2) - 1
    return images if valid is None else images.where(valid, 0.0)


def to_values(images: Tensor, recipe: PixelRecipe) -> Tensor:
    """Float32 source values of images (..., C, H, W), clamped to the recipe's range: the inverse of `to_images`."""
    exact = images.to(torch.float32).clamp(-1, 1)
    if recipe.low is None or recipe.high is None:
        return (exact + 1) * ((recipe.levels - 1) / 2)
    low, high = _ends(recipe.low, recipe.high, exact.device)
    return torch.lerp(low, high, (exact + 1) / 2)


def to_pixels(images: Tensor, levels: int = 256) -> Tensor:
    """The nearest of `levels` (256: uint8, 65536: uint16) for images clamped to [-1, 1]; `to_pixels(to_images(p), levels) == p`."""
    if levels not in _LEVELS.values():
        raise ValueError(f"levels are 256 or 65536, not {levels}")
    exact = images.to(torch.promote_types(images.dtype, torch.float32))
    counts = ((exact.clamp(-1, 1) + 1) * ((levels - 1) / 2)).round()
    return counts.to(torch.uint8 if levels == 256 else torch.uint16)


def _full_range(pixels: Tensor, recipe: PixelRecipe | None) -> Tensor:
    if recipe is None and pixels.is_floating_point():
        return pixels
    if pixels.dtype not in _LEVELS:
        raise ValueError(f"pixels are uint8, uint16 or floating point (images), not {pixels.dtype}")
    return pixels.to(torch.float32) / ((_LEVELS[pixels.dtype] - 1) / 2) - 1


@lru_cache(maxsize=8)
def _ends(low: tuple[float, ...], high: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Low and high of each channel, (C, 1, 1): copied to the device once, not at every step."""
    return tuple(torch.tensor(ends, dtype=torch.float32, device=device)[:, None, None] for ends in (low, high))  # type: ignore[return-value]
