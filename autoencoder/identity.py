"""What makes a latent space the one it is: the encoder's weights and the pixel recipe, as a hash."""

import hashlib
import json
from typing import Any

import torch

from autoencoder.model import AutoencoderKL

ENCODER = ("encoder.", "quant_conv.")
DECODER = ("decoder.", "post_quant_conv.")


def encoder_hash(vae: AutoencoderKL, pixel_recipe: dict[str, Any]) -> str:
    """SHA-256 over `encoder`, `quant_conv` and the pixel recipe: equal hashes, interchangeable latents."""
    return _hash(vae, ENCODER, pixel_recipe)


def decoder_hash(vae: AutoencoderKL) -> str:
    """SHA-256 over `decoder` and `post_quant_conv`: noted where it changes, never a reason to refuse latents."""
    return _hash(vae, DECODER, {})


def _hash(vae: AutoencoderKL, prefixes: tuple[str, ...], recipe: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(prefixes):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
