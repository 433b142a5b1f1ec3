"""A run's result as a folder that stock `DiffusionPipeline.from_pretrained` loads, and the gate that it has to pass."""

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from autoencoder.artifact import PREPROCESSING
from autoencoder.identity import Identity
from autoencoder.model import AutoencoderKL, decode
from autoencoder.runtime import torchvision_operators
from autoencoder.runtime.errors import TrainingError
from autoencoder.runtime.files import partial, replace_text
from diffusion import sampling
from diffusion.config import ProcessConfig
from diffusion.denoiser import NULL_CLASS, Denoiser, DiTTransformer2DModel
from diffusion.fold import fold
from diffusion.process import TIMESTEPS, build
from diffusion.schedulers import build_scheduler
from diffusion.space import LatentSpace

from diffusers import DiTPipeline  # isort: skip

INDEX = "model_index.json"
FLOW = ProcessConfig()
GATE_STEPS = 8
GATE_TOLERANCE = 1e-3
"""Largest difference of normalised latents between stock code and ours that passes; it is about 1e-5 where all is well."""


@dataclass(frozen=True)
class Parts:
    """What a pipeline is made of."""

    dit: DiTTransformer2DModel
    vae: AutoencoderKL
    """Not folded."""
    space: LatentSpace
    preprocessing: dict[str, Any]
    """The autoencoder's pixel recipe and crops."""
    identity: Identity
    """Hashes of the unfolded autoencoder."""
    card: str
    """Text of the model card."""
    process: ProcessConfig = FLOW
    """What the network is trained for."""
    time_shift: float = 1.0
    """Of a flow's times when it is sampled."""


def write_pipeline(parts: Parts, folder: Path) -> float:
    """Write the pipeline to `folder`, once stock code in a fresh process has sampled it as we do; returns the largest difference.

    Raises:
        TrainingError: it does not load there, or samples something else; what was written stays beside `folder` to look at.
    """
    beside = partial(folder)
    shutil.rmtree(beside, ignore_errors=True)
    dit, space = copy.deepcopy(parts.dit).float().cpu().eval(), parts.space
    vae = copy.deepcopy(parts.vae).float().cpu().eval()
    folded = fold(vae, space.mean, space.std)
    # diffusers would publish the path that it was loaded from.
    folded.register_to_config(_name_or_path="")
    DiTPipeline(transformer=dit, vae=folded, scheduler=build_scheduler(parts.process, parts.time_shift)).save_pretrained(beside)
    # What diffusers leaves out: the class names.
    index = json.loads((beside / INDEX).read_text())
    if space.labels is not None:
        index["id2label"] = {str(i): name for i, name in enumerate(space.labels)}
        replace_text(beside / INDEX, json.dumps(index, indent=2) + "\n")
    folding = {"mean": space.mean, "std": space.std, "of": asdict(parts.identity)}
    replace_text(beside / "vae" / PREPROCESSING, json.dumps({**parts.preprocessing, "folded": folding}, indent=1))
    replace_text(beside / "README.md", parts.card)
    for file in beside.glob("*/*.safetensors"):
        # safetensors makes files that nobody else may read.
        file.chmod((beside / "README.md").stat().st_mode)
    difference = gate(beside, Denoiser(dit), vae, space, parts.process, parts.time_shift)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    return difference


@torch.no_grad()
def gate(
    folder: Path,
    denoiser: Denoiser,
    vae: AutoencoderKL,
    space: LatentSpace,
    process: ProcessConfig = FLOW,
    time_shift: float = 1.0,
) -> float:
    """Sample the pipeline in a fresh process with stock diffusers alone, and compare with our own Euler on the unfolded autoencoder.

    Returns the largest absolute difference of the normalised latents. Raises TrainingError where stock code fails, or differs in
    latents, images or class table.
    """
    labels = [0, space.classes - 1] if space.classes else [NULL_CLASS, NULL_CLASS]
    request = {"class_labels": labels, "guidance_scale": 2.0 if space.classes else 1.0, "steps": GATE_STEPS, "seed": 0}
    latents, images, table = sample_in_stock(folder, request)
    own = sample_as_stock(denoiser, request, space.shape, process, time_shift)
    own_images = (decode(vae, space.denormalize(own)) / 2 + 0.5).clamp(0, 1)
    difference, pixels = float((latents - own).abs().max()), float((images - own_images).abs().max())
    expected = {name.strip(): i for i, names in enumerate(space.labels or []) for name in names.split(",")}
    if not difference <= GATE_TOLERANCE or not pixels <= 10 * GATE_TOLERANCE or table != expected:
        raise TrainingError(
            f"{folder}: stock diffusers samples something else than we do (latents differ by {difference:.2g}, pixels by {pixels:.2g}, "
            f"classes {len(table)} of {len(expected)}); the pipeline was not put in place"
        )
    return difference


def sample_in_stock(folder: Path, request: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Latents (N, c, h, w), images in [0, 1] (N, C, H, W) and class ids by name, from `stock.py` in a process of its own."""
    tensors, told = run_stock(folder, request)
    return tensors["latents"], tensors["images"], told["labels"]


def run_stock(folder: Path, request: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata from `stock.py` in a process of its own; TrainingError where it fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "samples.safetensors"
        script = Path(__file__).with_name("stock.py")
        operators = torchvision_operators.__file__
        command = [sys.executable, "-P", str(script), operators, str(folder.absolute()), str(out), json.dumps(request)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise TrainingError(f"{folder}: stock diffusers in a process of its own cannot load and sample it: {reason}")
        with safe_open(out, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("latents", "images")}
            return tensors, {name: json.loads(text) for name, text in file.metadata().items()}


@torch.no_grad()
def sample_as_stock(
    denoiser: Denoiser,
    request: dict[str, Any],
    shape: tuple[int, int, int],
    process: ProcessConfig = FLOW,
    time_shift: float = 1.0,
) -> Tensor:
    """The same request by our Euler sampler: stock noise, and the scheduler's own grid, whose timesteps are whole numbers."""
    scheduler, ours = build_scheduler(process, time_shift), build(process)
    scheduler.set_timesteps(request["steps"])
    told = scheduler.timesteps.double() / TIMESTEPS
    # A flow's noise levels lie between the timesteps that its network is told.
    times = scheduler.sigmas[:-1].double() if process.name == "flow" else told
    grid = [sampling.level(ours, t, told=whole) for t, whole in zip(times.tolist(), told.tolist(), strict=True)]
    labels = torch.tensor(request["class_labels"])
    start = torch.randn((len(labels), *shape), generator=torch.Generator().manual_seed(request["seed"]))
    output = sampling.guided(denoiser, labels, request["guidance_scale"])
    return sampling.euler(sampling.estimates(ours, output), start, [*grid, sampling.CLEAN])
