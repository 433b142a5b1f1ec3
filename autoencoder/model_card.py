"""The model card of an exported autoencoder: what it takes and gives, how stock code runs it, what was measured, where it comes from."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoencoder.artifact import describe, pixels_of
from autoencoder.card import HUB_ID, TAG, Card, hub_dataset, provenance_section, public_name, settings_section, table
from autoencoder.config import TrainAutoencoderConfig
from autoencoder.model import AutoencoderKL, downsampling, narrow
from autoencoder.model_path import is_checkpoint
from autoencoder.network_file import load_network_file
from autoencoder.objective_summary import rows as objective_rows
from autoencoder.pixel_recipe import PixelRecipe
from autoencoder.runtime.averages import described
from autoencoder.runtime.cli import load_config
from autoencoder.runtime.config import count
from autoencoder.runtime.config_file import plain
from autoencoder.runtime.errors import UsageError
from autoencoder.runtime.run_folder import CONFIG
from autoencoder.runtime.versions import versions

_NAMES = {
    "psnr_db": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "kl_nats": "KL to N(0, I)",
    "nll_nats": "NLL",
    "elbo_nats": "ELBO, a lower bound of ln p(x)",
    "bits_per_dim": "Bits/dim, of the ELBO",
}
"""Metrics of an evaluation that a card tells, in this order, by what it calls them."""
_SETTINGS = ("data", "model", "objective", "experimental", "optimizer", "train")


@dataclass(frozen=True)
class Origin:
    """What a run tells of its autoencoder; all None for one that is not a run of ours."""

    config: TrainAutoencoderConfig | None = None
    evaluation: Mapping[str, Any] | None = None
    """Where it is of these weights."""
    base: str | None = None
    """The repository of the hub whose weights it started from."""

    @classmethod
    def of(cls, checkpoint: str, hashes: Mapping[str, Any]) -> "Origin":
        """The run, or the checkpoint's run, that `checkpoint` names; `hashes` are those of its weights.

        Not one of another stage or version, which may hold an autoencoder as well.
        """
        given = Path(checkpoint)
        run = given.parent.parent if is_checkpoint(given) else given
        if not (run / CONFIG).is_file():
            return cls()
        try:
            config = load_config(TrainAutoencoderConfig, run / CONFIG)
        except UsageError as error:
            print(f"what this run tells is left out of the model card: {error}", file=sys.stderr)
            return cls()
        file = run / "evaluation.json"
        evaluation = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        told = {} if evaluation is None else evaluation.get("provenance", {})
        if any(told.get(name) != hashes[name] for name in ("encoder_hash", "decoder_hash")):
            evaluation = None
        kept = load_network_file(run)
        return cls(config, evaluation, None if kept is None else kept.hub)

    @property
    def dataset(self) -> str | None:
        """The data set of the hub that it was trained on, and measured on another split of."""
        if self.config is None or self.evaluation is None:
            return None
        data = self.evaluation["provenance"]["data"]
        name = hub_dataset(data["source"], data["fingerprint"])
        return name if name == self.config.data.source else None


def model_card(vae: AutoencoderKL, preprocessing: Mapping[str, Any] | None, *, checkpoint: str, dtype: str, scale_known: bool) -> Card:
    """The card of `vae` (as it was before a cast to `dtype`), exported from `checkpoint`, under no licence; it holds no path."""
    vae = narrow(vae)
    recipe = pixels_of(vae, None if preprocessing is None else dict(preprocessing))
    hashes = describe(vae, {"pixels": recipe.to_json()})
    origin = Origin.of(checkpoint, hashes)
    base = origin.base or (None if Path(checkpoint).exists() else checkpoint)
    front: dict[str, Any] = {"library_name": "diffusers", "tags": ["diffusers", "autoencoder-kl", "vae", "latent-diffusion", TAG]}
    if base is not None:
        front["base_model"] = base
    if origin.dataset is not None:
        front["datasets"] = [origin.dataset]
        front["model-index"] = [_model_index(origin)]
    sections = {"": _introduction(vae, recipe, dtype, base), "Latents": _latents(vae, hashes, scale_known), "Images": _images(recipe)}
    if origin.evaluation is not None:
        sections["Measured"] = _measured(origin.evaluation, dtype)
        sections["Objective"] = table(objective_rows(origin.evaluation["objective"]))
    if origin.config is not None:
        sections["Training"] = _training(origin.config, origin.evaluation)
    told: dict[str, Any] = dict(origin.evaluation["provenance"]) if origin.evaluation is not None else {**hashes, "versions": versions()}
    if "data" in told:
        told["data"] = {**told["data"], "source": public_name(told["data"]["source"])}
    sections["Provenance"] = provenance_section(told)
    return Card(front, sections)


def _introduction(vae: AutoencoderKL, recipe: PixelRecipe, dtype: str, base: str | None) -> str:
    factor, channels, scale, shift = downsampling(vae), recipe.channels, vae.config["scaling_factor"], vae.config["shift_factor"]
    came = f", from [{base}](https://huggingface.co/{base})" if base else ""
    side = int(vae.config["sample_size"])
    precision = {"fp32": "", "fp16": ", torch_dtype=torch.float16", "bf16": ", torch_dtype=torch.bfloat16"}[dtype]
    made = {"fp32": "", "fp16": ".half()", "bf16": ".bfloat16()"}[dtype]
    normalised = f"latents * {scale:.6g}" if shift is None else f"(latents - {shift:.6g}) * {scale:.6g}"
    return "\n".join(
        [
            "# KL autoencoder",
            "",
            f"Images of {channels} channel{'s' * (channels > 1)} to latents of {vae.config['latent_channels']} channels with sides "
            f"{factor} times smaller, and back{came}. A stock `AutoencoderKL` of diffusers; it needs no other code.",
            "",
            "```python",
            "import torch",
            "from diffusers import AutoencoderKL",
            "",
            f'vae = AutoencoderKL.from_pretrained("{HUB_ID}"{precision})',
            f"images = torch.rand(1, {channels}, {side}, {side}){made} * 2 - 1  # yours, in [-1, 1], sides multiples of {factor}",
            "with torch.no_grad():",
            "    latents = vae.encode(images).latent_dist.sample()",
            "    reconstruction = vae.decode(latents).sample.clamp(-1, 1)",
            f"normalised = {normalised}  # what diffusion models are trained on",
            "```",
        ]
    )


def _latents(vae: AutoencoderKL, hashes: Mapping[str, Any], scale_known: bool) -> str:
    config = vae.config
    scale = f"{config['scaling_factor']:.6g}" if scale_known else "unknown: measure 1 / the latents' standard deviation"
    rows = [("`scaling_factor`", scale)]
    if config["shift_factor"] is not None:
        rows.append(("`shift_factor`, subtracted first", f"{config['shift_factor']:.6g}"))
    upcast = "true: run it in fp32 or bf16" if config["force_upcast"] else "false: fp16 is enough"
    rows += [("`force_upcast`", upcast), ("`encoder_hash`", hashes["encoder_hash"]), ("`decoder_hash`", hashes["decoder_hash"])]
    return table(rows) + "\n\nLatents of models with equal `encoder_hash` (encoder, `quant_conv`, pixel recipe) are interchangeable."


def _images(recipe: PixelRecipe) -> str:
    rows = [("Channels", str(recipe.channels))]
    if recipe.bands is not None:
        rows.append(("Bands of a file, counted from 0", ", ".join(map(str, recipe.bands))))
    if recipe.low is not None and recipe.high is not None:
        ends = (f"{low:g} to {high:g}" for low, high in zip(recipe.low, recipe.high, strict=True))
        rows.append(("Values that become -1 and 1, a band; beyond, they are clipped", ", ".join(ends)))
    else:
        rows.append(("Values that become -1 and 1", f"0 and {recipe.levels - 1}"))
    if recipe.nodata is not None:
        rows.append(("Missing pixels", "the file's own mark" if recipe.nodata == "file" else f"value {recipe.nodata:g}"))
    return table(rows)


def _measured(report: Mapping[str, Any], dtype: str) -> str:
    metrics, told = report["metrics"], report["provenance"]
    rows = []
    for name in (name for name in _NAMES if name in metrics):
        its = metrics[name]
        interval = "" if its["low"] is None else f"{its['low']:.4g} to {its['high']:.4g}"
        rows.append(
            (_NAMES[name], "–" if its["mean"] is None else f"{its['mean']:.4g}", interval, "" if its["unit"] == "1" else its["unit"])
        )
    data, crops, channels = told["data"], told["crops"], report["channels"]
    seen = sum(photo["crops"] for photo in report["photos"])
    lines = [
        table(rows, ("", "mean", told["intervals"], "unit")),
        "",
        f"On {seen:,} crops of {crops['resolution']} pixels of {len(report['photos']):,} held-out images "
        f"({public_name(data['source'])}), in fp32{'' if dtype == 'fp32' else f', before the cast to {dtype}'}. "
        f"Quality: {told['quality']}. Rate: {told['rate']}. {report['active_channels']} of {len(channels)} latent channels active.",
    ]
    return "\n".join(lines)


def _training(config: TrainAutoencoderConfig, evaluation: Mapping[str, Any] | None) -> str:
    settings = {name: value for name, value in plain(config).items() if name in _SETTINGS}
    source, images = config.data.own.class_path or config.data.source, count(config.train.images, "train.images")
    told = (
        f"{images:,} crops of {config.data.resolution} pixels of {public_name(source)} in batches of {config.train.batch_size}, "
        f"by {config.optimizer.name}."
    )
    if evaluation is not None:
        told += f" Weights: {described(config.train, evaluation)}."
    return f"{told}\n\n{settings_section(settings)}"


def _model_index(origin: Origin) -> dict[str, Any]:
    """PSNR, SSIM and bits/dim on the split of the hub's data set that was held out."""
    assert origin.evaluation is not None and origin.dataset is not None
    metrics, data = origin.evaluation["metrics"], origin.evaluation["provenance"]["data"]
    told = [(name, metrics[name]) for name in ("psnr_db", "ssim", "bits_per_dim") if metrics.get(name, {}).get("mean") is not None]
    split = data["source"].removeprefix(f"{origin.dataset} ").strip("()")
    result = {
        "task": {"type": "image-to-image", "name": "Reconstruction"},
        "dataset": {"type": origin.dataset, "name": origin.dataset, "split": split},
        "metrics": [{"type": name.removesuffix("_db"), "name": _NAMES[name], "value": round(its["mean"], 4)} for name, its in told],
    }
    return {"name": "KL autoencoder", "results": [result]}
