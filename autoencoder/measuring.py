"""From an evaluation's configuration to its report."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoencoder import artifact, comparison
from autoencoder.account import Measure
from autoencoder.alarms import Subject, validation_alarms
from autoencoder.config import DataConfig, TrainAutoencoderConfig
from autoencoder.data.loader import ValidationSet
from autoencoder.data.sources import Source, open_evaluation, open_train_and_validation
from autoencoder.data_config import images_key
from autoencoder.diffusability import measure_diffusability
from autoencoder.evaluate import EvaluateConfig, EvaluateDataConfig
from autoencoder.evaluation import Evaluation, evaluate
from autoencoder.evaluation_file import open_report
from autoencoder.experimental.module import Family
from autoencoder.experimental.saved import open_family
from autoencoder.experimental.vamp_prior import VampPrior
from autoencoder.headroom import measure_headroom
from autoencoder.likelihood import Likelihood, LocationScale, PixelScale, build_likelihood
from autoencoder.lpips_weights import backbone_bands, check_side
from autoencoder.model import AutoencoderKL, downsampling, narrow
from autoencoder.obeying import obeying
from autoencoder.objective_config import PerceptualConfig
from autoencoder.objective_summary import Measured, describe_objective
from autoencoder.perceptual import build_perceptual
from autoencoder.pixel_recipe import PixelRecipe
from autoencoder.posterior import DiagonalGaussian
from autoencoder.pretrained import open_pretrained
from autoencoder.probing import gap_report, sample_errors
from autoencoder.provenance import provenance
from autoencoder.runtime.alarms import Alarm
from autoencoder.runtime.cli import load_config
from autoencoder.runtime.errors import ConfigError, UsageError


@dataclass(frozen=True)
class Opened:
    """What is about to be measured."""

    vae: AutoencoderKL
    """With log scales in its decoder where the likelihood is a `PixelScale`."""
    pixels: PixelRecipe
    encoder_hash: str
    likelihood: Likelihood | None
    family: Family | None
    crops: ValidationSet
    source: Source
    latent_shape: tuple[int, int, int]
    device: torch.device


Report = dict[str, Any]
Section = Callable[[Opened], Callable[[Report], Report]]
"""A part of the report that is not of the autoencoder alone: given what is opened, it refuses or gives what measures, which is called
with the rest of the report."""


def measure(config: EvaluateConfig, sections: Mapping[str, Section] | None = None) -> Report:
    """Measure an autoencoder; the report has metrics with intervals, images, channels, alarms, the objective and provenance.

    Where they are asked for, the gap, diffusability, headroom, the comparison with another evaluation and `sections` are in it, too.

    Raises:
        UsageError: model, data or weights that cannot be used.
    """
    theirs = None if config.compare is None else open_report(config.compare, "compare")
    opened = open_pretrained(config.model, subfolder=config.subfolder, revision=config.revision, variant=config.variant)
    recipe, likelihood = opened.preprocessing, _likelihood(config) or opened.likelihood
    vae = opened.vae if isinstance(likelihood, PixelScale) else narrow(opened.vae)
    run = _run(config.model, needed=config.data.given is None)
    source, data = _images(config, vae, recipe, run)
    lpips = _lpips(config, data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = data.resolution // downsampling(vae)
    latent_shape = (int(vae.config["latent_channels"]), side, side)
    crops = ValidationSet(source, data, seed=config.seed, batch_size=config.batch_size, latent_shape=latent_shape)
    account = None if likelihood is None else Measure.of(likelihood, data.channels * data.resolution**2)
    pixels = artifact.pixels_of(vae, recipe)
    told = {
        "model": config.model,
        "likelihood": None if likelihood is None else likelihood.described(),
        "lpips": config.lpips,
        **provenance(vae, recipe=pixels, data=source, config=data, seed=config.seed),
    }
    if config.gap.samples and likelihood is None:
        raise ConfigError("gap.samples", config.gap.samples, "the gap needs a likelihood; give likelihood.name and likelihood.scale")
    if config.compare is not None and theirs is not None:
        comparison.check(config.compare, theirs, measure=account, provenance=told)

    lpips, family = None if lpips is None else lpips.to(device), open_family(vae, config.model, device, subfolder=config.subfolder)
    if family is not None and isinstance(family.prior, VampPrior) and family.families.resolution != data.resolution:
        raise ConfigError(
            "data.resolution",
            data.resolution,
            f"this model's prior is over the latents of images of {family.families.resolution} pixels; give that",
        )
    subject = Opened(vae, pixels, told["encoder_hash"], likelihood, family, crops, source, latent_shape, device)
    prepared = {name: section(subject) for name, section in (sections or {}).items()}
    measured = evaluate(vae, crops, device=device, recipe=pixels, likelihood=likelihood, lpips=lpips, family=family)
    own = likelihood if config.likelihood.name is None else None
    objective = _objective(run, Path(config.model), family, sample_errors(vae, crops, pixels, family, device), data, latent_shape)
    report = {
        **measured.report(seed=config.seed),
        "measure": None if account is None else account.to_json(),
        "objective": objective,
        "alarms": [dataclasses.asdict(alarm) for alarm in _alarms(run, measured, objective, data, latent_shape, own)],
        "provenance": told,
    }
    if config.gap.samples and likelihood is not None:
        report["gap"] = gap_report(
            vae, crops, config.gap, recipe=pixels, likelihood=likelihood, family=family, device=device, batch_size=config.batch_size,
            seed=config.seed,
        )  # fmt: skip
    if config.diffusability:
        mode = DiagonalGaussian.mode if family is None else family.mode
        report["diffusability"] = measure_diffusability(vae, crops, pixels, device, mode)
    if config.headroom:
        report["headroom"] = measure_headroom(vae, crops, pixels, device).report()
    if config.compare is not None and theirs is not None:
        report["comparison"] = comparison.compare(config.compare, report, theirs)
    return report | {name: section(report) for name, section in prepared.items()}


def _lpips(config: EvaluateConfig, data: DataConfig) -> nn.Module | None:
    """The distance that is asked for, if these crops leave its network features and it knows which channels to see."""
    if config.lpips == "none":
        return None
    check_side(config.lpips, data.resolution, key="data.resolution")
    bands = backbone_bands(config.lpips_bands, data.channels, key="lpips_bands")
    return build_perceptual(PerceptualConfig(name="lpips", net=config.lpips, weights=config.lpips_weights, bands=bands), data.channels)


def _run(model: str, *, needed: bool) -> TrainAutoencoderConfig | None:
    """The configuration of the run that `model` names, if it names one; of another version's run only where it is `needed`."""
    file = Path(model) / "config.yaml"
    if not file.is_file():
        return None
    try:
        return load_config(TrainAutoencoderConfig, file)
    except UsageError as error:
        if needed:
            raise
        print(f"the objective of this run is left out: {error}", file=sys.stderr)
        return None


def _objective(
    run: TrainAutoencoderConfig | None,
    folder: Path,
    family: Family | None,
    errors: tuple[float, float],
    data: DataConfig,
    latent_shape: tuple[int, int, int],
) -> dict[str, Any]:
    """What was optimised, at the errors measured here; without a run, what the ELBO's weights come to."""
    measured = Measured(
        mean_absolute_error=errors[0],
        mean_squared_error=errors[1],
        channels=data.channels,
        resolution=data.resolution,
        latent_shape=latent_shape,
        kl_weight=None if run is None else _last_weight(folder),
    )
    if run is None:
        return describe_objective(None, measured, None if family is None else family.families.config)
    return describe_objective(run.objective, measured, run.experimental)


def _last_weight(run: Path) -> float | None:
    """The KL weight that a run ended with, under a controller say, as its own evaluation has it."""
    file = run / "evaluation.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    weight = found.get("objective", {}).get("kl_weight")
    return None if weight is None else float(weight)


def _alarms(
    run: TrainAutoencoderConfig | None,
    measured: Evaluation,
    objective: dict[str, Any],
    data: DataConfig,
    latent_shape: tuple[int, int, int],
    likelihood: Likelihood | None,
) -> list[Alarm]:
    """What a validation with these figures would raise an alarm about; `likelihood` is the model's own, None where another was given."""
    dims = data.channels * data.resolution**2
    if run is not None:
        subject = dataclasses.replace(Subject.of(run, latent_shape), dims=dims)
    else:
        subject = Subject(images=1, dims=dims, latents=math.prod(latent_shape), channels=latent_shape[0], bounds=None)
    seen = measured.scalars()
    if run is not None and objective["beta"] is not None:
        seen["effective_beta"] = objective["beta"]
    if isinstance(likelihood, LocationScale):
        seen["likelihood_scale"] = float(likelihood.scale)
    return validation_alarms(seen, subject)


def _likelihood(config: EvaluateConfig) -> Likelihood | None:
    """The likelihood that was asked for, if one was."""
    given = config.likelihood
    if given.name is not None and given.scale is not None:
        return build_likelihood(given.name, given.scale, given.levels)
    return None


def _images(
    config: EvaluateConfig, vae: AutoencoderKL, recipe: dict[str, Any] | None, run: TrainAutoencoderConfig | None
) -> tuple[Source, DataConfig]:
    """The images to measure on and the crops of them."""
    pixels, factor = artifact.pixels_of(vae, recipe), downsampling(vae)
    if config.data.given is None:
        if run is None:
            raise ConfigError("data.source", None, "give images to measure on: only a run has validation images of its own")
        data = crops_of(config.data, run.data.source, recipe, pixels)
        data = dataclasses.replace(
            run.data, resolution=data.resolution, resize=data.resize, filter=data.filter, validation_grid=data.validation_grid,
            validation_images=config.data.images or run.data.validation_images, workers=config.data.workers,
        )  # fmt: skip
        source = open_train_and_validation(data)[1]
    else:
        data = crops_of(config.data, config.data.source or "demo", recipe, pixels)
        with obeying(pixels, config.model, key=images_key(config.data.own), given=config.data.given):
            source = open_evaluation(data, split=config.data.split, images=config.data.images)
    if data.resolution % factor:
        raise ConfigError("data.resolution", data.resolution, f"give a multiple of {factor}, the network's downsampling factor")
    return source, data


def crops_of(given: EvaluateDataConfig, source: str, recipe: dict[str, Any] | None, pixels: PixelRecipe) -> DataConfig:
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
            own=given.own,
            **pixels.data_settings(),
            resolution=resolution,
            resize=given.resize or known.get("resize"),
            filter=given.filter or known.get("filter", "lanczos"),
            validation_grid=given.grid or known.get("validation_grid", 1),
            image_column=given.image_column,
            workers=given.workers,
        )
    except ConfigError as error:
        raise error.under("data") from None
