"""What makes a latent space the one it is: the encoder's weights and the pixel recipe, as a hash."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from autoencoder.model import AutoencoderKL, stock_state
from autoencoder.runtime.errors import UsageError

ENCODER = ("encoder.", "quant_conv.")
DECODER = ("decoder.", "post_quant_conv.")


@dataclass(frozen=True)
class Identity:
    """Hashes of an autoencoder's two halves."""

    encoder_hash: str
    decoder_hash: str


def identity(vae: AutoencoderKL, pixel_recipe: dict[str, Any]) -> Identity:
    """Both hashes of `vae`."""
    return Identity(encoder_hash(vae, pixel_recipe), decoder_hash(vae))


def check_identity(made_by: Identity, given: Identity, *, key: str, what: str, allow: bool, other: str = "this autoencoder") -> list[str]:
    """Compare the autoencoder that `what` was made by with that of `other`, given under `key`; the notes that a log should have.

    Another encoder means other latents: UsageError with both hashes, unless `allow`. Another decoder reads the same
    latents and is noted.
    """
    if made_by.encoder_hash != given.encoder_hash:
        if not allow:
            raise UsageError(
                f"{key}: latents of another encoder\n  {what}: encoder_hash {made_by.encoder_hash}\n  {other}: encoder_hash "
                f"{given.encoder_hash}\ngive the autoencoder that made them, encode the data set again, or go on all the same with "
                "--allow_vae_mismatch"
            )
        hashes = f"encoder_hash of {what} {made_by.encoder_hash}, of {other} {given.encoder_hash}"
        return [f"warning: latents of another encoder, allowed by allow_vae_mismatch: {hashes}"]
    if made_by.decoder_hash != given.decoder_hash:
        return [f"the decoder has changed: decoder_hash of {what} {made_by.decoder_hash}, of {other} {given.decoder_hash}"]
    return []


def encoder_hash(vae: AutoencoderKL, pixel_recipe: dict[str, Any]) -> str:
    """SHA-256 over `encoder`, `quant_conv` and the pixel recipe: equal hashes, interchangeable latents."""
    return _hash(vae, ENCODER, pixel_recipe)


def decoder_hash(vae: AutoencoderKL) -> str:
    """SHA-256 over `decoder` and `post_quant_conv`, without log scales: noted where it changes, never a reason to refuse latents."""
    return _hash(vae, DECODER, {})


def _hash(vae: AutoencoderKL, prefixes: tuple[str, ...], recipe: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for name, tensor in sorted(stock_state(vae).items()):
        if name.startswith(prefixes):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
