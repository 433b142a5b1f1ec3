"""Training an autoencoder from its configuration to its exported folder and report."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from autoencoder import artifact, model
from autoencoder.config import TrainAutoencoderConfig
from autoencoder.data.sources import open_train_and_validation
from autoencoder.finish import finish
from autoencoder.model import Autoencoder
from autoencoder.objective import effective_beta
from autoencoder.runtime import launch
from autoencoder.runtime.run_folder import RunFolder
from autoencoder.task import AutoencoderTask


def build_module(config: TrainAutoencoderConfig) -> Autoencoder:
    """Network and likelihood scale with their starting values, the same in every process."""
    torch.manual_seed(config.train.seed)
    vae = model.build(config.model, channels=config.data.channels, resolution=config.data.resolution)
    if config.train.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    likelihood = config.objective.likelihood
    module = Autoencoder(vae, torch.tensor(likelihood.value).log() if likelihood.scale == "learned" else None)
    if config.init_from is not None:
        artifact.load_weights(module.vae, config.init_from)
    return module


def train(config: TrainAutoencoderConfig, run: RunFolder | None, *, trainer_options: dict[str, Any] | None = None) -> int:
    """Train, or go on training, in `run` (the main process's; None elsewhere); returns the exit code."""

    def build(accelerator: Accelerator, folder: Path, _starts: bool) -> launch.Stage[Autoencoder]:
        train_source, validation_source = open_train_and_validation(config.data)
        task = AutoencoderTask(config, build_module(config), train_source, validation_source, accelerator, folder)
        introduction = _introduction(config, len(train_source), train_source.name, len(validation_source))
        return launch.Stage(task, introduction, lambda averaged: finish(task, averaged, config))

    return launch.launch(config, run, build, trainer_options=trainer_options)


def _introduction(config: TrainAutoencoderConfig, images: int, source: str, held_out: int) -> str:
    typical = {"mean_absolute_error": 0.05, "mean_squared_error": 0.005}
    beta = effective_beta(config.objective, **typical, scale=config.objective.likelihood.value)
    return (
        f"data: {images:,} training images from {source}, {held_out:,} held out; crops of {config.data.resolution} pixels\n"
        f"objective: convention {config.objective.convention}, effective beta {beta:.3g} "
        "(at a mean absolute error of 0.05 and a mean squared error of 0.005; the log has it at the measured ones)"
    )


def preflight(config: TrainAutoencoderConfig) -> int:
    """Real steps, validation, checkpoint and export in a scratch folder; prints memory and expected hours."""
    return launch.preflight(config, train)
