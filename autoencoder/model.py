"""The network: a diffusers AutoencoderKL, built from a preset or loaded, and the wrapper that trains it."""

import json
from typing import Any

import torch
from torch import Tensor, nn

import autoencoder.runtime.torchvision_operators  # noqa: F401  (before diffusers)
from autoencoder.config import ModelConfig
from autoencoder.model_path import check_model, folder_of
from autoencoder.posterior import DiagonalGaussian
from autoencoder.runtime.errors import UsageError, first_line

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # isort: skip

LOGVAR_RANGE = (-30.0, 20.0)
"""Where diffusers clamps log-variances; we clamp alike, so that stock code sees our posterior."""


def build(config: ModelConfig, *, channels: int, resolution: int) -> AutoencoderKL:
    """A network of the configured shape with fresh weights, or a pretrained one with its own."""
    if config.pretrained is not None:
        return load(config.pretrained, subfolder=config.subfolder, revision=config.revision, variant=config.variant)
    shape: dict[str, Any] = config.shape()
    widths = shape["block_out_channels"]
    plain, attending = len(widths) - shape["attention_levels"], shape["attention_levels"]
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",) * attending,
        up_block_types=("AttnUpDecoderBlock2D",) * attending + ("UpDecoderBlock2D",) * plain,
        block_out_channels=tuple(widths),
        layers_per_block=shape["layers_per_block"],
        latent_channels=shape["latent_channels"],
        norm_num_groups=shape["norm_groups"],
        sample_size=resolution,
        mid_block_add_attention=shape["attention"],
        scaling_factor=1.0,
        use_quant_conv=True,
        use_post_quant_conv=True,
    )


def load(path: str, *, subfolder: str | None = None, revision: str | None = None, variant: str | None = None) -> AutoencoderKL:
    """A diffusers AutoencoderKL in fp32 from a folder, a run (its `vae/`) or a hub id.

    Raises:
        UsageError: nothing there that loads; the message says what was looked for.
    """
    check_model(path, "model", subfolder)
    found = folder_of(path, subfolder)
    if found is not None:
        name = json.loads((found / "config.json").read_text()).get("_class_name")
        if name != "AutoencoderKL":
            raise UsageError(f"{found}: holds a {name}; give an AutoencoderKL")
        path, subfolder = str(found), None
    try:
        return AutoencoderKL.from_pretrained(path, subfolder=subfolder, revision=revision, variant=variant, torch_dtype=torch.float32)
    except Exception as error:  # diffusers, huggingface_hub and safetensors each raise kinds of their own
        raise UsageError(f"{path}: cannot be loaded as an AutoencoderKL: {first_line(error)}") from error


def downsampling(vae: AutoencoderKL) -> int:
    """Pixels a latent's side."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


def decoded_at_once(side: int) -> int:
    """Images of this side to decode together: 8 of 256 pixels, whose widest feature maps then take half a GiB each in fp32."""
    return max(1, 8 * 256**2 // side**2)


def encode(vae: AutoencoderKL, images: Tensor) -> DiagonalGaussian:
    """q(z|x) for images (B, C, H, W) in [-1, 1]; from `quant_conv` on outside autocast and at least fp32."""
    features = vae.encoder(images)
    with torch.autocast(images.device.type, enabled=False):
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        moments = features if vae.quant_conv is None else vae.quant_conv(features)
        mean, logvar = moments.chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(*LOGVAR_RANGE))


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Reconstructions (B, C, H, W), not clamped, at least fp32."""
    with torch.autocast(latents.device.type, enabled=False):
        features = latents if vae.post_quant_conv is None else vae.post_quant_conv(latents)
    decoded: Tensor = vae.decoder(features)
    return decoded.to(torch.promote_types(decoded.dtype, torch.float32))


class Autoencoder(nn.Module):
    """What is prepared, trained and averaged: network and likelihood scale; `forward` is the one way in.

    Everything that trains is reached through `forward`, so that data-parallel wrappers see every gradient.
    """

    def __init__(self, vae: AutoencoderKL, log_scale: Tensor | None = None) -> None:
        super().__init__()
        self.vae = vae
        self.log_scale = None if log_scale is None else nn.Parameter(log_scale)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Images (B, C, H, W) and standard normal noise (B, c, h, w) to (mean, logvar, reconstruction, log scale)."""
        posterior = encode(self.vae, images)
        reconstruction = decode(self.vae, posterior.sample(noise))
        # A view of the parameter: a data-parallel wrapper hooks what leaves forward.
        scale = None if self.log_scale is None else self.log_scale.view_as(self.log_scale)
        return posterior.mean, posterior.logvar, reconstruction, scale
