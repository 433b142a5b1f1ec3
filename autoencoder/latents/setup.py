"""What an encoding starts from: network, images, device, and the plan that follows from them."""

import errno
import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from autoencoder import artifact
from autoencoder.config import DataConfig
from autoencoder.data.sources import Source, open_images
from autoencoder.data_config import images_key
from autoencoder.experimental.saved import has_flow_posterior
from autoencoder.identity import identity
from autoencoder.latents.buckets import Size, sizes_of
from autoencoder.latents.commit import beside, writing
from autoencoder.latents.config import EncodeConfig
from autoencoder.latents.folder import VAE, LatentsFolder
from autoencoder.latents.listing import index_name
from autoencoder.latents.network import lanes_of
from autoencoder.latents.plan import Plan
from autoencoder.latents.worker import Worker
from autoencoder.model import AutoencoderKL, downsampling, narrow
from autoencoder.model_path import folder_of
from autoencoder.obeying import obeying
from autoencoder.pretrained import open_pretrained
from autoencoder.runtime.config_file import plain
from autoencoder.runtime.device import choose_precision, describe
from autoencoder.runtime.errors import ConfigError, UsageError
from autoencoder.runtime.files import put
from autoencoder.runtime.versions import versions


@dataclass(frozen=True)
class Setup:
    """What `set_up` found."""

    model: str
    """As it was given."""
    vae: AutoencoderKL
    source: Source
    data: DataConfig
    device: torch.device
    base: Plan
    """The plan as configured, without images."""
    told: dict[str, Any]
    """The source as a plan's segment tells of it."""
    made_with: dict[str, Any]
    """Versions, device and threads of this process."""
    preprocessing: dict[str, Any]
    likelihood: Path | None
    """The likelihood's file beside the model, if there is one."""

    def keep_model(self, folder: LatentsFolder, plan: Plan) -> None:
        """Write `vae/` into the folder of latents, where it is not there yet: whole or not at all, never folded.

        Raises ConfigError where it is missing and the decoder is not the plan's.
        """
        kept = folder.path / VAE
        if folder.has_model():
            return
        if self.base.decoder_hash != plan.decoder_hash:
            whose = f"this one's decoder is not the plan's (decoder_hash {plan.decoder_hash})"
            raise ConfigError("model", self.model, f"{folder}/{VAE} is missing, and {whose}; give the model that is")
        with writing(kept):
            partial = beside(kept)
            try:
                artifact.save_autoencoder(self.vae, partial, preprocessing=self.preprocessing, likelihood=None)
                if self.likelihood is not None:
                    shutil.copyfile(self.likelihood, partial / artifact.LIKELIHOOD)
                put(kept, partial)
            except SafetensorError as error:
                raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error)) from error
            except OSError:
                # Another worker was first.
                if not kept.is_dir():
                    raise
        folder.place.keep(kept)


def set_up(config: EncodeConfig, worker: Worker, frozen: Plan | None, folder: Path) -> Setup:
    """Load the model and open the images; UsageError for whatever cannot be used. `precision: auto` is that of a
    `frozen` plan, whose indices are in `folder`."""
    opened = open_pretrained(config.model, subfolder=config.subfolder, revision=config.revision, variant=config.variant)
    vae, known = narrow(opened.vae), opened.preprocessing
    found = folder_of(config.model, config.subfolder)
    if has_flow_posterior(vae, config.model, config.subfolder):
        remedy = "its posterior is a flow, whose latents are not the encoder's; give an autoencoder with experimental.posterior gaussian"
        raise ConfigError("model", config.model, remedy)
    if not opened.scale_known:
        print(f"model: {config.model} does not tell the scaling factor of its latents; vae/config.json beside these has 1", file=sys.stderr)
    data, sizes = _crops(config, vae, known)
    own = config.data.own
    with obeying(artifact.pixels_of(vae, known), config.model, key=images_key(own), given=config.data.given):
        by_index = (worker.shared or config.only == "encode") and not config.append
        listed = _opened_by_index(config, data, frozen, folder) if by_index else None
        source = listed or open_images(data, split=config.data.split)
    device = _device(worker)
    asked_precision = frozen.recipe["precision"] if frozen is not None and config.precision == "auto" else config.precision
    precision = choose_precision(asked_precision, device, "precision")
    told: dict[str, Any] = known or artifact.preprocessing(data, 256)
    preprocessing: dict[str, Any] = {key: told[key] for key in ("pixels", "crops", "preview") if key in told}
    if not opened.scale_known:
        preprocessing[artifact.SCALE_UNKNOWN] = True
    hashes = identity(vae, preprocessing["pixels"])
    settings = {key: plain(getattr(data, key)) for key in ("split", "resolution", "resize", "filter", "crop", "zoom")}
    asked = {key: getattr(config.data, key) for key in ("crops", "image_column", "label_column", "columns")}
    if config.data.covers:
        names = ("resolutions", "buckets", *(("bucket_step", "bucket_ratio") if config.data.buckets == "auto" else ()))
        asked |= {key: getattr(config.data, key) for key in names}
    recipe = {
        "encoder_hash": hashes.encoder_hash,
        "pixels": preprocessing["pixels"],
        "data": {**settings, **asked},
        **{key: getattr(config, key) for key in ("mirrors", "seed", "moments", "dtype", "batch_size", "shard_rows")},
        "precision": precision,
        **({} if sizes is None else {"sizes": sizes}),
    }
    factor, channels = downsampling(vae), int(vae.config["latent_channels"])
    crops = [(data.resolution, data.resolution)] if sizes is None else [size for each in sizes for size in each]
    # As JSON has it, so that it equals itself read again: a tuple comes back as a list.
    base = Plan.of(
        json.loads(json.dumps(recipe)),
        shapes=tuple((channels, height // factor, width // factor) for height, width in crops),
        labels=source.labels,
        decoder_hash=hashes.decoder_hash,
    )
    whose = {"own": own.to_json()} if own.given else {}
    told_source = {"name": source.name, "fingerprint": source.fingerprint, "images": len(source), **whose}
    threads = lanes_of(vae, device, data.resolution, config.batch_size).threads
    made_with = {**versions(), "device": describe(device, threads)}
    likelihood = None if found is None else found / artifact.LIKELIHOOD
    likelihood = likelihood if likelihood and likelihood.is_file() else None
    return Setup(config.model, vae, source, data, device, base, told_source, made_with, preprocessing, likelihood)


def _opened_by_index(config: EncodeConfig, data: DataConfig, frozen: Plan | None, folder: Path) -> Source | None:
    """The images as the plan has listed them, so that not each of many workers looks for millions of files; None where it has not."""
    if frozen is None or config.data.own.given:
        return None
    for number in reversed(range(len(frozen.segments))):
        index = folder / index_name(number)
        if not index.is_file():
            continue
        try:
            source = open_images(data, split=config.data.split, index=index)
        # Of a source of another kind, or made with other settings.
        except UsageError:
            continue
        if source.name == frozen.segments[number].source["name"]:
            return source
    return None


def _device(worker: Worker) -> torch.device:
    """A GPU for each worker of this machine, in turn."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", worker.place % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _crops(config: EncodeConfig, vae: AutoencoderKL, known: dict[str, Any] | None) -> tuple[DataConfig, list[list[Size]] | None]:
    """The crops as given, else as the model's recipe has them; and their sizes, where they are not squares of the one resolution."""
    given, recipe = config.data, known["crops"] if known else {}
    resolution, resize = given.resolution, given.resize
    if resolution is None:
        resolution = recipe.get("resolution")
        resize = given.resize or (None if given.covers else recipe.get("resize"))
    factor = downsampling(vae)
    listed = isinstance(given.buckets, list) or given.resolutions is not None
    sizes = None if resolution is None and not listed else sizes_of(given, resolution or 0, factor)
    if sizes is not None and listed:
        # What the network takes at once depends on the largest crop.
        resolution = math.isqrt(max(height * width for each in sizes for height, width in each) - 1) + 1
    if resolution is None:
        raise ConfigError(
            "data.resolution", None, "give the side of the crops in pixels: this model has no preprocessing.json to take it from"
        )
    if sizes is None and resolution % factor:
        raise ConfigError("data.resolution", resolution, f"give a multiple of {factor}, the network's downsampling factor")
    try:
        data = DataConfig(
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
    return data, sizes
