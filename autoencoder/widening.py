"""More latent or image channels for a pretrained network, which computes what it did before until it has learned to use them.

Legend: C image channels, c latent channels, k more of either. A moment of c latents is laid out as (mean | log-variance), 2c.
"""

import copy

import torch
from torch import Tensor, nn

from autoencoder.model import AutoencoderKL
from autoencoder.runtime.errors import ConfigError


@torch.no_grad()
def widen_latents(vae: AutoencoderKL, channels: int) -> str:
    """Give `vae` this many latent channels; returns what a log should say.

    The old channels keep their means, log-variances and part in the reconstruction. The k others start at the prior: mean 0 and
    log-variance 0 for every image, a KL of 0, and columns of zeros in the decoder's first convolution. Those have a gradient from the
    first step on, as every sample of the prior reaches them; once they have moved, so have the encoder's rows.

    Raises:
        ConfigError: fewer channels than the network has.
    """
    old = int(vae.config["latent_channels"])
    if channels < old:
        remedy = (
            f"the pretrained network has {old} and cannot be narrowed: give null to keep them, more than {old} to widen it, or "
            "model.pretrained=null for a network of fewer from fresh weights"
        )
        raise ConfigError("model.latent_channels", channels, remedy)
    # Where the old moments are among the 2c of the wider network, and the old latents among its c.
    moments, latents = torch.cat((torch.arange(old), channels + torch.arange(old))), torch.arange(old)
    vae.encoder.conv_out = _spread(vae.encoder.conv_out, rows=(moments, 2 * channels))
    # The identity on what is added hands a gradient on to the zeros before and behind it.
    if vae.quant_conv is not None:
        wide = (moments, 2 * channels)
        vae.quant_conv = _spread(vae.quant_conv, rows=wide, columns=wide, identity=True)
    if vae.post_quant_conv is not None:
        wide = (latents, channels)
        vae.post_quant_conv = _spread(vae.post_quant_conv, rows=wide, columns=wide, identity=True)
    vae.decoder.conv_in = _spread(vae.decoder.conv_in, columns=(latents, channels))
    vae.register_to_config(latent_channels=channels, latents_mean=None, latents_std=None)
    return f"widened from {old} to {channels} latent channels; the others start at the prior, unread by the decoder"


@torch.no_grad()
def widen_images(vae: AutoencoderKL, channels: int) -> str:
    """Give `vae` this many image channels, more than it has or one for its three; returns what a log should say.

    More: the encoder reads the others through zeros, so that the latents are what they were; the decoder makes each of them as the mean
    of the old ones. One, grey, for three, RGB: the encoder's first kernel is summed over its channels, so that a grey image has the
    moments that it had as RGB; the decoder makes the mean of what it made.

    Raises:
        ConfigError: other numbers.
    """
    old, made = int(vae.config["in_channels"]), int(vae.config["out_channels"])
    if made != old:
        raise ConfigError("data.channels", channels, f"the pretrained network takes {old} channels and makes {made}: give {old}")
    into, out = vae.encoder.conv_in, vae.decoder.conv_out
    mean = out.weight.mean(0, keepdim=True), _bias(out).mean(0, keepdim=True)
    if channels > old:
        into = _spread(into, columns=(torch.arange(old), channels))
        more = channels - old
        out = _convolution(out, torch.cat((out.weight, mean[0].expand(more, -1, -1, -1))), torch.cat((_bias(out), mean[1].expand(more))))
        note = f"widened from {old} to {channels} image channels; the others start unread, and are made as the mean of the first {old}"
    elif (old, channels) == (3, 1):
        into = _convolution(into, into.weight.sum(1, keepdim=True), _bias(into))
        out = _convolution(out, *mean)
        note = "grey from RGB: the encoder's first kernel is summed over its channels, the decoder makes their mean"
    else:
        remedy = f"the pretrained network takes {old}: give {old} or more{', or 1 (grey)' if old == 3 else ''}"
        raise ConfigError("data.channels", channels, remedy)
    vae.encoder.conv_in, vae.decoder.conv_out = into, out
    vae.register_to_config(in_channels=channels, out_channels=channels)
    return note


Places = tuple[Tensor, int]
"""Where the old rows or columns go, and how many there are then."""


def _spread(conv: nn.Conv2d, *, rows: Places | None = None, columns: Places | None = None, identity: bool = False) -> nn.Conv2d:
    """A larger convolution: the rows (outputs) and columns (inputs) of `conv` in their places, zeros elsewhere.

    `identity`: ones on the diagonal of what is added to a 1x1 convolution.
    """
    to, outs = rows or (torch.arange(conv.out_channels), conv.out_channels)
    of, ins = columns or (torch.arange(conv.in_channels), conv.in_channels)
    weight = conv.weight.new_zeros(outs, ins, *conv.kernel_size)
    bias = conv.weight.new_zeros(outs)
    if identity:
        added = torch.ones(outs, dtype=torch.bool)
        added[to] = False
        weight[added, added] = 1.0
    weight[to[:, None], of[None, :]] = conv.weight
    bias[to] = _bias(conv)
    return _convolution(conv, weight, bias)


def _convolution(like: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """A convolution of these parameters with the stride and padding of another."""
    conv = copy.deepcopy(like)
    conv.out_channels, conv.in_channels = weight.shape[:2]
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
    return conv


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None  # AutoencoderKL has no convolution without
    return conv.bias
