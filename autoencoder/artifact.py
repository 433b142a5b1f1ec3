"""The exported autoencoder: a diffusers folder with its likelihood and its pixel recipe beside it."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from autoencoder.config import DataConfig, TrainAutoencoderConfig
from autoencoder.identity import decoder_hash, encoder_hash
from autoencoder.likelihood import Likelihood, LocationScale, PixelScale, build_likelihood
from autoencoder.model import CONV_OUT, AutoencoderKL, add_scale_rows, build, is_widened, load, narrow, scale_rows, widen
from autoencoder.model_path import folder_of
from autoencoder.pixel_recipe import PixelRecipe, recipe_of
from autoencoder.preview import Preview
from autoencoder.runtime.checkpoint import STATE
from autoencoder.runtime.cli import load_config
from autoencoder.runtime.errors import UsageError
from autoencoder.scale import learned_scale

LIKELIHOOD = "likelihood.safetensors"
PREPROCESSING = "preprocessing.json"


def preprocessing(data: DataConfig, levels: int) -> dict[str, Any]:
    """The pixel recipe, the crops that the autoencoder was trained and validated on and, where chosen, how pictures show them."""
    crops = {k: getattr(data, k) for k in ("resolution", "resize", "filter", "validation_grid")}
    shown = Preview.of(data).to_json()
    return {"pixels": recipe_of(data, levels).to_json(), "crops": crops, **({"preview": shown} if shown else {})}


def save_autoencoder(
    vae: AutoencoderKL, folder: Path, *, preprocessing: dict[str, Any], likelihood: Likelihood | None, dtype: torch.dtype = torch.float32
) -> None:
    """Write a folder that stock `AutoencoderKL.from_pretrained` loads, in `dtype`.

    `preprocessing.json` gets the hashes of the weights as they are before the cast. The log-scale rows of a widened network, which
    stock code has no place for, go into the likelihood's file.
    """
    hashes = {"encoder_hash": encoder_hash(vae, preprocessing["pixels"]), "decoder_hash": decoder_hash(vae)}
    if dtype != torch.float32:
        vae = copy.deepcopy(vae).to(dtype)
    save_stock(narrow(vae), folder)
    (folder / PREPROCESSING).write_text(json.dumps({**preprocessing, **hashes}, indent=1))
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


def load_preprocessing(folder: Path) -> dict[str, Any] | None:
    """The recipe saved beside an autoencoder, if there is one."""
    path = folder / PREPROCESSING
    return json.loads(path.read_text()) if path.is_file() else None


def preprocessing_of(vae: AutoencoderKL, path: str, subfolder: str | None = None) -> dict[str, Any]:
    """What is beside the autoencoder that `path` names; for one that has nothing, 8-bit pixels to [-1, 1]."""
    folder = folder_of(path, subfolder)
    return (None if folder is None else load_preprocessing(folder)) or {"pixels": pixels_of(vae, None).to_json()}


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


def load_weights(vae: AutoencoderKL, path: str) -> str | None:
    """Weights for `vae` from a run, a checkpoint (its moving average where it has one) or a diffusers folder.

    Log scales that one of the two networks lacks keep their starting value, or are dropped; what is returned says which.

    Raises:
        UsageError: nothing there, or weights of another architecture; the message names the first that differs.
    """
    state, note = _weights(path), None
    channels, widened = vae.config["in_channels"], is_widened(vae)
    rows = len(state.get(CONV_OUT[0], ()))
    if widened and rows == channels:
        state |= {name: torch.cat((state[name], fresh.to(state[name]))) for name, fresh in scale_rows(vae).items()}
        note = f"init_from: {path} has no log scales in its decoder; they start at objective.likelihood.value everywhere"
    elif not widened and rows == 2 * channels:
        state |= {name: state[name][:channels] for name in CONV_OUT}
        note = f"init_from: {path} has log scales in its decoder, which this objective does not use; they are dropped"
    own = {k: tuple(v.shape) for k, v in vae.state_dict().items()}
    given = {k: tuple(v.shape) for k, v in state.items()}
    for name in sorted(own.keys() | given.keys()):
        if own.get(name) != given.get(name):
            raise UsageError(
                f"init_from: {path} has {name} of shape {given.get(name, 'none')}, this network {own.get(name, 'none')}; "
                "give weights of the same architecture"
            )
    vae.load_state_dict(state)
    return note


def _weights(path: str) -> dict[str, torch.Tensor]:
    """The network's state in a run, a checkpoint or a diffusers folder, with its log scales where it has any."""
    folder = Path(path)
    found = next((folder / n for n in ("ema.safetensors", "model.safetensors") if (folder / n).is_file()), None)
    if found is not None:
        return {k.removeprefix("vae."): v for k, v in load_file(found).items() if k.startswith("vae.")}
    vae, beside = load(path), folder_of(path)
    if beside is not None:
        attach_scales(vae, beside)
    state: dict[str, torch.Tensor] = vae.state_dict()
    return state


def open_checkpoint(folder: Path) -> tuple[AutoencoderKL, Likelihood | None, dict[str, Any] | None]:
    """Network, likelihood and recipe of a training checkpoint (`RUN/checkpoints/step-*`) or of an exported folder.

    The network is widened where the likelihood is a `PixelScale`.
    """
    if (folder / STATE).is_file():
        return _open_training_checkpoint(folder)
    found, vae = folder_of(str(folder)), load(str(folder))
    if found is None:
        return vae, None, None
    attach_scales(vae, found)
    return vae, load_likelihood(found), load_preprocessing(found)


def _open_training_checkpoint(folder: Path) -> tuple[AutoencoderKL, Likelihood, dict[str, Any]]:
    file = folder.parent.parent / "config.yaml"
    if not file.is_file():
        raise UsageError(f"{folder}: the run's config.yaml is not beside it ({file}); give a checkpoint within its run")
    config = load_config(TrainAutoencoderConfig, file)
    vae = build(config.model, channels=config.data.channels, resolution=config.data.resolution)
    chosen = config.objective.likelihood
    if chosen.scale == "pixel":
        widen(vae, chosen.value)
    load_weights(vae, str(folder))
    recipe = preprocessing(config.data, json.loads((folder / STATE).read_text())["task"]["levels"])
    if chosen.scale == "pixel":
        return vae, PixelScale(chosen.name, chosen.levels, chosen.bounds), recipe
    weights = next(folder / n for n in ("ema.safetensors", "model.safetensors") if (folder / n).is_file())
    log_scale = load_file(weights).get("log_scale")
    scale = load_file(folder / "controllers.safetensors")["scale"] if log_scale is None else learned_scale(log_scale, chosen)
    return vae, build_likelihood(chosen.name, chosen.value if chosen.scale == "fixed" else scale, chosen.levels), recipe
