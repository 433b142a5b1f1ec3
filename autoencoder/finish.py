"""The end of a run: calibrate on training crops, export, evaluate what was exported, draw, report."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from autoencoder import artifact
from autoencoder.account import Measure
from autoencoder.adversarial.saved import save_discriminator
from autoencoder.config import TrainAutoencoderConfig
from autoencoder.data.loader import TrainLoader, ValidationSet
from autoencoder.data.pixels import to_images
from autoencoder.data.sources import BadImage
from autoencoder.diagnostics import LatentStatistics
from autoencoder.diffusability import measure_diffusability
from autoencoder.evaluation import evaluate
from autoencoder.experimental.module import Family
from autoencoder.experimental.saved import open_family, save_families
from autoencoder.headroom import measure_headroom
from autoencoder.layout import to_stock_layout
from autoencoder.likelihood import LIKELIHOODS, Likelihood
from autoencoder.missing import filled
from autoencoder.model import LOGVAR_RANGE, Autoencoder, AutoencoderKL, decode, encode, narrow
from autoencoder.objective_summary import Measured, describe_objective
from autoencoder.pixel_recipe import PixelRecipe
from autoencoder.posterior import DiagonalGaussian
from autoencoder.pretrained import load
from autoencoder.preview import Preview
from autoencoder.probing import sample_errors
from autoencoder.provenance import provenance
from autoencoder.reconstruction import Whole, reconstruct, save_picture
from autoencoder.report.page import write_report
from autoencoder.runtime.files import replace_text
from autoencoder.task import AutoencoderTask

CALIBRATION_IMAGES = 2048
"""Training crops on which the exported weights' likelihood scale and latent scale are measured."""
PHOTOS = 3
"""Whole held-out images that are drawn."""
TILE = 1024
"""Side of the tiles that larger ones go through in."""


@torch.no_grad()
def calibrate(task: AutoencoderTask, module: Autoencoder) -> tuple[Likelihood, float, float]:
    """The likelihood at its scale for `module`, and the mean and standard deviation of its latents, on training crops."""
    config = task.config
    most = min(CALIBRATION_IMAGES, task.total_images)
    share = config.train.microbatch or config.train.batch_size
    crops = TrainLoader(
        task.train_source, config.data, seed=config.train.seed, batch_size=share, microbatch=None, images=most,
        latent_shape=task.latent_shape, first_step=0, rank=0, world=1, pin_memory=False,
    )  # fmt: skip
    device = task.accelerator.device
    likelihood, family = task.likelihood(module), module.family()
    statistics = LatentStatistics()
    moments: list[torch.Tensor] = []
    shares: list[torch.Tensor] = []
    for _, batches in crops:
        for batch in batches:
            batch = batch.to(device)
            images = to_images(batch.pixels, task.recipe, batch.valid)
            posterior = encode(module.vae, images)
            latents = posterior.sample(batch.noise)
            if family is not None:
                latents = family.sample(posterior, batch.noise)[0]
                # Nothing but its samples tells where a flow posterior lies: each is taken for a posterior of no width.
                posterior = DiagonalGaussian(latents, torch.full_like(latents, LOGVAR_RANGE[0]))
            statistics.add(posterior, batch.weight)
            error = images - filled(decode(module.vae, latents), images, batch.valid)
            moments.append(likelihood.moment(error).double().cpu())
            if batch.valid is not None:
                shares.append(batch.valid.flatten(1).double().mean(1).cpu())
    chosen = config.objective.likelihood
    if chosen.scale == "analytic":
        moment = torch.cat(moments).mean()
        # A missing value has no error, and is none of those that the moment is a mean over.
        moment = moment / torch.cat(shares).mean() if shares else moment
        best = LIKELIHOODS[chosen.name].scale_from_moment(moment)
        likelihood = task.objective.likelihood(best.clamp(*chosen.bounds))
    return likelihood, *statistics.sample_mean_and_std()


def finish(
    task: AutoencoderTask,
    module: Autoencoder,
    config: TrainAutoencoderConfig,
    *,
    pixels: dict[str, Any] | None = None,
    chosen: dict[str, Any] | None = None,
) -> None:
    """Write `vae/`, the discriminator where one has trained, `evaluation.json`, pictures and `report.html`; every process calls it.

    `pixels` is the recipe of a frozen encoder, whose latents keep the scale that they have; `chosen` what `evaluation.json` says of how
    `module` was chosen among moving averages.
    """
    to_stock_layout(module.vae)
    folder = Path(config.out)
    main = task.accelerator.is_main_process
    recipe = artifact.preprocessing(config.data, task.levels) | ({} if pixels is None else {"pixels": pixels})
    if main:
        calibrated, latent_mean, latent_std = calibrate(task, module)
        vae = module.vae
        audited = measure_headroom(narrow(vae), _crops(task), task.recipe, task.accelerator.device)
        vae.register_to_config(force_upcast=audited.force_upcast)
        if pixels is None:
            # Networks without a shift (all but FLUX's kind) keep none: most pipelines apply the factor alone.
            shift = None if vae.config["shift_factor"] is None else latent_mean
            # Per-channel statistics, which few networks have, would take precedence, and are of the encoder as it was.
            vae.register_to_config(scaling_factor=1 / latent_std, shift_factor=shift, latents_mean=None, latents_std=None)
        beside = folder / ".vae.partial"
        shutil.rmtree(beside, ignore_errors=True)
        artifact.save_autoencoder(vae, beside, preprocessing=recipe, likelihood=calibrated)
        if module.experimental is not None and config.experimental.parts:
            save_families(module.experimental, beside)
        shutil.rmtree(folder / "vae", ignore_errors=True)
        beside.rename(folder / "vae")
        if task.game is not None and task.game.start.begun(task.total_images - 1):
            save_discriminator(task.game.player.network, folder)
    task.accelerator.wait_for_everyone()

    vae = load(str(folder))
    artifact.attach_scales(vae, folder / "vae")
    device = task.accelerator.device
    family = open_family(vae, folder / "vae", device)
    likelihood = artifact.load_likelihood(folder / "vae")
    measured = evaluate(vae, task.validation_batches(), device=device, recipe=task.recipe, likelihood=likelihood, family=family)
    if not main:
        return
    mode = DiagonalGaussian.mode if family is None else family.mode
    kept = PixelRecipe.from_json(recipe["pixels"])
    told = provenance(vae, recipe=task.recipe, encoder=kept, data=task.validation_source, config=config.data, seed=config.train.seed)
    found = {
        "measure": None if likelihood is None else Measure.of(likelihood, config.data.channels * config.data.resolution**2).to_json(),
        "alarms": [asdict(alarm) for alarm in task.monitor.restated(measured.scalars())],
        "objective": _objective(task, vae, family),
        "headroom": audited.report(),
        "diffusability": measure_diffusability(vae, _crops(task), task.recipe, device, mode),
        **(chosen or {}),
    }
    replace_text(folder / "evaluation.json", json.dumps({**measured.report(), **found, "provenance": told}, indent=1))
    for index in range(min(PHOTOS, len(task.validation_source))):
        try:
            record = task.validation_source.read(index)
        except BadImage:
            continue
        name = Path(record.id).with_suffix("").as_posix().replace("/", "-")
        whole = Whole.of(record.pixels, record.valid, task.recipe, device)
        reconstruction = reconstruct(vae, whole.images, tile=TILE, mode=mode)
        save_picture(whole, reconstruction, folder / "images" / f"photo-{name}.png", preview=Preview.of(config.data))
    write_report([folder], folder / "report.html")


def _objective(task: AutoencoderTask, vae: AutoencoderKL, family: Family | None) -> dict[str, Any]:
    """What was optimised, at the errors of held-out images and at the KL weight where the run ended."""
    objective, data = task.config.objective, task.config.data
    absolute, squared = sample_errors(vae, _crops(task), task.recipe, family, task.accelerator.device)
    control = task.kl.scalars(task.total_images)
    measured = Measured(
        mean_absolute_error=absolute,
        mean_squared_error=squared,
        channels=data.channels,
        resolution=data.resolution,
        latent_shape=task.latent_shape,
        kl_weight=control["kl_weight"],
        reached=control.get("running_kl_nats", control.get("running_rmse")),
        discriminator_from=None if task.game is None else task.game.start.at,
    )
    return describe_objective(objective, measured, task.config.experimental)


def _crops(task: AutoencoderTask) -> ValidationSet:
    """All validation crops, for what is measured on a few of them."""
    config = task.config
    return ValidationSet(task.validation_source, config.data, seed=config.train.seed, batch_size=1, latent_shape=task.latent_shape)
