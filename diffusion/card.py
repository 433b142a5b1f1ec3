"""The model card of an exported pipeline: what it is, how to sample it, where it comes from."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.config import TrainDiffusionConfig
from diffusion.space import LatentSpace

_CLASSES_SHOWN = 20
_NAMES = {
    "loss": "Validation loss (squared error of the velocity a latent value; 2 untrained)",
    "frechet": "Fréchet distance of samples to held-out latents",
    "frechet_floor": "... of training latents (what a perfect model would have)",
    "frechet_untrained": "... of an untrained model's samples",
}


def model_card(config: TrainDiffusionConfig, space: LatentSpace, *, evaluation: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """The card as Markdown with the hub's front matter. Holds no path: provenance names sources by what they call themselves."""
    front = ["---", "library_name: diffusers", "pipeline_tag: unconditional-image-generation", "tags:"]
    front += [f"- {tag}" for tag in ("diffusers", "latent-diffusion", "flow-matching", "dit", "firststage")] + ["---"]
    channels, height, width = space.shape
    kind = f"Class-conditional ({space.classes} classes)" if space.classes else "Unconditional"
    size = f"DiT {config.denoiser.preset}, patch {config.denoiser.patch_size}"
    lines = [
        *front,
        "",
        "# Latent diffusion pipeline",
        "",
        f"{kind} flow-matching model ({size}) on {channels} x {height} x {width} latents of a KL autoencoder. A stock `DiTPipeline`: the "
        "per-channel normalisation of the latents is folded into the autoencoder's 1x1 convolutions, and `scaling_factor` is 1.",
        "",
        "```python",
        "import torch",
        "from diffusers import DiTPipeline",
        "",
        'pipe = DiTPipeline.from_pretrained("PATH_OR_HUB_ID")',
        _call(config, space),
        "```",
        "",
        _scheduler(config),
        "",
    ]
    if space.labels is not None:
        shown = [f"{i}: {name}" for i, name in enumerate(space.labels[:_CLASSES_SHOWN])]
        more = [f"... {space.classes - _CLASSES_SHOWN} more in `model_index.json`"] if space.classes > _CLASSES_SHOWN else []
        lines += ["## Classes", "", ", ".join(shown + more), ""]
    lines += ["## Measured", "", "| | |", "|---|---|"]
    lines += [f"| {_NAMES.get(name, name)} | {metric['mean']:.4g} |" for name, metric in evaluation["metrics"].items()]
    if evaluation.get("frechet_on"):
        lines += ["", f"{evaluation['frechet_on']}"]
    told = json.dumps(provenance, indent=1, ensure_ascii=False)
    for path in (config.latents, config.vae, config.init_from):
        # A note may name a folder: of it, its name alone.
        if path is not None and os.sep in path:
            told = told.replace(path, Path(path).name)
    lines += ["", "## Provenance", "", "```json", told, "```", ""]
    return "\n".join(lines)


def _scheduler(config: TrainDiffusionConfig) -> str:
    euler = "`DiTPipeline` runs Euler schedulers wrongly in silence."
    if config.process.name == "flow":
        return f"Keep the scheduler or another DPM-Solver++ on flow sigmas: {euler}"
    return f"Keep the scheduler or take `DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)`: {euler}"


def _call(config: TrainDiffusionConfig, space: LatentSpace) -> str:
    steps, seed = config.sampling.steps, "generator=torch.manual_seed(0)"
    if not space.classes:
        return f"images = pipe(class_labels=[1000] * 4, guidance_scale=1, num_inference_steps={steps}, {seed}).images"
    labels = [i % space.classes for i in range(4)]
    return f"images = pipe(class_labels={labels}, guidance_scale={config.guidance}, num_inference_steps={steps}, {seed}).images"
