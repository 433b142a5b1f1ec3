"""Training a latent diffusion model from its configuration to its pipeline and report."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file

from autoencoder.identity import Identity, check_identity, identity
from autoencoder.latents.opened import open_latents
from autoencoder.latents.reader import Latents
from autoencoder.model import AutoencoderKL, narrow
from autoencoder.model_path import checkpoint_weights
from autoencoder.pretrained import open_pretrained
from autoencoder.preview import Preview
from autoencoder.runtime import launch
from autoencoder.runtime.config import ANEW, count
from autoencoder.runtime.errors import ConfigError, UsageError, first_line
from autoencoder.runtime.run_folder import RunFolder
from diffusion import data, denoiser, space, times
from diffusion.config import ProcessConfig, TrainDiffusionConfig
from diffusion.denoiser import Denoiser
from diffusion.finish import finish
from diffusion.space import LatentSpace
from diffusion.task import DiffusionTask

PREFLIGHT_SAMPLES = 8
"""Samples that a preflight evaluates: a whole evaluation of an untrained network would take longer than the rest of it."""


def build_module(config: TrainDiffusionConfig, shape: tuple[int, int, int]) -> Denoiser:
    """The network with its starting values, the same in every process."""
    torch.manual_seed(config.train.seed)
    module = denoiser.build(config.denoiser, shape)
    if config.train.gradient_checkpointing:
        module.dit.enable_gradient_checkpointing()
    return module


def train(config: TrainDiffusionConfig, run: RunFolder | None, *, trainer_options: dict[str, Any] | None = None) -> int:
    """Train, or go on training, in `run` (the main process's; None elsewhere); returns the exit code."""

    def build(accelerator: Accelerator, folder: Path, starts: bool) -> launch.Stage[Denoiser]:
        latents = space.of_side(open_latents(config.latents, "latents"), config.data.side)
        rows, held_out = data.hold_out(latents, config.data.validation_rows)
        data.check(latents, len(rows), config)
        now = space.of_latents(latents, conditional=config.conditioning.classes == "auto")
        frozen, notes = (now, []) if starts else _go_on(config, folder, now)
        vae, recipe, found, more = _open_vae(config, frozen)
        module = build_module(config, frozen.shape)
        notes += more
        if starts and config.init_from is not None:
            notes += load_weights(module, config.init_from, frozen, config.process, allow=config.allow_vae_mismatch)
            accelerator.print(f"init_from: {config.init_from} gives weights; {ANEW}")
        introduction = _introduction(config, latents, frozen, len(rows), len(held_out))
        for note in notes:
            accelerator.print(note)
        if starts and accelerator.is_main_process:
            frozen.save(folder)
        training, validation = data.TrainRows(latents, rows, frozen, config), data.ValidationRows(latents, held_out, frozen, config)
        task = DiffusionTask(config, module, frozen, training, validation, vae, accelerator, folder, notes, Preview.from_json(recipe))
        return launch.Stage(task, introduction, lambda module, chosen: finish(task, module, recipe, found, task.notes, chosen))

    return launch.launch(config, run, build, trainer_options=trainer_options)


def _go_on(config: TrainDiffusionConfig, folder: Path, now: LatentSpace) -> tuple[LatentSpace, list[str]]:
    frozen = space.load(folder)
    return frozen, space.agree(frozen, now, allow=config.allow_vae_mismatch)


def _open_vae(config: TrainDiffusionConfig, frozen: LatentSpace) -> tuple[AutoencoderKL, dict[str, Any], Identity, list[str]]:
    """The autoencoder that decodes, its recipe and identity, and notes; UsageError where its encoder is not that of the latents."""
    path, key = (config.vae, "vae") if config.vae is not None else (str(Path(config.latents) / "vae"), "latents")
    opened = open_pretrained(path, key=key)
    vae, recipe = narrow(opened.vae), opened.preprocessing or {"pixels": opened.pixels}
    if int(vae.config["latent_channels"]) != frozen.shape[0]:
        raise ConfigError(key, path, f"it has {vae.config['latent_channels']} latent channels, the latents {frozen.shape[0]}")
    found = identity(vae, recipe["pixels"])
    return vae, recipe, found, check_identity(frozen.identity, found, key=key, what="the latents", allow=config.allow_vae_mismatch)


def load_weights(module: Denoiser, path: str, frozen: LatentSpace, process: ProcessConfig, *, allow: bool) -> list[str]:
    """Weights from another diffusion run, its newest checkpoint, or a checkpoint (the moving average in use where there is one); notes.

    Raises:
        UsageError: nothing there, weights of another shape, of another path or head, or (unless `allow`) of latents of another encoder.
    """
    given = Path(path)
    checkpoints = sorted(marker.parent for marker in given.glob("checkpoints/step-*/complete"))
    checkpoint = checkpoints[-1] if checkpoints else given
    file = checkpoint_weights(checkpoint)
    if file is None:
        raise ConfigError("init_from", path, "no checkpoint in it; give a diffusion run or one of its checkpoints/step-* folders")
    origin = checkpoint.parent.parent
    if not (origin / space.FILE).is_file():
        raise ConfigError("init_from", path, f"no {origin / space.FILE}, so no diffusion run; give one, or one of its checkpoints/step-*")
    other = space.load(origin)
    notes = check_identity(other.identity, frozen.identity, key="init_from", what=path, allow=allow, other="these latents")
    meaning = _meaning(origin, path)
    if meaning != process.meaning:
        remedy = f"its network gives something else ({meaning}) than this run's ({process.meaning}); give the same process.name, "
        raise ConfigError("init_from", path, remedy + "process.prediction and process.schedule, or another run")
    try:
        state, own = load_file(file), module.state_dict()
    except SafetensorError as error:
        raise ConfigError("init_from", path, f"{file} cannot be read ({error}); give another checkpoint") from error
    for name in sorted(own.keys() | state.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else "none" for tensors in (state, own)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"init_from: {path} has {name} of shape {shapes[0]}, this network {shapes[1]}; give weights of the same network"
            )
    module.load_state_dict(state)
    if (other.mean, other.std) != (frozen.mean, frozen.std):
        notes.append(f"init_from: {path} was trained under another normalisation of latents; this run keeps its own")
    return notes


def _meaning(origin: Path, path: str) -> str:
    """What the outputs of a run's network mean; ConfigError where its configuration cannot be read."""
    try:
        told = yaml.safe_load((origin / "config.yaml").read_text(encoding="utf-8"))["process"]
        return ProcessConfig(**{key: told[key] for key in ("name", "prediction", "schedule")}).meaning
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        remedy = f"{origin / 'config.yaml'} does not tell its process ({first_line(error)}); give another run"
        raise ConfigError("init_from", path, remedy) from error


def _introduction(config: TrainDiffusionConfig, latents: Latents, frozen: LatentSpace, rows: int, held_out: int) -> str:
    channels, height, width = frozen.shape
    epochs = count(config.train.images, "train.images") / rows
    classes = f"{frozen.classes} classes" if frozen.classes else "no classes"
    return (
        f"latents: {rows:,} training rows of {channels} x {height} x {width} from {latents.folder}, {held_out:,} held out; {classes}; "
        f"{epochs:.1f} epochs\n"
        f"process: {config.process.meaning}; {times.described(config.process)}"
    )


def preflight(config: TrainDiffusionConfig) -> int:
    """Real steps, validation, checkpoint and export in a scratch folder; prints memory and expected hours."""
    few = dataclasses.replace(config.sampling, evaluate=min(config.sampling.evaluate, PREFLIGHT_SAMPLES))
    return launch.preflight(dataclasses.replace(config, sampling=few), train)
