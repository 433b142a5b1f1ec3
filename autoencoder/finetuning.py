"""How a run starts from other weights: network, widening, and what stays with a frozen encoder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoencoder.config import TrainAutoencoderConfig
from autoencoder.experimental.saved import start_from
from autoencoder.identity import encoder_hash
from autoencoder.model import Autoencoder, AutoencoderKL, narrow, stock_config
from autoencoder.model_config import ModelConfig
from autoencoder.network_file import NetworkFile, load_network_file
from autoencoder.obeying import described
from autoencoder.pixel_recipe import PixelRecipe, recipe_of
from autoencoder.pretrained import Pretrained, load_weights, open_pretrained
from autoencoder.runtime.config import ANEW
from autoencoder.runtime.errors import ConfigError, require
from autoencoder.widening import widen_images, widen_latents

LATENTS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""What diffusion models read of the latents in an AutoencoderKL's configuration."""


@dataclass
class Origin:
    """Where a run starts from."""

    vae: AutoencoderKL | None = None
    """The network; None: that of the preset, with fresh weights."""
    pixels: dict[str, Any] | None = None
    """The pixel recipe that stays with a frozen encoder; None where the run's own images set it."""
    notes: list[str] = field(default_factory=list)


def origin(config: TrainAutoencoderConfig, run: Path, *, starts: bool) -> Origin:
    """The network that `config` starts from; for a run that goes on, without its weights, which are in its checkpoint.

    Raises:
        UsageError: nothing there that loads, or no network for these images.
    """
    if not starts:
        kept = load_network_file(run)
        return Origin() if kept is None else Origin(kept.build(), kept.pixels)
    model = config.model
    if model.pretrained is None:
        return Origin()
    source = open_pretrained(
        model.pretrained, subfolder=model.subfolder, revision=model.revision, variant=model.variant, key="model.pretrained"
    )
    channels = int(source.vae.config["in_channels"])
    own_scales = config.objective.likelihood.scale == "pixel" and channels == config.data.channels
    found = Origin(source.vae if own_scales else narrow(source.vae))
    assert found.vae is not None
    if model.preset not in (None, ModelConfig().preset):
        found.notes.append(f"model.preset={model.preset} has no effect: the network is that of {model.pretrained}")
    if config.data.channels != channels:
        remedy = f"model.train={model.train} keeps the network for {channels}: give {channels}, or model.train=all"
        require(model.train == "all", "data.channels", config.data.channels, remedy)
        found.notes.append(widen_images(found.vae, config.data.channels))
    if model.latent_channels not in (None, found.vae.config["latent_channels"]):
        found.notes.append(widen_latents(found.vae, model.latent_channels))
    if model.train == "decoder" and config.init_from is None:
        found.pixels = keep_latents(found.vae, source, model, model.pretrained)
        check_pixels(config, found.pixels, model.pretrained)
    return found


def take_weights(module: Autoencoder, config: TrainAutoencoderConfig, found: Origin) -> None:
    """Give `module` the weights of `init_from`, and with a frozen encoder the latents that go with them."""
    if config.init_from is None:
        return
    found.notes.append(f"init_from: {config.init_from} gives weights; {ANEW}")
    notes = load_weights(module.vae, config.init_from), start_from(module, config.init_from)
    found.notes += [note for note in notes if note]
    if config.model.train == "decoder":
        found.pixels = keep_latents(module.vae, open_pretrained(config.init_from, key="init_from"), config.model, config.init_from)
        check_pixels(config, found.pixels, config.init_from)


def check_pixels(config: TrainAutoencoderConfig, pixels: dict[str, Any], path: str) -> None:
    """ConfigError where the images are not turned into what the frozen encoder at `path` takes."""
    kept, asked = PixelRecipe.from_json(pixels), recipe_of(config.data).data_settings()
    for name, value in kept.data_settings().items():
        remedy = f"with model.train=decoder the encoder of {path} stays, and that takes {described(kept)}: give {value}"
        require(asked[name] == value, f"data.{name}", asked[name], remedy)


def keep_latents(vae: AutoencoderKL, source: Pretrained, config: ModelConfig, path: str) -> dict[str, Any]:
    """Give `vae` all that diffusion models read of the latents of `source`, whose encoder it has; returns the pixel recipe.

    Raises:
        ConfigError: a scaling factor that nobody tells, or that two tell.
    """
    given = config.scaling_factor
    if source.scale_known:
        own = source.vae.config["scaling_factor"]
        require(given is None, "model.scaling_factor", given, f"{path} tells its own, {own:g}: leave it out")
        vae.register_to_config(**{key: source.vae.config[key] for key in LATENTS})
    elif given is None:
        raise ConfigError(
            "model.scaling_factor",
            None,
            f"with model.train=decoder it stays, and {path} does not tell it: give what its diffusion models use (0.18215 for Stable "
            "Diffusion 1 and 2, 0.13025 for SDXL, 0.3611 with model.shift_factor=0.1159 for FLUX), or 1 where there are none",
        )
    else:
        vae.register_to_config(scaling_factor=given, shift_factor=config.shift_factor, latents_mean=None, latents_std=None)
    return source.pixels


def record(config: TrainAutoencoderConfig, module: Autoencoder, found: Origin, run: Path) -> None:
    """Keep what a start from other weights has found in the run's folder."""
    source = config.init_from or config.model.pretrained
    if source is not None:
        NetworkFile(stock_config(module.vae), found.pixels, None if Path(source).exists() else source).save(run)


def describe(config: TrainAutoencoderConfig, vae: AutoencoderKL, found: Origin) -> list[str]:
    """What a start says of what was found and of what stays."""
    source = config.init_from or config.model.pretrained
    if source is None:
        return []
    told = [f"weights: {source}", *found.notes]
    if found.pixels is not None:
        scale = ", ".join(f"{key} {vae.config[key]}" for key in LATENTS if vae.config[key] is not None)
        told += [
            f"encoder, quant_conv, post_quant_conv and {scale} stay: encoder_hash {encoder_hash(vae, found.pixels)}",
            "the KL has no gradient, as the encoder is frozen: it is logged, and its weight changes nothing",
        ]
    elif config.model.train == "encoder":
        told.append("decoder and post_quant_conv stay; latents made before are of another encoder")
    return told
