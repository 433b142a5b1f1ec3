"""From an evaluation's configuration to its report."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from autoencoder import artifact
from autoencoder.config import DataConfig, PerceptualConfig, TrainAutoencoderConfig
from autoencoder.data.loader import ValidationSet
from autoencoder.data.sources import Source, open_evaluation, open_train_and_validation
from autoencoder.evaluate import EvaluateConfig, EvaluateDataConfig
from autoencoder.evaluation import evaluate
from autoencoder.likelihood import Likelihood, build_likelihood
from autoencoder.model import AutoencoderKL, downsampling, load
from autoencoder.model_path import folder_of
from autoencoder.perceptual import build_perceptual
from autoencoder.provenance import provenance
from autoencoder.runtime.cli import load_config
from autoencoder.runtime.errors import ConfigError


def measure(config: EvaluateConfig) -> dict[str, Any]:
    """Measure an autoencoder; the report has metrics with intervals, images, channels and provenance.

    Raises:
        UsageError: model, data or weights that cannot be used.
    """
    lpips = (
        build_perceptual(PerceptualConfig(name="lpips", net=config.lpips, weights=config.lpips_weights)) if config.lpips != "none" else None
    )
    vae = load(config.model, subfolder=config.subfolder, revision=config.revision, variant=config.variant)
    folder = folder_of(config.model, config.subfolder)
    recipe = None if folder is None else artifact.load_preprocessing(folder)
    source, data = _images(config, vae, recipe)
    likelihood = _likelihood(config, folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = data.resolution // downsampling(vae)
    latent_shape = (int(vae.config["latent_channels"]), side, side)
    crops = ValidationSet(source, data, seed=config.seed, batch_size=config.batch_size, latent_shape=latent_shape)
    measured = evaluate(vae, crops, device=device, likelihood=likelihood, lpips=None if lpips is None else lpips.to(device))
    pixels = recipe["pixels"] if recipe else artifact.pixel_recipe(data, 256)
    told = {
        "model": config.model,
        "likelihood": None
        if likelihood is None
        else {"name": likelihood.name, "scale": float(likelihood.scale), "levels": likelihood.levels},
        "lpips": config.lpips,
        **provenance(vae, recipe={"pixels": pixels}, data=source, config=data, seed=config.seed),
    }
    return {**measured.report(seed=config.seed), "provenance": told}


def _likelihood(config: EvaluateConfig, folder: Path | None) -> Likelihood | None:
    given = config.likelihood
    if given.name is not None and given.scale is not None:
        return build_likelihood(given.name, given.scale, given.levels)
    return None if folder is None else artifact.load_likelihood(folder)


def _images(config: EvaluateConfig, vae: AutoencoderKL, recipe: dict[str, Any] | None) -> tuple[Source, DataConfig]:
    """The images to measure on and the crops of them."""
    channels, factor = int(vae.config["in_channels"]), downsampling(vae)
    run = Path(config.model) / "config.yaml"
    if config.data.source is None:
        if not run.is_file():
            raise ConfigError("data.source", None, "give images to measure on: only a run has validation images of its own")
        trained = load_config(TrainAutoencoderConfig, run).data
        data = _crops(config.data, trained.source, recipe, channels)
        data = dataclasses.replace(
            trained, resolution=data.resolution, resize=data.resize, filter=data.filter, validation_grid=data.validation_grid,
            validation_images=config.data.images or trained.validation_images, workers=config.data.workers,
        )  # fmt: skip
        source = open_train_and_validation(data)[1]
    else:
        data = _crops(config.data, config.data.source, recipe, channels)
        source = open_evaluation(data, split=config.data.split, images=config.data.images)
    if data.resolution % factor:
        raise ConfigError("data.resolution", data.resolution, f"give a multiple of {factor}, the network's downsampling factor")
    return source, data


def _crops(given: EvaluateDataConfig, source: str, recipe: dict[str, Any] | None, channels: int) -> DataConfig:
    """The crops as given, else as the model's recipe has them."""
    known = {} if recipe is None else recipe["crops"]
    resolution = given.resolution or known.get("resolution")
    if resolution is None:
        raise ConfigError(
            "data.resolution", None, "give the side of the crops in pixels: this model has no preprocessing.json to take it from"
        )
    try:
        return DataConfig(
            source=source,
            channels=channels,
            resolution=resolution,
            resize=given.resize or known.get("resize"),
            filter=given.filter or known.get("filter", "lanczos"),
            validation_grid=given.grid or known.get("validation_grid", 1),
            image_column=given.image_column,
            workers=given.workers,
        )
    except ConfigError as error:
        raise error.under("data") from None
