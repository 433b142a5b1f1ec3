"""What makes latents easy or hard to diffuse: how they transform with the image, and where their energy lies."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoencoder.data.loader import ValidationSet
from autoencoder.equivariance import resize, turn
from autoencoder.metrics import psnr
from autoencoder.model import AutoencoderKL, decode, decoded_at_once, downsampling, encode
from autoencoder.pixel_recipe import PixelRecipe
from autoencoder.posterior import DiagonalGaussian
from autoencoder.probing import MOST_CROPS, spread_batches
from autoencoder.spectrum import Spectrum

TRANSFORMATIONS = ((0.5, 0), (0.75, 0), (1.0, 1), (1.0, 2), (1.0, 3), (0.5, 1))
"""(scale, quarter turns). Where the latents' side times the scale is no whole number, the nearest is taken."""


@dataclass
class _Sums:
    """Squared differences of a transformation, squared spreads that they are relative to, and PSNR; summed over crops."""

    decoder: float = 0.0
    decoder_spread: float = 0.0
    encoder: float = 0.0
    encoder_spread: float = 0.0
    psnr: float = 0.0
    crops: int = 0


@torch.no_grad()
def measure_diffusability(
    vae: AutoencoderKL,
    crops: ValidationSet,
    recipe: PixelRecipe,
    device: torch.device,
    mode: Callable[[DiagonalGaussian], Tensor] = DiagonalGaussian.mode,
) -> dict[str, Any]:
    """Equivariance errors and spectra, for JSON, on at most `MOST_CROPS` crops and the `mode` of each posterior.

    With tau a transformation, E the encoder's mean and D the decoder, each a root of summed squares over a root of summed squares:

        decoder error  |D(tau z) - tau D(z)| / |tau D(z) - its mean|        encoder error  |E(tau x) - tau E(x)| / |tau E(x) - its mean|

    0 is an equivariant half, 1 one whose answer is as far off as a plain colour (or each latent channel's mean) would be. Missing pixels
    count as the mid-grey that the encoder sees.
    """
    factor, sums = downsampling(vae), dict[tuple[float, int], _Sums]()
    spectra = {"latents": Spectrum(), "images": Spectrum()}
    measured = 0
    for _, images, _ in spread_batches(crops, recipe, MOST_CROPS, decoded_at_once(crops.side), device):
        latents = mode(encode(vae, images))
        reconstruction = decode(vae, latents)
        measured += len(images)
        spectra["latents"].add(latents)
        spectra["images"].add(resize(images, latents.shape[-1]))
        for scale, turns in _possible(latents.shape[-1]):
            side = round(scale * latents.shape[-1])

            def tau(maps: Tensor, size: int, turns: int = turns) -> Tensor:
                return turn(resize(maps, size), torch.full((len(maps),), turns, device=maps.device))

            moved, wanted, target = tau(latents, side), tau(reconstruction, side * factor), tau(images, side * factor)
            made, encoded = decode(vae, moved), mode(encode(vae, target))
            its = sums.setdefault((side / latents.shape[-1], turns), _Sums())
            its.decoder += (made - wanted).double().square().sum().item()
            its.decoder_spread += _spread(wanted)
            its.encoder += (encoded - moved).double().square().sum().item()
            its.encoder_spread += _spread(moved)
            its.psnr += psnr(target, made).double().sum().item()
            its.crops += len(images)
    transformations = [_told(scale, turns, its) for (scale, turns), its in sums.items()]
    return {
        "crops": measured,
        "transformations": transformations,
        **{key: _mean(told[key] for told in transformations) for key in ("decoder_error", "encoder_error")},
        "spectrum": {name: {"octaves": s.octaves(), "radial": s.radial()} for name, s in spectra.items()} if measured else None,
    }


def _possible(side: int) -> list[tuple[float, int]]:
    """Those of `TRANSFORMATIONS` that differ for latents of this side and leave two sites or more a side."""
    seen: dict[tuple[int, int], tuple[float, int]] = {}
    for scale, turns in TRANSFORMATIONS:
        to = round(scale * side)
        if to >= min(2, side) and (to, turns) != (side, 0):
            seen.setdefault((to, turns), (scale, turns))
    return list(seen.values())


def _spread(maps: Tensor) -> float:
    """Sum of squares around the mean of each map's channel."""
    return (maps - maps.mean((2, 3), keepdim=True)).double().square().sum().item()


def _told(scale: float, turns: int, its: _Sums) -> dict[str, Any]:
    return {
        "scale": scale,
        "degrees": 90 * turns,
        "decoder_error": _ratio(its.decoder, its.decoder_spread),
        "encoder_error": _ratio(its.encoder, its.encoder_spread),
        "psnr_db": its.psnr / its.crops if math.isfinite(its.psnr) else None,
    }


def _ratio(squares: float, spread: float) -> float | None:
    """Root of the ratio; None where nothing varies, or a network makes values that are not finite."""
    found = math.sqrt(squares / spread) if spread > 0 and math.isfinite(squares) else math.nan
    return found if math.isfinite(found) else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
