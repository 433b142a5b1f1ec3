"""The prior that a pipeline is, over the latents of one autoencoder: its network, its process, and the normalisation between both."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoencoder.artifact import PREPROCESSING
from autoencoder.data.order import spread
from autoencoder.latents.opened import open_latents
from autoencoder.latents.reader import Latents as StoredLatents
from autoencoder.runtime.cli import load_config
from autoencoder.runtime.errors import ConfigError, UsageError, first_line
from autoencoder.runtime.rng import generator
from diffusion import data, space
from diffusion.config import TrainDiffusionConfig
from diffusion.denoiser import NULL_CLASS, Denoiser, DiTTransformer2DModel
from diffusion.likelihood import Latents
from diffusion.pipeline_path import INDEX, pipeline_folder
from diffusion.process import Process
from diffusion.schedulers import open_scheduler, read_process


@dataclass(frozen=True)
class LearnedPrior:
    """p(z) of a diffusion model, in the units of `normalize`."""

    denoiser: Denoiser
    process: Process
    mean: Tensor
    """Of the autoencoder's latents by channel, (c,)."""
    std: Tensor
    """(c,)."""
    shape: tuple[int, int, int]
    """(c, h, w) of the latents."""
    classes: dict[str, int]
    """The network's classes by name; empty where it has none."""
    encoder_hash: str
    """Of the autoencoder whose latents these are."""

    def normalize(self, moments: Tensor) -> Tensor:
        """Latents as the encoder gives them, (B, c, h, w), to those that the network knows."""
        mean, std = (values.to(moments).view(-1, 1, 1) for values in (self.mean, self.std))
        return (moments - mean) / std

    def labels(self, numbers: Tensor, names: list[str] | None, *, asked: bool) -> Tensor:
        """What the network is told of images with these class numbers (-1: none) in a table of names (None: numbers alone), (N,)."""
        found = (self.classes.get(str(n) if names is None else names[n]) if asked and n >= 0 else None for n in numbers.tolist())
        return torch.tensor([NULL_CLASS if label is None else label for label in found], dtype=torch.int64)


def open_prior(path: str, device: torch.device) -> LearnedPrior:
    """The prior in a run or pipeline folder.

    Raises:
        ConfigError: under `pipeline`: it cannot be read, or is no pipeline of ours: such a one tells whose latents it is over.
    """
    folder = pipeline_folder(path)
    assert folder is not None
    try:
        scheduler = open_scheduler(folder / "scheduler")
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        recipe = json.loads((folder / "vae" / PREPROCESSING).read_text(encoding="utf-8"))
        folded = recipe["folded"]
        classes = {str(name): int(number) for number, name in (index.get("id2label") or {}).items()}
        mean, std = (torch.tensor(folded[key], dtype=torch.float64) for key in ("mean", "std"))
        encoder_hash = str(folded["of"]["encoder_hash"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "it does not tell which autoencoder's latents it is over; give a run of train_diffusion or its pipeline folder"
        raise ConfigError("pipeline", path, f"cannot be measured ({first_line(error)}): {remedy}") from error
    try:
        dit = DiTTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
        denoiser = Denoiser(dit).to(device).eval().requires_grad_(False)
    # Weights that are missing stay without data, which shows where they are moved.
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        remedy = "copy the folder again, or let the run write it again"
        raise ConfigError("pipeline", path, f"its network cannot be loaded ({first_line(error)}); {remedy}") from error
    if dit.config["out_channels"] not in (None, dit.config["in_channels"]):
        raise ConfigError("pipeline", path, "its network predicts a variance, too; give a run of train_diffusion")
    side, (process, _) = int(dit.config["sample_size"]), read_process(scheduler, path)
    return LearnedPrior(denoiser, process, mean, std, (int(dit.config["in_channels"]), side, side), classes, encoder_hash)


def images_of(path: str) -> set[str]:
    """Fingerprints of the images whose latents the run at `path` was trained on; none for a bare pipeline, which does not tell.

    Raises:
        ConfigError: under `pipeline`: what the run tells of itself cannot be read.
    """
    file = Path(path) / "evaluation.json"
    if not file.is_file():
        return set()
    try:
        data = json.loads(file.read_text(encoding="utf-8"))["provenance"]["latents"]["data"]
        return {str(source["fingerprint"]) for source in data}
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "it tells which images the prior has seen; let the run write it again, or give its pipeline folder alone"
        raise ConfigError("pipeline", path, f"{file} cannot be read ({first_line(error)}): {remedy}") from error


def pilot_latents(
    prior: LearnedPrior, path: str, latents: str | None, *, most: int, seed: int, labelled: bool, device: torch.device
) -> tuple[Latents, StoredLatents]:
    """At most `most` normalised draws of rows that the prior was trained on, or of the data set `latents`, and where they are from.

    Raises:
        ConfigError: nothing tells of training rows, or these are of another encoder or shape.
    """
    run = Path(path) / "config.yaml"
    if latents is None and not run.is_file():
        remedy = "a pipeline folder does not tell of its training latents: give them, or others of the same encoder, or give the run"
        raise ConfigError("account.latents", None, remedy)
    config = load_config(TrainDiffusionConfig, run) if latents is None else None
    where = config.latents if config is not None else str(latents)
    try:
        stored = open_latents(where, "account.latents")
    except ConfigError as error:
        if config is None:
            raise
        raise UsageError(f"{error}\nthat is where the run of {path} had its latents; give account.latents") from error
    if stored.manifest["encoder_hash"] != prior.encoder_hash:
        raise UsageError(
            f"account.latents: latents of another encoder\n  {where}: encoder_hash {stored.manifest['encoder_hash']}\n"
            f"  pipeline: encoder_hash {prior.encoder_hash}\ngive latents of the pipeline's"
        )
    if prior.shape not in stored.shapes:
        listed = ", ".join(map(str, stored.shapes))
        raise ConfigError("account.latents", where, f"it has latents of {listed}, the pipeline {prior.shape}; give such ones")
    stored = space.of_side(stored, prior.shape[1])
    trained = np.arange(len(stored)) if config is None else data.hold_out(stored, config.data.validation_rows)[0]
    chosen = trained[spread(len(trained), most)]
    rows = data.gather(stored, chosen)
    noise = np.stack([generator(seed, "pilot rows", int(n)).standard_normal(prior.shape, dtype=np.float32) for n in chosen])
    moments = rows.mean if rows.logvar is None else rows.mean + np.exp(0.5 * rows.logvar) * noise
    labels = prior.labels(torch.from_numpy(rows.label), stored.labels, asked=labelled)
    return Latents(prior.normalize(torch.from_numpy(moments)).to(device), labels.to(device), chosen.tolist()), stored
