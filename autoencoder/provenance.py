"""Where a figure comes from: everything that another person needs to get it again."""

from typing import Any

import torch

from autoencoder.config import DataConfig
from autoencoder.data.sources import Source
from autoencoder.identity import decoder_hash, encoder_hash
from autoencoder.model import AutoencoderKL
from autoencoder.pixel_recipe import PixelRecipe
from autoencoder.runtime.versions import versions

QUALITY_8_BIT = "posterior mode, clamped and rounded to 8 bits, mean over crops of the per-crop value"
QUALITY_OF_RANGE = "posterior mode, clamped, not rounded, the peak of each band its high - low, mean over crops of the per-crop value"


def provenance(
    vae: AutoencoderKL, *, recipe: PixelRecipe, data: Source, config: DataConfig, seed: int, encoder: PixelRecipe | None = None
) -> dict[str, Any]:
    """How an evaluation was made: weights, data, crops, rounding and versions. `encoder`: the recipe in its hash, where that is another.

    The recipe is told where figures depend on it: of other images than 8-bit ones at full range, all bands, nothing missing.
    """
    ordinary = PixelRecipe(channels=recipe.channels)
    return {
        "encoder_hash": encoder_hash(vae, (encoder or recipe).to_json()),
        "decoder_hash": decoder_hash(vae),
        "data": {"source": data.name, "fingerprint": data.fingerprint, "images": len(data)},
        "crops": {
            "resolution": config.resolution,
            "resize": config.resize,
            "filter": config.filter,
            "grid": config.validation_grid,
            "position": "centre",
        },
        "rate": "one posterior sample, fixed noise, nats, beta = 1",
        "quality": QUALITY_8_BIT if recipe.eight_bit else QUALITY_OF_RANGE,
        **({} if recipe == ordinary else {"pixels": recipe.to_json()}),
        **({"missing": "left out of likelihood, errors and quality; bits/dim of observed values"} if recipe.may_miss else {}),
        "intervals": "95%, bootstrap over images",
        "seed": seed,
        "precision": str(next(vae.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
