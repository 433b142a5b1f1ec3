"""Whole images of any size through an autoencoder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from autoencoder.data.pixels import to_images, to_pixels
from autoencoder.metrics import psnr
from autoencoder.model import AutoencoderKL, decode, downsampling, encode
from autoencoder.posterior import DiagonalGaussian
from autoencoder.report.pictures import side_by_side

Mode = Callable[[DiagonalGaussian], Tensor]
"""From the encoder's Gaussian to the latents that are decoded: its mode, or what a flow posterior makes of it."""


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


@torch.no_grad()
def save_reconstruction(
    vae: AutoencoderKL,
    pixels: np.ndarray,
    path: Path,
    *,
    device: torch.device,
    tile: int | None = 1024,
    mode: Mode = DiagonalGaussian.mode,
) -> float:
    """Write one image (H, W, C), uint8 or uint16, beside its reconstruction as an 8-bit PNG; returns the PSNR in dB."""
    original = torch.tensor(pixels).permute(2, 0, 1)[None].to(device)
    images = to_images(original)
    reconstruction = reconstruct(vae, images, tile=tile, mode=mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    side_by_side(to_pixels(images)[0], to_pixels(reconstruction)[0]).save(path)
    return psnr(images, reconstruction).item()
