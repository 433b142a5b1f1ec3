"""The per-channel normalisation of latents, folded into an autoencoder's 1x1 convolutions.

Stock pipelines multiply latents by one `scaling_factor` and ignore shifts and per-channel values. Folded, the encoder gives normalised
latents, the decoder takes them, and the factor is 1.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autoencoder.model import AutoencoderKL


def fold(vae: AutoencoderKL, mean: Sequence[float], std: Sequence[float]) -> AutoencoderKL:
    """A copy of `vae` whose latents are (z - mean) / std, per channel, and whose decoder takes these.

    With quant_conv W, b: the rows of the mean become (W, b - mean) / std, the bias of the log-variance falls by 2 ln std.
    With post_quant_conv W, b: W diag(std), b + W mean. Networks without these convolutions get identity ones. What diffusers clamps
    log-variances to moves with the bias: values at -30 or 20 nats are the only ones that differ.
    """
    folded = copy.deepcopy(vae)
    channels = int(vae.config["latent_channels"])
    if folded.quant_conv is None:
        folded.quant_conv = _identity(2 * channels, folded.encoder.conv_out.weight)
    if folded.post_quant_conv is None:
        folded.post_quant_conv = _identity(channels, folded.decoder.conv_in.weight)
    mu, sigma = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    weight, bias = _exact(folded.quant_conv)
    weight[:channels] /= sigma.view(-1, 1, 1, 1)
    bias[:channels] = (bias[:channels] - mu) / sigma
    bias[channels:] -= 2 * sigma.log()
    _set(folded.quant_conv, weight, bias)
    weight, bias = _exact(folded.post_quant_conv)
    bias += weight[:, :, 0, 0] @ mu
    weight *= sigma.view(1, -1, 1, 1)
    _set(folded.post_quant_conv, weight, bias)
    folded.register_to_config(
        scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None, use_quant_conv=True, use_post_quant_conv=True
    )
    return folded


def _identity(channels: int, like: Tensor) -> nn.Conv2d:
    convolution = nn.Conv2d(channels, channels, 1).to(like)
    _set(convolution, torch.eye(channels).view(channels, channels, 1, 1), torch.zeros(channels))
    return convolution


def _exact(convolution: nn.Conv2d) -> tuple[Tensor, Tensor]:
    weight, bias = (value.detach().double().cpu().clone() for value in convolution.parameters())
    return weight, bias


@torch.no_grad()
def _set(convolution: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    for parameter, value in zip(convolution.parameters(), (weight, bias), strict=True):
        parameter.copy_(value)
