"""Half-precision weights beside the fp32 ones of a pipeline, under diffusers' names, and what stock code makes of them."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from autoencoder.headroom import ENOUGH, FP16_LARGEST
from autoencoder.runtime.errors import ConfigError, UsageError
from diffusion.config import ProcessConfig
from diffusion.denoiser import NULL_CLASS, Denoiser, DiTTransformer2DModel
from diffusion.pipeline import GATE_STEPS, INDEX, run_stock, sample_as_stock
from diffusion.pipeline_path import FP32
from diffusion.process import BETAS
from diffusion.schedulers import PREDICTIONS, build_scheduler

PARTS = ("transformer", "vae")
WEIGHTS = "diffusion_pytorch_model"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Comparison:
    """Images of a variant beside those of the fp32 weights, from the same noise, by stock code."""

    latents: float
    """Largest difference of the normalised latents."""
    psnr_db: float
    """Of the images, mean over them."""

    def to_json(self) -> dict[str, float]:
        """For `export.json`."""
        return {"largest_difference_of_latents": self.latents, "psnr_db": self.psnr_db}


@dataclass(frozen=True)
class Reference:
    """What the fp32 weights sample."""

    latents: Tensor
    images: Tensor
    layer: str
    """The layer with the largest activation of both networks."""
    largest: float
    """That activation's |value|."""

    @property
    def headroom(self) -> float:
        """By how much it could grow before fp16 overflows."""
        return FP16_LARGEST / max(self.largest, 1e-30)


def request(classes: int) -> dict[str, Any]:
    """What both are asked for: the first and the last class, guided; without classes two images without guidance."""
    labels = [0, classes - 1] if classes else [NULL_CLASS, NULL_CLASS]
    return {"class_labels": labels, "guidance_scale": 2.0 if classes else 1.0, "steps": GATE_STEPS, "seed": 0}


def sample_reference(folder: Path, asked: dict[str, Any]) -> Reference:
    """Samples of the fp32 weights and the largest activation on the way; TrainingError where stock code fails."""
    tensors, told = run_stock(folder, {**asked, "activations": True})
    layer = max(told["activations"], key=lambda name: told["activations"][name])
    _check_finite(tensors, "the fp32 weights")
    return Reference(tensors["latents"], tensors["images"], layer, told["activations"][layer])


def difference_to_own(folder: Path, asked: dict[str, Any], reference: Reference) -> float | None:
    """Largest difference of the fp32 latents to those of our own sampler, the gate of a run's pipeline; None for a scheduler of others."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    told = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    heads: dict[str, Any] = {prediction: head for head, prediction in PREDICTIONS.items()}
    head, schedule, shift = heads.get(told.get("prediction_type")), told.get("beta_schedule"), float(told.get("flow_shift") or 1)
    if head is None or schedule not in (*BETAS, "squaredcos_cap_v2"):
        return None
    process = ProcessConfig(name="flow" if head == "velocity" else "vp", prediction=head, schedule=schedule)
    ours = build_scheduler(process, shift)
    settings = {key: value for key, value in json.loads(ours.to_json_string()).items() if not key.startswith("_")}
    if index["scheduler"][1] != type(ours).__name__ or any(told.get(key) != value for key, value in settings.items()):
        return None
    dit = DiTTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32).eval()
    _, channels, height, width = reference.latents.shape
    latents = sample_as_stock(Denoiser(dit), asked, (channels, height, width), process, shift)
    return float((latents - reference.latents).abs().max())


def check_fp16(reference: Reference) -> None:
    """ConfigError where fp16 is not to be trusted with these networks, as the audit of autoencoders has it.

    `DiTPipeline` runs both networks in one precision and does not read `force_upcast`, so that an autoencoder alone cannot stay in fp32.
    """
    if reference.headroom < ENOUGH:
        raise ConfigError(
            "variants",
            ["fp16"],
            f"{reference.layer} has activations of up to {reference.largest:,.4g} while sampling, and fp16 ends at {FP16_LARGEST:,.0f}: "
            f"{reference.headroom:.3g} times, {ENOUGH:g} times are enough; DiTPipeline cannot keep one network in fp32; give bf16",
        )


def write_variant(folder: Path, name: str) -> None:
    """The weights of both networks in `folder`, cast, as `diffusion_pytorch_model.NAME.safetensors` beside them.

    Raises:
        ConfigError: weights beyond the largest number of that precision.
    """
    for part in PARTS:
        state: dict[str, Tensor] = {}
        for file in sorted((folder / part).iterdir()):
            if FP32.fullmatch(file.name):
                state |= load_file(file)
        cast = {key: value.to(DTYPES[name]) if value.is_floating_point() else value for key, value in state.items()}
        lost = next((key for key, value in cast.items() if value.isfinite().logical_not().any()), None)
        if lost is not None:
            raise ConfigError("variants", [name], f"{name} cannot hold {lost} of the {part}; leave it out, or give bf16")
        (folder / part / f"{WEIGHTS}.{name}.safetensors").write_bytes(save(cast, metadata={"format": "pt"}))


def compare(folder: Path, name: str, asked: dict[str, Any], reference: Reference) -> Comparison:
    """Sample the variant with stock code in a fresh process; TrainingError where that fails, UsageError where images are not finite."""
    tensors, _ = run_stock(folder, {**asked, "precision": name})
    _check_finite(tensors, f"the {name} variant")
    error = (tensors["images"] - reference.images).square().flatten(1).mean(1).double()
    # Images span [0, 1].
    psnr = float((-10 * error.clamp(min=1e-12).log10()).mean())
    return Comparison(float((tensors["latents"] - reference.latents).abs().max()), psnr)


def _check_finite(tensors: dict[str, Tensor], what: str) -> None:
    # Clamping to [0, 1] hides infinities of the decoder; a NaN stays one.
    if not all(math.isfinite(float(value.abs().max())) for value in tensors.values()):
        raise UsageError(f"variants: {what} give images that are not finite; leave that variant out, or give bf16")
