"""Training an autoencoder from its configuration to its exported folder and report."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from autoencoder import artifact, finetuning, layout, model
from autoencoder.adversarial import network
from autoencoder.adversarial import saved as discriminators
from autoencoder.adversarial_config import PLATEAU
from autoencoder.config import TrainAutoencoderConfig
from autoencoder.data.sources import open_train_and_validation
from autoencoder.experimental.module import ExperimentalAutoencoder, Families
from autoencoder.experimental.saved import describe
from autoencoder.finish import finish
from autoencoder.freezing import freeze
from autoencoder.model import Autoencoder, AutoencoderKL
from autoencoder.model_path import folder_of, is_checkpoint
from autoencoder.objective_summary import Measured, describe_objective, lines, resolution_notes
from autoencoder.own_distance import OwnDistance
from autoencoder.perceptual import LPIPSDistance
from autoencoder.runtime import launch
from autoencoder.runtime.cli import load_config
from autoencoder.runtime.config import count
from autoencoder.runtime.run_folder import CONFIG, RunFolder
from autoencoder.task import AutoencoderTask


def build_module(config: TrainAutoencoderConfig, vae: AutoencoderKL | None = None) -> Autoencoder:
    """Network (`vae`, or the preset's with fresh weights) and likelihood scale with their starting values, the same in every process."""
    torch.manual_seed(config.train.seed)
    if vae is None:
        vae = model.build(config.model, channels=config.data.channels, resolution=config.data.resolution)
    if config.train.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    likelihood = config.objective.likelihood
    log_scale = torch.tensor(likelihood.value).log() if likelihood.scale == "learned" else None
    if likelihood.scale == "pixel" and not model.is_widened(vae):
        model.widen(vae, likelihood.value)
    freeze(vae, config.model.train)
    if config.experimental.families:
        families = Families(config.experimental, vae, resolution=config.data.resolution)
        return ExperimentalAutoencoder(vae, log_scale, families)
    return Autoencoder(vae, log_scale)


def lay_out(module: Autoencoder, config: TrainAutoencoderConfig, accelerator: Accelerator) -> None:
    """Have the network's weights lie as it trains quickest; `finish` lays them out as stock code has them."""
    if layout.helps(accelerator.device, accelerator.mixed_precision, compiled=config.train.compile):
        layout.to_channels_last(module.vae)


def train(
    config: TrainAutoencoderConfig,
    run: RunFolder | None,
    *,
    trainer_options: dict[str, Any] | None = None,
    tried_for: TrainAutoencoderConfig | None = None,
) -> int:
    """Train, or go on training, in `run` (the main process's; None elsewhere); returns the exit code.

    `tried_for` is the configuration that the start tells of, where this one is a trial of it.
    """

    def build(accelerator: Accelerator, folder: Path, starts: bool) -> launch.Stage[Autoencoder]:
        train_source, validation_source = open_train_and_validation(config.data)
        origin = finetuning.origin(config, folder, starts=starts)
        module = build_module(config, origin.vae)
        if starts:
            finetuning.take_weights(module, config, origin)
            if accelerator.is_main_process:
                finetuning.record(config, module, origin, folder)
        lay_out(module, config, accelerator)
        task = AutoencoderTask(config, module, train_source, validation_source, accelerator, folder)
        notes: list[str | None] = []
        if starts and config.init_from is not None:
            notes.append(discriminators.start_from(None if task.game is None else task.game.player.network, config.init_from))
        if task.game is not None and config.objective.adversarial.own.given:
            notes.append(network.described(config.objective.adversarial, task.game.player.network))
        if isinstance(task.objective.perceptual, LPIPSDistance | OwnDistance):
            notes.append(task.objective.perceptual.described())
        said = introduction(tried_for or config, task.latent_shape, len(train_source), train_source.name, len(validation_source))
        told = "\n".join([said, *finetuning.describe(config, module.vae, origin), *(note for note in notes if note)])
        return launch.Stage(task, told, lambda module, chosen: finish(task, module, config, pixels=origin.pixels, chosen=chosen))

    return launch.launch(config, run, build, trainer_options=trainer_options)


def introduction(config: TrainAutoencoderConfig, latent_shape: tuple[int, int, int], images: int, source: str, held_out: int) -> str:
    """What a start says of data and objective."""
    # What a fresh run's errors come to; beta depends on them in some conventions.
    measured = Measured(
        mean_absolute_error=0.05,
        mean_squared_error=0.005,
        channels=config.data.channels,
        resolution=config.data.resolution,
        latent_shape=latent_shape,
        assumed=True,
    )
    told = describe_objective(config.objective, measured, config.experimental)
    weights = config.init_from or config.model.pretrained
    trained_at = None if weights is None else _resolution_of(weights)
    if trained_at is not None and trained_at != config.data.resolution:
        told["notes"] = resolution_notes(config.objective, measured, trained_at=trained_at)
    unused = config.objective.adversarial.unused
    return "\n".join(
        [
            f"data: {images:,} training images from {source}, {held_out:,} held out; crops of {config.data.resolution} pixels",
            f"objective: convention {config.objective.convention}",
            *lines(told),
            *([f"objective.adversarial.name is none: {', '.join(unused)} beside it have no effect"] if unused else []),
            *([describe(config.experimental)] if config.experimental.parts else []),
            *_unheard(config),
        ]
    )


def _unheard(config: TrainAutoencoderConfig) -> list[str]:
    """A line where the run ends before its decoder can have heard the discriminator."""
    adversarial, images = config.objective.adversarial, count(config.train.images, "train.images")
    if not adversarial.on or adversarial.heard_from < images:
        return []
    waits = "two windows of plateau_images and warmup_images" if adversarial.start == PLATEAU else "start and warmup_images"
    return [
        f"note: the decoder hears no discriminator in this run: not before {adversarial.heard_from:,} images ({waits} of "
        f"objective.adversarial), and the run ends at {images:,}"
    ]


def _resolution_of(path: str) -> int | None:
    """Side of the crops that the weights at `path` (a run, a checkpoint or a folder) were trained on, where that is on record."""
    if is_checkpoint(path):
        return load_config(TrainAutoencoderConfig, Path(path).parent.parent / CONFIG).data.resolution
    folder = folder_of(path)
    recipe = None if folder is None else artifact.load_preprocessing(folder)
    found = None if recipe is None else recipe.get("crops", {}).get("resolution")
    return None if found is None else int(found)


def preflight(config: TrainAutoencoderConfig) -> int:
    """Real steps, validation, checkpoint and export in a scratch folder; prints memory and expected hours."""
    adversarial, note, trial = config.objective.adversarial, None, config
    if adversarial.on:
        # Both players from the first step on: what memory and hours have to allow for.
        at_once = dataclasses.replace(adversarial, start=0, warmup_images=0, ramp_images=0)
        trial = dataclasses.replace(config, objective=dataclasses.replace(config.objective, adversarial=at_once))
        note = "players      the discriminator trained from the first step on, wherever it begins in the run: memory and hours are of both"
    return launch.preflight(trial, functools.partial(train, tried_for=config), note)
