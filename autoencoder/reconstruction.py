"""Whole images of any size through an autoencoder."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from autoencoder.data.pixels import levels_of, to_images, to_values
from autoencoder.metrics import psnr
from autoencoder.model import AutoencoderKL, decode, downsampling, encode
from autoencoder.pixel_recipe import PixelRecipe
from autoencoder.posterior import DiagonalGaussian
from autoencoder.preview import Preview
from autoencoder.report.pictures import side_by_side

Mode = Callable[[DiagonalGaussian], Tensor]
"""From the encoder's Gaussian to the latents that are decoded: its mode, or what a flow posterior makes of it."""


@dataclass(frozen=True)
class Whole:
    """A whole image as the encoder takes it."""

    images: Tensor
    """(1, C, H, W) in [-1, 1], 0 where missing."""
    valid: Tensor | None
    """(1, 1, H, W), where not; None where nothing can be."""
    recipe: PixelRecipe
    """The model's, with the levels of this image."""

    @classmethod
    def of(cls, pixels: np.ndarray, valid: np.ndarray | None, recipe: PixelRecipe, device: torch.device) -> "Whole":
        """That of source values (H, W, C) and of what is valid of them (H, W)."""
        stacked = torch.tensor(pixels).permute(2, 0, 1)[None].to(device)
        known = None if valid is None else torch.tensor(valid)[None, None].to(device)
        own = dataclasses.replace(recipe, levels=levels_of(stacked, recipe))
        return cls(to_images(stacked, recipe, known), known, own)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor, *, tile: int | None = None, mode: Mode = DiagonalGaussian.mode) -> Tensor:
    """Reconstructions of images (B, C, H, W) in [-1, 1] from the posterior's mode, at any H and W.

    Sides that the network's factor does not divide are padded by their edge and cropped again. Images with a side above
    `tile` pixels go through in blended tiles of that size: bounded memory, approximate near the seams.
    """
    factor = downsampling(vae)
    height, width = images.shape[-2:]
    padded = functional.pad(images, (0, -width % factor, 0, -height % factor), mode="replicate")
    if tile is None or max(height, width) <= tile:
        reconstruction = decode(vae, mode(encode(vae, padded)))
    else:
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // factor
        try:
            posterior = vae.encode(padded).latent_dist
            latents = mode(DiagonalGaussian(posterior.mean, posterior.logvar))
            # A widened network makes log scales beside the image.
            reconstruction = vae.decode(latents).sample[:, : images.shape[1]]
        finally:
            vae.disable_tiling()
    return reconstruction[..., :height, :width]


def quality(whole: Whole, reconstruction: Tensor) -> float:
    """PSNR in dB, on 8-bit pixels or on the recipe's range, over what is not missing."""
    return psnr(whole.images, reconstruction, eight_bit=whole.recipe.eight_bit, valid=whole.valid).item()


def save_picture(whole: Whole, reconstruction: Tensor, path: Path, *, preview: Preview) -> None:
    """Write an image beside its reconstruction as an 8-bit PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    original, reconstructed = preview.pixels(whole.images, reconstruction, valid=whole.valid)
    side_by_side(original[0], reconstructed[0]).save(path)


def fits_png(recipe: PixelRecipe) -> bool:
    """Whether a picture holds all that a reconstruction does."""
    return recipe.eight_bit and recipe.channels in (1, 3) and not recipe.may_miss


def save_values(
    reconstruction: Tensor, recipe: PixelRecipe, path: Path, dtype: np.dtype, *, valid: Tensor | None = None, nodata: float | None = None
) -> None:
    """Write the source values of a reconstruction (C, H, W) in [-1, 1] as a TIFF of `dtype`, a band a channel; integers are rounded.

    Pixels missing by `valid` (H, W) get the mark `nodata`, which the file names as GDAL does; floating-point ones without one NaN,
    integers 0.
    """
    import tifffile

    values = to_values(reconstruction, recipe).cpu().permute(1, 2, 0).double().numpy()
    if np.issubdtype(dtype, np.integer):
        held = np.iinfo(dtype)
        values = values.round().clip(held.min, held.max)
    if valid is not None:
        values[~valid.cpu().numpy()] = nodata if nodata is not None else 0 if np.issubdtype(dtype, np.integer) else np.nan
    marked = [(GDAL_NODATA, "s", 0, f"{nodata:g}", True)] if nodata is not None else []
    path.parent.mkdir(parents=True, exist_ok=True)
    layout: dict[str, Any] = {"planarconfig": "contig"} if values.shape[2] > 1 else {}
    written = values.astype(dtype) if layout else values[:, :, 0].astype(dtype)
    tifffile.imwrite(path, written, photometric="minisblack", extratags=marked, metadata=None, **layout)


def dtype_of(recipe: PixelRecipe) -> np.dtype:
    """The smallest type of the values that the recipe takes, where no file tells: an integer's, or float32 for continuous ones."""
    if not recipe.levels:
        return np.dtype(np.float32)
    low, high = (0, recipe.levels - 1) if recipe.low is None or recipe.high is None else (min(recipe.low), max(recipe.high))
    for kind in ("uint8", "uint16", "int16", "int32"):
        held = np.iinfo(kind)
        if held.min <= low and high <= held.max:
            return np.dtype(kind)
    return np.dtype(np.int64)


GDAL_NODATA = 42113
"""TIFF tag of the value that marks missing pixels."""
