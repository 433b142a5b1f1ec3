"""Whole images of any size through an autoencoder."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from autoencoder.data.pixels import to_images, to_pixels
from autoencoder.metrics import psnr
from autoencoder.model import AutoencoderKL, decode, downsampling, encode
from autoencoder.report.pictures import side_by_side


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor, *, tile: int | None = None) -> Tensor:
    """Reconstructions of images (B, C, H, W) in [-1, 1] from the posterior's mode, at any H and W.

    Sides that the network's factor does not divide are padded by their edge and cropped again. Images with a side above
    `tile` pixels go through in blended tiles of that size: bounded memory, approximate near the seams.
    """
    factor = downsampling(vae)
    height, width = images.shape[-2:]
    padded = functional.pad(images, (0, -width % factor, 0, -height % factor), mode="replicate")
    if tile is None or max(height, width) <= tile:
        reconstruction = decode(vae, encode(vae, padded).mode())
    else:
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // factor
        try:
            reconstruction = vae.decode(vae.encode(padded).latent_dist.mode()).sample
        finally:
            vae.disable_tiling()
    return reconstruction[..., :height, :width]


@torch.no_grad()
def save_reconstruction(vae: AutoencoderKL, pixels: np.ndarray, path: Path, *, device: torch.device, tile: int | None = 1024) -> float:
    """Write one image (H, W, C), uint8 or uint16, beside its reconstruction as an 8-bit PNG; returns the PSNR in dB."""
    original = torch.tensor(pixels).permute(2, 0, 1)[None].to(device)
    images = to_images(original)
    reconstruction = reconstruct(vae, images, tile=tile)
    path.parent.mkdir(parents=True, exist_ok=True)
    side_by_side(to_pixels(images)[0], to_pixels(reconstruction)[0]).save(path)
    return psnr(images, reconstruction).item()
