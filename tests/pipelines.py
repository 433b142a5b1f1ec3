"""Tiny pipelines whose networks give something."""

import json
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autoencoder.config import ModelConfig
from autoencoder.identity import identity
from autoencoder.model import AutoencoderKL, build
from diffusion import denoiser, pipeline
from diffusion.config import DenoiserConfig, ProcessConfig
from diffusion.pipeline import Parts
from diffusion.space import LatentSpace

CLASSES = ["heron", "cat, tabby", "hubble deep field", "5", "naïve", "zebra"]
"""Six names: one of two words to stock pipelines, one that is a number and not its own, one beyond ASCII."""
RECIPE: dict[str, Any] = {"range": [-1.0, 1.0], "levels": 256}
SIDE = 16
"""Pixels of an image's side; latents have half."""


def parts(
    classes: list[str] | None = CLASSES,
    *,
    channels: int = 3,
    quant_conv: bool = True,
    vae_from: Path | None = None,
    process: ProcessConfig = pipeline.FLOW,
    time_shift: float = 1.0,
) -> Parts:
    """Everything a pipeline is made of, with random weights; `vae_from` saves the autoencoder there and loads it again."""
    torch.manual_seed(0)
    vae = build(
        ModelConfig(preset="tiny", block_out_channels=(8, 16), norm_groups=4, latent_channels=4), channels=channels, resolution=SIDE
    )
    if not quant_conv:
        vae.quant_conv = vae.post_quant_conv = None
        vae.register_to_config(use_quant_conv=False, use_post_quant_conv=False)
    if vae_from is not None:
        vae.save_pretrained(vae_from)
        vae = AutoencoderKL.from_pretrained(vae_from)
    dit = denoiser.stock(denoiser.build(DenoiserConfig(preset="tiny", layers=2, heads=2, head_dim=16), (4, SIDE // 2, SIDE // 2)))
    perturb(dit)
    hashes = identity(vae, RECIPE)
    space = LatentSpace(
        encoder_hash=hashes.encoder_hash,
        decoder_hash=hashes.decoder_hash,
        rows_hash="0" * 64,
        shape=(4, SIDE // 2, SIDE // 2),
        mean=[0.3, -1.2, 0.0, 2.0],
        std=[0.5, 1.0, 1.7, 0.8],
        rows=600,
        labels=classes,
    )
    recipe = {"pixels": {**RECIPE, "channels": channels}, "encoder_hash": hashes.encoder_hash}
    return Parts(dit, vae.eval(), space, recipe, hashes, "# Card\n", process, time_shift)


@torch.no_grad()
def perturb(network: nn.Module, by: float = 0.1) -> None:
    """Move all weights, so that the velocity is not 0 and depends on time and class."""
    for parameter in network.parameters():
        parameter.add_(by * torch.randn_like(parameter))


def write_ungated(made: Parts, folder: Path) -> Path:
    """`write_pipeline` without its process of stock code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "gate", lambda *arguments: 0.0)
        pipeline.write_pipeline(made, folder)
    return folder


def stock_in_this_process(patch: pytest.MonkeyPatch) -> None:
    """Have stock code run here: a fresh process takes seconds."""

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        script, ours = command[2], {name: sys.modules[name] for name in ("autoencoder", "diffusion")}
        try:
            runpy.run_path(script)["main"](*command[3:])
        except Exception:
            return subprocess.CompletedProcess(command, 1, "", traceback.format_exc())
        finally:
            sys.modules.update(ours)
        return subprocess.CompletedProcess(command, 0, "", "")

    patch.setattr(pipeline.subprocess, "run", run)


def edit(file: str, **values: Any) -> Callable[[Path], None]:
    """A change of these entries in a JSON file of a pipeline's folder."""

    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change
