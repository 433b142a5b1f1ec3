"""What of a network trains, and what a frozen half leaves without a meaning. Torch-free."""

from typing import TYPE_CHECKING

from autoencoder.experimental.config import ExperimentalConfig
from autoencoder.model_config import ModelConfig
from autoencoder.objective_config import ObjectiveConfig
from autoencoder.runtime.errors import ConfigError, require

if TYPE_CHECKING:
    from torch import nn

TRAINED = {"all": ("",), "decoder": ("decoder.",), "encoder": ("encoder.", "quant_conv.")}
"""By `model.train`: prefixes of the names of the network's parameters that train.

Decoders are exchanged under one diffusion model, so that post_quant_conv, where a pipeline folds the latents' normalisation, belongs to
what stays with the latents.
"""


def freeze(vae: "nn.Module", train: str) -> None:
    """Leave a gradient to what `model.train` names. Before optimiser and moving average are built: both leave the rest alone."""
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED[train]))


def check_frozen(model: ModelConfig, init_from: str | None, objective: ObjectiveConfig, experimental: ExperimentalConfig) -> None:
    """Refuse what a frozen half leaves without a meaning; keys are those of `TrainAutoencoderConfig`.

    Raises:
        ConfigError: the first such setting.
    """
    if model.train == "all":
        return
    frozen = f"model.train={model.train}"
    if model.pretrained is None and init_from is None:
        raise ConfigError("model.train", model.train, "a fresh network is random where it is frozen: give model.pretrained or init_from")
    remedy = f"another number takes both halves, {frozen} trains one: leave it out, or give model.train=all, which takes more, not fewer"
    require(model.pretrained is None or model.latent_channels is None, "model.latent_channels", model.latent_channels, remedy)
    if model.train == "decoder":
        _check_frozen_encoder(objective, experimental)
    else:
        scale, remedy = objective.likelihood.scale, "the log scales come out of the decoder, which is frozen: give `analytic` or `learned`"
        require(scale != "pixel", "objective.likelihood.scale", scale, remedy)
        weighting = objective.adversarial.weighting
        remedy = "it compares gradients of the decoder's last convolution, which is frozen: give `fixed`"
        require(not objective.adversarial.on or weighting == "fixed", "objective.adversarial.weighting", weighting, remedy)


def _check_frozen_encoder(objective: ObjectiveConfig, experimental: ExperimentalConfig) -> None:
    kl = objective.kl
    without = "with model.train=decoder the KL has no gradient to act by (it is logged): "
    require(kl.control == "none", "objective.kl.control", kl.control, without + "give `none`")
    require(kl.schedule == "constant", "objective.kl.schedule", kl.schedule, without + "give `constant`")
    require(kl.free_bits == 0, "objective.kl.free_bits", kl.free_bits, without + "give 0")
    remedy = "a flow bends the latents that model.train=decoder keeps: give `gaussian`"
    require(experimental.posterior == "gaussian", "experimental.posterior", experimental.posterior, remedy)
    remedy = "model.train=decoder leaves these steps nothing to move: give 0"
    require(experimental.encoder_steps == 0, "experimental.encoder_steps", experimental.encoder_steps, remedy)
