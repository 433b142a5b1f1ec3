"""What an encoding starts from: network, images, device, and the plan that follows from them."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoencoder import artifact
from autoencoder.config import DataConfig
from autoencoder.data.sources import Source, open_images
from autoencoder.data_config import images_key
from autoencoder.experimental.saved import has_flow_posterior
from autoencoder.identity import identity
from autoencoder.latents.config import EncodeConfig
from autoencoder.latents.folder import VAE
from autoencoder.latents.network import lanes_of
from autoencoder.latents.plan import Plan
from autoencoder.model import AutoencoderKL, downsampling, narrow
from autoencoder.model_path import folder_of
from autoencoder.obeying import obeying
from autoencoder.pretrained import open_pretrained
from autoencoder.runtime.config_file import plain
from autoencoder.runtime.device import choose_precision, describe
from autoencoder.runtime.errors import ConfigError
from autoencoder.runtime.files import partial, put
from autoencoder.runtime.versions import versions


@dataclass(frozen=True)
class Setup:
    """What `set_up` found."""

    vae: AutoencoderKL
    source: Source
    data: DataConfig
    device: torch.device
    plan: Plan
    preprocessing: dict[str, Any]
    likelihood: Path | None
    """The likelihood's file beside the model, if there is one."""

    def keep_model(self, folder: Path) -> None:
        """Write `vae/` into the folder of latents, where it is not there yet: whole or not at all, never folded."""
        kept = folder / VAE
        if kept.is_dir():
            return
        beside = partial(kept)
        shutil.rmtree(beside, ignore_errors=True)
        artifact.save_autoencoder(self.vae, beside, preprocessing=self.preprocessing, likelihood=None)
        if self.likelihood is not None:
            shutil.copyfile(self.likelihood, beside / artifact.LIKELIHOOD)
        put(kept)


def set_up(config: EncodeConfig) -> Setup:
    """Load the model, open the images and plan the rows; UsageError for whatever cannot be used."""
    opened = open_pretrained(config.model, subfolder=config.subfolder, revision=config.revision, variant=config.variant)
    vae, known = narrow(opened.vae), opened.preprocessing
    found = folder_of(config.model, config.subfolder)
    if has_flow_posterior(vae, config.model, config.subfolder):
        remedy = "its posterior is a flow, whose latents are not the encoder's; give an autoencoder with experimental.posterior gaussian"
        raise ConfigError("model", config.model, remedy)
    if not opened.scale_known:
        print(f"model: {config.model} does not tell the scaling factor of its latents; vae/config.json beside these has 1", file=sys.stderr)
    data = _crops(config, vae, known)
    own = config.data.own
    with obeying(artifact.pixels_of(vae, known), config.model, key=images_key(own), given=config.data.given):
        source = open_images(data, split=config.data.split)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(config.precision, device, "precision")
    told: dict[str, Any] = known or artifact.preprocessing(data, 256)
    preprocessing: dict[str, Any] = {key: told[key] for key in ("pixels", "crops", "preview") if key in told}
    if not opened.scale_known:
        preprocessing[artifact.SCALE_UNKNOWN] = True
    hashes = identity(vae, preprocessing["pixels"])
    settings = {key: plain(getattr(data, key)) for key in ("split", "resolution", "resize", "filter", "crop", "zoom")}
    asked = {key: getattr(config.data, key) for key in ("crops", "image_column", "label_column", "columns")}
    side = data.resolution // downsampling(vae)
    threads = lanes_of(vae, device, data.resolution, config.batch_size).threads
    plan = Plan(
        recipe={
            "encoder_hash": hashes.encoder_hash,
            "pixels": preprocessing["pixels"],
            "data": {**settings, **asked},
            **{key: getattr(config, key) for key in ("mirrors", "seed", "moments", "dtype", "batch_size", "shard_rows")},
            "precision": precision,
        },
        source={
            "name": source.name,
            "fingerprint": source.fingerprint,
            "images": len(source),
            **({"own": own.to_json()} if own.given else {}),
        },
        shape=(int(vae.config["latent_channels"]), side, side),
        labels=source.labels,
        decoder_hash=hashes.decoder_hash,
        made_with={**versions(), "device": describe(device, threads)},
    )
    likelihood = None if found is None else found / artifact.LIKELIHOOD
    return Setup(vae, source, data, device, plan, preprocessing, likelihood if likelihood and likelihood.is_file() else None)


def _crops(config: EncodeConfig, vae: AutoencoderKL, known: dict[str, Any] | None) -> DataConfig:
    """The crops as given, else as the model's recipe has them."""
    given, recipe = config.data, known["crops"] if known else {}
    resolution, resize = given.resolution, given.resize
    if resolution is None:
        resolution = recipe.get("resolution")
        resize = given.resize or recipe.get("resize")
    if resolution is None:
        raise ConfigError(
            "data.resolution", None, "give the side of the crops in pixels: this model has no preprocessing.json to take it from"
        )
    factor = downsampling(vae)
    if resolution % factor:
        raise ConfigError("data.resolution", resolution, f"give a multiple of {factor}, the network's downsampling factor")
    try:
        return DataConfig(
            source=given.source or "demo",
            own=given.own,
            split=given.split,
            image_column=given.image_column,
            label_column=given.label_column,
            resolution=resolution,
            **artifact.pixels_of(vae, known).data_settings(),
            resize=resize,
            crop=given.crop,
            zoom=given.zoom,
            flip=False,
            filter=given.filter or recipe.get("filter", "lanczos"),
            workers=given.workers,
            max_bad=given.max_bad,
        )
    except ConfigError as error:
        raise error.under("data") from None
