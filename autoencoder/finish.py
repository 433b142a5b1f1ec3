"""The end of a run: calibrate on training crops, export, evaluate what was exported, draw, report."""

import json
import shutil
from pathlib import Path

import torch

from autoencoder import artifact
from autoencoder.config import TrainAutoencoderConfig
from autoencoder.data.loader import TrainLoader
from autoencoder.data.pixels import to_images
from autoencoder.data.sources import BadImage
from autoencoder.diagnostics import LatentStatistics
from autoencoder.evaluation import evaluate
from autoencoder.likelihood import Likelihood
from autoencoder.model import Autoencoder, decode, encode, load
from autoencoder.provenance import provenance
from autoencoder.reconstruction import save_reconstruction
from autoencoder.report.page import write_report
from autoencoder.runtime.files import replace_text
from autoencoder.task import AutoencoderTask

CALIBRATION_IMAGES = 2048
"""Training crops on which the exported weights' likelihood scale and latent scale are measured."""
PHOTOS = 3
"""Whole held-out images that are drawn."""


@torch.no_grad()
def calibrate(task: AutoencoderTask, module: Autoencoder) -> tuple[Likelihood, float, float]:
    """The likelihood at its scale for `module`, and the mean and standard deviation of its latents, on training crops."""
    config = task.config
    images = min(CALIBRATION_IMAGES, task.total_images)
    share = config.train.microbatch or config.train.batch_size
    crops = TrainLoader(
        task.train_source, config.data, seed=config.train.seed, batch_size=share, microbatch=None, images=images,
        latent_shape=task.latent_shape, first_step=0, rank=0, world=1, pin_memory=False,
    )  # fmt: skip
    device = task.accelerator.device
    likelihood = task.likelihood(module)
    statistics = LatentStatistics()
    moments: list[torch.Tensor] = []
    for _, batches in crops:
        for batch in batches:
            batch = batch.to(device)
            pixels = to_images(batch.pixels)
            posterior = encode(module.vae, pixels)
            statistics.add(posterior, batch.weight)
            moments.append(likelihood.moment(pixels - decode(module.vae, posterior.sample(batch.noise))).double().cpu())
    if config.objective.likelihood.scale == "analytic":
        likelihood = task.objective.likelihood(float(likelihood.scale_from_moment(torch.cat(moments).mean())))
    return likelihood, *statistics.sample_mean_and_std()


def finish(task: AutoencoderTask, module: Autoencoder, config: TrainAutoencoderConfig) -> None:
    """Write `vae/`, `evaluation.json`, pictures and `report.html`; every process calls it."""
    folder = Path(config.out)
    main = task.accelerator.is_main_process
    recipe = artifact.preprocessing(config.data, task.levels)
    if main:
        likelihood, latent_mean, latent_std = calibrate(task, module)
        vae = module.vae
        # Networks without a shift (all but FLUX's kind) keep none: most pipelines apply the factor alone.
        shift = {} if vae.config["shift_factor"] is None else {"shift_factor": latent_mean}
        vae.register_to_config(scaling_factor=1 / latent_std, **shift)
        beside = folder / ".vae.partial"
        shutil.rmtree(beside, ignore_errors=True)
        artifact.save_autoencoder(vae, beside, preprocessing=recipe, likelihood=likelihood)
        shutil.rmtree(folder / "vae", ignore_errors=True)
        beside.rename(folder / "vae")
    task.accelerator.wait_for_everyone()

    vae = load(str(folder))
    measured = evaluate(vae, task.validation_batches(), device=task.accelerator.device, likelihood=artifact.load_likelihood(folder / "vae"))
    if not main:
        return
    told = provenance(vae, recipe=recipe, data=task.validation_source, config=config.data, seed=config.train.seed)
    replace_text(folder / "evaluation.json", json.dumps({**measured.report(), "provenance": told}, indent=1))
    for index in range(min(PHOTOS, len(task.validation_source))):
        try:
            record = task.validation_source.read(index)
        except BadImage:
            continue
        name = Path(record.id).with_suffix("").as_posix().replace("/", "-")
        save_reconstruction(vae, record.pixels, folder / "images" / f"photo-{name}.png", device=task.accelerator.device)
    write_report([folder], folder / "report.html")
