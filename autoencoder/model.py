"""The network: a diffusers AutoencoderKL, and the wrapper that trains it."""

import copy
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import autoencoder.runtime.torchvision_operators  # noqa: F401  (before diffusers)
from autoencoder.equivariance import Transformation, transform
from autoencoder.model_config import ModelConfig
from autoencoder.posterior import DiagonalGaussian
from autoencoder.runtime.errors import require

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # isort: skip

if TYPE_CHECKING:
    from autoencoder.experimental.module import Families, Family

LOGVAR_RANGE = (-30.0, 20.0)
"""Where diffusers clamps log-variances; we clamp alike, so that stock code sees our posterior."""


def build(config: ModelConfig, *, channels: int, resolution: int) -> AutoencoderKL:
    """A network of the preset's shape, with the configuration's changes, and fresh weights."""
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
        features = features.to(torch.promote_types(features.dtype, torch.float32)).contiguous()
        moments = features if vae.quant_conv is None else vae.quant_conv(features)
        mean, logvar = moments.chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(*LOGVAR_RANGE))


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Reconstructions (B, C, H, W), not clamped, at least fp32."""
    return decode_parameters(vae, latents)[:, : vae.config["in_channels"]]


def decode_parameters(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """What p(x|z) takes from the decoder, at least fp32: the reconstruction, then the log scales of a widened network, (B, 2C, H, W)."""
    with torch.autocast(latents.device.type, enabled=False):
        features = latents if vae.post_quant_conv is None else vae.post_quant_conv(latents)
    decoded: Tensor = vae.decoder(features)
    return decoded.to(torch.promote_types(decoded.dtype, torch.float32)).contiguous()


CONV_OUT = ("decoder.conv_out.weight", "decoder.conv_out.bias")


def is_widened(vae: AutoencoderKL) -> bool:
    """Whether the decoder gives a log scale beside each value."""
    return bool(vae.config["out_channels"] == 2 * vae.config["in_channels"])


def widen(vae: AutoencoderKL, value: float) -> None:
    """Give the decoder a log scale beside each of its C values: C more rows of `conv_out` that start at ln `value` everywhere.

    Raises:
        ConfigError: a network whose output has other channels than its input.
    """
    taken, made = vae.config["in_channels"], vae.config["out_channels"]
    remedy = f"the network takes {taken} channels and makes {made}; give one that makes as many"
    require(taken == made, "objective.likelihood.scale", "pixel", remedy)
    weight, bias = (torch.zeros_like(vae.get_parameter(name)) for name in CONV_OUT)
    add_scale_rows(vae, {CONV_OUT[0]: weight, CONV_OUT[1]: bias.fill_(math.log(value))})


def add_scale_rows(vae: AutoencoderKL, rows: dict[str, Tensor]) -> None:
    """Widen `vae` by these rows, as `scale_rows` gives them."""
    state = vae.state_dict()
    _set_conv_out(vae, {name: torch.cat((state[name], rows[name].to(state[name]))) for name in CONV_OUT})


def narrow(vae: AutoencoderKL) -> AutoencoderKL:
    """The network as stock code knows it: `vae` itself, or a copy without the log scales of a widened one."""
    if not is_widened(vae):
        return vae
    stock, state = copy.deepcopy(vae), stock_state(vae)
    _set_conv_out(stock, {name: state[name] for name in CONV_OUT})
    return stock


def stock_state(vae: AutoencoderKL) -> dict[str, Tensor]:
    """The state dict of `narrow(vae)`, without a copy."""
    state: dict[str, Tensor] = vae.state_dict()
    if is_widened(vae):
        state |= {name: state[name][: vae.config["in_channels"]] for name in CONV_OUT}
    return state


def stock_config(vae: AutoencoderKL) -> dict[str, Any]:
    """The configuration of `narrow(vae)`, as `AutoencoderKL(**...)` takes it."""
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    return config | ({"out_channels": config["in_channels"]} if is_widened(vae) else {})


def scale_rows(vae: AutoencoderKL) -> dict[str, Tensor]:
    """The C rows of a widened network's `conv_out` that make the log scales, by name."""
    state = vae.state_dict()
    return {name: state[name][vae.config["in_channels"] :] for name in CONV_OUT}


@torch.no_grad()
def _set_conv_out(vae: AutoencoderKL, state: dict[str, Tensor]) -> None:
    weight, bias = (state[name] for name in CONV_OUT)
    old = vae.decoder.conv_out
    new = nn.utils.skip_init(
        nn.Conv2d, old.in_channels, len(weight), old.kernel_size, padding=old.padding, device=weight.device, dtype=weight.dtype
    )
    new.weight.copy_(weight)
    new.bias.copy_(bias)
    vae.decoder.conv_out = new
    vae.register_to_config(out_channels=len(weight))


class Output(NamedTuple):
    """What the network makes of a batch. Everything that trains is reached through it."""

    mean: Tensor
    """Posterior means (B, c, h, w)."""
    logvar: Tensor
    """Posterior log-variances (B, c, h, w)."""
    decoded: Tensor
    """What the likelihood takes, (B, C or 2C, H, W)."""
    log_scale: Tensor | None
    """The learned log scale of the likelihood, where it is one number."""
    rate: Tensor | None = None
    """log q(z|x) - log p(z) of the sample in nats, (B,), where the KL has no closed form."""
    transformed: Tensor | None = None
    """What the decoder makes of transformed latents, (n, C or 2C, H', W'), where a transformation was asked for."""


class Autoencoder(nn.Module):
    """What is prepared, trained and averaged: network and likelihood scale; `forward` is the one way in.

    Everything that trains is reached through `forward`, so that data-parallel wrappers see every gradient.
    """

    def __init__(self, vae: AutoencoderKL, log_scale: Tensor | None = None) -> None:
        super().__init__()
        self.vae = vae
        self.log_scale = None if log_scale is None else nn.Parameter(log_scale)
        self.experimental: Families | None = None

    def forward(self, images: Tensor, noise: Tensor, transformation: Transformation | None = None) -> Output:
        """Images (B, C, H, W) and standard normal noise (B, c, h, w)."""
        posterior = encode(self.vae, images)
        return self._output(posterior, posterior.sample(noise), transformation)

    @torch.no_grad()
    def family(self) -> "Family | None":
        """Posterior and prior as they stand, to measure with, where they are more than a stock AutoencoderKL has."""
        return self.experimental.bound_to(self.vae) if self.experimental is not None and self.experimental.config.parts else None

    def _output(
        self, posterior: DiagonalGaussian, latents: Tensor, transformation: Transformation | None, rate: Tensor | None = None
    ) -> Output:
        # A view of the parameter: a data-parallel wrapper hooks what leaves forward.
        scale = None if self.log_scale is None else self.log_scale.view_as(self.log_scale)
        transformed = None if transformation is None else decode_parameters(self.vae, transform(latents, transformation))
        return Output(posterior.mean, posterior.logvar, decode_parameters(self.vae, latents), scale, rate, transformed)
