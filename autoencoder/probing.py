"""What is measured on a few spread crops: errors of posterior samples, and the gap."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from autoencoder import verdict
from autoencoder.data.loader import Batch, ValidationSet
from autoencoder.data.pixels import to_images
from autoencoder.evaluate import GapConfig
from autoencoder.experimental.module import Family
from autoencoder.gap import join, measure_gap
from autoencoder.latents.progress import Progress
from autoencoder.likelihood import Likelihood
from autoencoder.missing import filled
from autoencoder.model import AutoencoderKL, decode, decode_parameters, decoded_at_once, encode
from autoencoder.pixel_recipe import PixelRecipe
from autoencoder.prior import StandardNormal
from autoencoder.runtime.errors import UsageError

MOST_CROPS = 64
"""Crops that sample errors, equivariance, spectra and fp16 headroom are measured on, spread over the images."""
MOST_AT_ONCE = 16
"""Crops that are refined together: more are hardly faster and would hide the progress."""


@torch.no_grad()
def sample_errors(
    vae: AutoencoderKL, crops: ValidationSet, recipe: PixelRecipe, family: Family | None, device: torch.device
) -> tuple[float, float]:
    """Mean |e| and mean e**2 over the values of images reconstructed from a posterior sample, where images span [-1, 1]."""
    absolute, squared, values = 0.0, 0.0, 0
    for batch, images, valid in spread_batches(crops, recipe, MOST_CROPS, decoded_at_once(crops.side), device):
        posterior, noise = encode(vae, images), batch.noise[batch.weight > 0].to(device)
        latents = posterior.sample(noise) if family is None else family.sample(posterior, noise)[0]
        error = (images - filled(decode(vae, latents), images, valid)).double()
        observed = error.numel() if valid is None else int(valid.sum()) * images.shape[1]
        absolute, squared, values = absolute + error.abs().sum().item(), squared + error.square().sum().item(), values + observed
    if not values:
        raise UsageError(f"none of the {min(MOST_CROPS, len(crops))} crops that errors are measured on can be read")
    return absolute / values, squared / values


def gap_report(
    vae: AutoencoderKL,
    crops: ValidationSet,
    config: GapConfig,
    *,
    recipe: PixelRecipe,
    likelihood: Likelihood,
    family: Family | None,
    device: torch.device,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """The gap and its verdict for JSON; progress goes to stderr. Noise depends on how many crops are refined together.

    Raises:
        UsageError: fewer than two readable crops, or values that are not finite.
    """
    vae.requires_grad_(False)
    # Refining keeps what the decoder computed for its way back.
    at_once = min(batch_size, MOST_AT_ONCE, max(1, decoded_at_once(crops.side) // 4))
    total = min(config.images, len(crops))
    if total < 2:
        raise UsageError(f"gap: there is {total} crop to measure on; give data of at least 2, for a standard error")
    progress, parts, photos = Progress(total, 0, verb="gap measured on", unit="crop"), [], set()
    generator = torch.Generator().manual_seed(seed)
    for batch, images, valid in spread_batches(crops, recipe, total, at_once, device):
        try:
            parts += [
                measure_gap(
                    images,
                    encode=lambda x: encode(vae, x),
                    decode=lambda z: decode_parameters(vae, z),
                    likelihood=likelihood.observed(valid),
                    prior=StandardNormal() if family is None else family.prior,
                    family=None if family is None else family.families.posterior_from,
                    samples=config.samples,
                    refine_steps=config.refine_steps,
                    lr=config.lr,
                    generator=generator,
                )
            ]
        except ValueError as error:
            progress.close(finished=False)
            raise UsageError(f"gap: {error}") from error
        photos |= set(batch.photo[batch.weight > 0].tolist())
        progress.advance(len(batch.ids))
    progress.close(finished=True)
    gap, flow = join(parts), family is not None and family.families.posterior is not None
    if len(gap.kl) < 2:
        raise UsageError(f"gap: {len(gap.kl)} of {total} crops can be read; give at least 2, for a standard error")
    return {"images": len(photos), **verdict.report(gap, refine_steps=config.refine_steps, flow=flow), "at_once": at_once}


def spread_batches(
    crops: ValidationSet, recipe: PixelRecipe, most: int, at_once: int, device: torch.device
) -> Iterator[tuple[Batch, Tensor, Tensor | None]]:
    """Batches of at most `at_once` of at most `most` evenly spread crops, their readable images (B, C, R, R) and what is valid of them.

    No image gives a second crop before each has given one.
    """
    count, an_image = min(most, len(crops)), len(crops) // crops.photos
    if count <= crops.photos:
        positions = [i * crops.photos // count * an_image + i % an_image for i in range(count)]
    else:
        positions = [i * len(crops) // count for i in range(count)]
    for start in range(0, count, at_once):
        batch = crops.batch(positions[start : start + at_once])
        readable = batch.weight > 0
        if readable.any():
            valid = None if batch.valid is None else batch.valid[readable].to(device)
            yield batch, to_images(batch.pixels[readable].to(device), recipe, valid), valid
