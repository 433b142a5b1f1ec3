"""The exported autoencoder: a diffusers folder with its likelihood and its pixel recipe beside it."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from autoencoder.config import DataConfig
from autoencoder.identity import decoder_hash, encoder_hash
from autoencoder.likelihood import Likelihood, LocationScale, PixelScale, build_likelihood
from autoencoder.model import CONV_OUT, AutoencoderKL, add_scale_rows, is_widened, narrow, scale_rows
from autoencoder.pixel_recipe import PixelRecipe, recipe_of
from autoencoder.preview import Preview
from autoencoder.runtime.errors import UsageError

LIKELIHOOD = "likelihood.safetensors"
PREPROCESSING = "preprocessing.json"
SCALE_UNKNOWN = "scaling_factor_unknown"
"""Key in it, true where the scaling factor in `config.json` is not that of the latents: an exported checkpoint's, not yet measured, or that
of a single file that does not tell it. The recipe may be missing beside it."""


def preprocessing(data: DataConfig, levels: int) -> dict[str, Any]:
    """The pixel recipe, the crops that the autoencoder was trained and validated on and, where chosen, how pictures show them."""
    crops = {k: getattr(data, k) for k in ("resolution", "resize", "filter", "validation_grid")}
    shown = Preview.of(data).to_json()
    return {"pixels": recipe_of(data, levels).to_json(), "crops": crops, **({"preview": shown} if shown else {})}


def describe(vae: AutoencoderKL, preprocessing: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the hashes of the weights as they are."""
    return {**preprocessing, "encoder_hash": encoder_hash(vae, preprocessing["pixels"]), "decoder_hash": decoder_hash(vae)}


def save_autoencoder(
    vae: AutoencoderKL, folder: Path, *, preprocessing: dict[str, Any], likelihood: Likelihood | None, dtype: torch.dtype = torch.float32
) -> None:
    """Write a folder that stock `AutoencoderKL.from_pretrained` loads, in `dtype`.

    `preprocessing.json` gets the hashes of the weights as they are before the cast. The log-scale rows of a widened network, which
    stock code has no place for, go into the likelihood's file.
    """
    described = describe(vae, preprocessing)
    if dtype != torch.float32:
        vae = copy.deepcopy(vae).to(dtype)
    save_stock(narrow(vae), folder)
    save_preprocessing(described, folder)
    if likelihood is not None:
        (folder / LIKELIHOOD).write_bytes(_likelihood_file(likelihood, vae))


def _likelihood_file(likelihood: Likelihood, vae: AutoencoderKL) -> bytes:
    told: dict[str, Any] = {"name": likelihood.name, "levels": likelihood.levels or 0}
    if isinstance(likelihood, PixelScale):
        told["bounds"] = likelihood.bounds
        tensors = {name: rows.detach().cpu().contiguous() for name, rows in scale_rows(vae).items()}
    else:
        assert isinstance(likelihood, LocationScale)
        # A chosen scale exactly as it was chosen; null for a fitted one.
        told["fixed"] = likelihood.fixed_scale
        tensors = {"scale": torch.as_tensor(likelihood.scale, dtype=torch.float32).detach().cpu().reshape(-1)}
    # One key: several come out in random order, and equal likelihoods should be equal files.
    return save(tensors, metadata={"likelihood": json.dumps(told)})


def save_stock(vae: AutoencoderKL, folder: Path) -> None:
    """diffusers' own `save_pretrained`, without what it tells of this machine and with files that others may read."""
    vae.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # Where the weights were loaded from: a path of ours.
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in folder.glob("*.safetensors"):
        # safetensors makes files that nobody else may read.
        file.chmod((folder / "config.json").stat().st_mode)


def load_likelihood(folder: Path) -> Likelihood | None:
    """The likelihood saved beside an autoencoder, if there is one; `attach_scales` gives a `PixelScale` its scales."""
    path = folder / LIKELIHOOD
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        # Version 0.1.0's first files have the two values as keys of their own.
        told = json.loads(metadata["likelihood"]) if "likelihood" in metadata else metadata
        levels = int(told["levels"]) or 256
        if "bounds" in told:
            return PixelScale(told["name"], levels, tuple(told["bounds"]))
        scale = file.get_tensor("scale").reshape(())
    chosen = told.get("fixed")
    return build_likelihood(told["name"], chosen if isinstance(chosen, float) else scale, levels)


def attach_scales(vae: AutoencoderKL, folder: Path) -> None:
    """Widen `vae` by the log-scale rows saved beside it, where there are any: what measuring the NLL takes."""
    path = folder / LIKELIHOOD
    if is_widened(vae) or not path.is_file():
        return
    rows = load_file(path)
    if set(rows) == set(CONV_OUT):
        add_scale_rows(vae, rows)


def save_preprocessing(preprocessing: dict[str, Any], folder: Path) -> None:
    """Write what `load_preprocessing` reads."""
    (folder / PREPROCESSING).write_text(json.dumps(preprocessing, indent=1))


def load_preprocessing(folder: Path) -> dict[str, Any] | None:
    """The recipe saved beside an autoencoder, if there is one."""
    path = folder / PREPROCESSING
    return json.loads(path.read_text()) if path.is_file() else None


def pixels_of(vae: AutoencoderKL, preprocessing: dict[str, Any] | None) -> PixelRecipe:
    """The pixel recipe in `preprocessing.json`; without one, 8-bit pixels at full range.

    Raises:
        UsageError: a recipe for other channels than the network takes.
    """
    channels = int(vae.config["in_channels"])
    recipe = PixelRecipe(channels=channels) if preprocessing is None else PixelRecipe.from_json(preprocessing["pixels"])
    if recipe.channels != channels:
        raise UsageError(
            f"{PREPROCESSING} is for images of {recipe.channels} channels, the network beside it takes {channels}; give a model whose "
            "files belong together"
        )
    return recipe
