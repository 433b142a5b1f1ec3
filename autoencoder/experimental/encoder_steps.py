"""Steps of the encoder alone, against collapse: inference that lags behind the decoder leaves latents unused (He et al. 2019)."""

from torch import nn

from autoencoder.experimental.config import ExperimentalConfig
from autoencoder.runtime.config import count

INFERENCE = ("vae.encoder.", "vae.quant_conv.", "experimental.posterior.")
"""Prefixes of the parameters of q(z|x)."""


def standing(config: ExperimentalConfig, module: nn.Module, *, step: int, images: int) -> list[nn.Parameter]:
    """Parameters that keep their values in `step`, before which `images` images have been seen.

    Of n + 1 steps the first n move q(z|x) alone: the rest has no gradient then, so that neither weights nor optimiser state move.
    """
    if images >= count(config.encoder_steps_images, "encoder_steps_images") or step % (config.encoder_steps + 1) == config.encoder_steps:
        return []
    return [parameter for name, parameter in module.named_parameters() if not name.startswith(INFERENCE)]
