"""The bands of an image file as they stand in it, and how a recipe makes pixels of them."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autoencoder.pixel_recipe import PixelRecipe


class DecodeError(Exception):
    """A file that is not a whole image; the message is the reason, without the file's name."""


class Misfit(DecodeError):
    """A whole image that the recipe cannot take; `key` is the setting of `DataConfig` that says otherwise."""

    def __init__(self, key: str, reason: str) -> None:
        self.key = key
        super().__init__(reason)


@dataclass(frozen=True)
class Bands:
    """What a file holds."""

    values: np.ndarray
    """(H, W, N), any integer or real floating-point dtype."""
    colour: bool = False
    """Whether the bands are grey or red, green and blue, so that one can be made of the other."""
    alpha: bool = False
    """Whether the last band is opacity."""
    nodata: float | None = None
    """Value that marks missing ones, where the file says so."""


@dataclass(frozen=True)
class Decoded:
    """An image as a recipe takes it."""

    pixels: np.ndarray
    """(H, W, C): uint8 or uint16, of a stated range also int16 or float32; 0 where missing."""
    valid: np.ndarray | None
    """(H, W) bool, false where pixels are missing; None where the recipe lets none be."""
    dtype: np.dtype[Any]
    """The file's own."""
    nodata: float | None = None
    """The value that marked missing ones in this file, where there was one."""


def select(bands: Bands, recipe: PixelRecipe) -> Decoded:
    """The bands that the recipe takes, missing values found, in a dtype that holds them.

    Without `recipe.bands` a file has as many bands as the recipe has channels, except that a single band is repeated where it takes three,
    colour becomes grey (ITU-R 601 luma) where it takes one, and transparent images of integers at full range are laid over white.

    Raises Misfit.
    """
    chosen = _chosen(bands, recipe)
    mark = bands.nodata if recipe.nodata is None or recipe.nodata == "file" else recipe.nodata
    values, valid = _without_missing(chosen, mark, recipe)
    return Decoded(_standard(values, recipe), valid, bands.values.dtype, None if valid is None else mark)


def _chosen(bands: Bands, recipe: PixelRecipe) -> np.ndarray:
    count = bands.values.shape[2]
    if recipe.bands is not None:
        if max(recipe.bands) >= count:
            raise Misfit("bands", f"it has {_bands(count)}, counted from 0, so none numbered {max(recipe.bands)} of {list(recipe.bands)}")
        return bands.values[:, :, list(recipe.bands)]
    if count == recipe.channels:
        return bands.values
    if bands.alpha and recipe.channels in (1, 3) and bands.values.dtype in (np.uint8, np.uint16) and not recipe.ranged:
        return _chosen(replace(bands, values=_over_white(bands.values), alpha=False), recipe)
    if count == 1 and recipe.channels == 3:
        return np.repeat(bands.values, 3, axis=2)
    if count == 3 and recipe.channels == 1 and bands.colour:
        luma = bands.values.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
        return (luma if bands.values.dtype.kind == "f" else luma.round()).astype(bands.values.dtype)[:, :, None]
    remedy = f"give data.channels={count}" + (f", or the {recipe.channels} to take as data.bands" if count > recipe.channels else "")
    raise Misfit("channels", f"it has {_bands(count)} where data.channels={recipe.channels} are taken; {remedy}")


def _bands(count: int) -> str:
    return f"{count} band{'' if count == 1 else 's'}"


def _over_white(values: np.ndarray) -> np.ndarray:
    white = np.iinfo(values.dtype).max
    colours, opacity = values[:, :, :-1].astype(np.float64), values[:, :, -1:] / white
    return (colours * opacity + white * (1 - opacity)).round().astype(values.dtype)


def _without_missing(values: np.ndarray, mark: float | None, recipe: PixelRecipe) -> tuple[np.ndarray, np.ndarray | None]:
    """The values with 0 in missing pixels, and which are valid; Misfit where some are missing that may not be."""
    missing = find_missing(values, mark)
    if recipe.nodata is not None:
        return np.where(missing[:, :, None], np.zeros((), values.dtype), values), ~missing
    if not missing.any():
        return values, None
    marked = mark is not None and bool(_equal(values, mark).any())
    what = f"marks missing values by {mark:g} and has some" if marked else "holds NaN or infinite values"
    raise Misfit("nodata", f"it {what}; give data.nodata=file to leave them out")


def find_missing(values: np.ndarray, mark: float | None) -> np.ndarray:
    """Where one of the bands (H, W, N) is the mark, or not finite: (H, W) bool."""
    missing = np.zeros(values.shape[:2], bool)
    if mark is not None:
        missing |= _equal(values, mark).any(2)
    if values.dtype.kind == "f":
        missing |= ~np.isfinite(values).all(2)
    return missing


def _equal(values: np.ndarray, mark: float) -> np.ndarray:
    """Whether values are the mark, which decimal text has rounded to 6 digits where they are floating-point."""
    if values.dtype.kind != "f":
        # As an integer: a float would have every value converted.
        equal: np.ndarray = values == (int(mark) if float(mark).is_integer() else mark)
        return equal
    with np.errstate(over="ignore", invalid="ignore"):
        return np.isclose(values, mark, rtol=5e-6, atol=0)


def _standard(values: np.ndarray, recipe: PixelRecipe) -> np.ndarray:
    """The values in uint8, uint16, int16 or float32; Misfit where they need a range that is not stated."""
    dtype = values.dtype
    if dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if dtype.kind == "f":
        if not recipe.ranged:
            raise Misfit("low", "floating-point values have no range of their own; give data.low and data.high (inspect_data finds them)")
        return values.astype(np.float32)
    if dtype in (np.uint8, np.uint16) or (dtype == np.int16 and recipe.ranged):
        return values
    if recipe.low is None or recipe.high is None:
        low, high = values.min(), values.max()
        if low < 0 or high > 65535:
            remedy = "give data.low and data.high (inspect_data finds them)"
            raise Misfit("low", f"{dtype} values from {low} to {high} do not fit 16 bits; {remedy}")
        return values.astype(np.uint16)
    # The range decides, not the values: every image of a set is to have the same dtype.
    for narrower in (np.uint16, np.int16):
        ends = np.iinfo(narrower)
        if ends.min <= min(recipe.low) and max(recipe.high) <= ends.max:
            return values.clip(ends.min, ends.max).astype(narrower)
    return values.astype(np.float32)
