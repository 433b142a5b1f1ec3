"""Where a figure comes from: everything that another person needs to get it again."""

from typing import Any

import torch

from autoencoder.config import DataConfig
from autoencoder.data.sources import Source
from autoencoder.identity import decoder_hash, encoder_hash
from autoencoder.model import AutoencoderKL
from autoencoder.runtime.versions import versions


def provenance(vae: AutoencoderKL, *, recipe: dict[str, Any], data: Source, config: DataConfig, seed: int) -> dict[str, Any]:
    """How an evaluation was made: weights, data, crops, rounding and versions."""
    return {
        "encoder_hash": encoder_hash(vae, recipe["pixels"]),
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
        "quality": "posterior mode, clamped and rounded to 8 bits, mean over crops of the per-crop value",
        "intervals": "95%, bootstrap over images",
        "seed": seed,
        "precision": str(next(vae.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
