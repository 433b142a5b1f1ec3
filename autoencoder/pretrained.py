"""Autoencoders from wherever they are: a run, a checkpoint, a diffusers folder, a hub id, a single file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from autoencoder.artifact import SCALE_UNKNOWN, attach_scales, load_likelihood, load_preprocessing, pixels_of, preprocessing
from autoencoder.config import TrainAutoencoderConfig
from autoencoder.ldm_names import differing
from autoencoder.likelihood import Likelihood, PixelScale, build_likelihood
from autoencoder.model import CONV_OUT, AutoencoderKL, build, is_widened, narrow, scale_rows, widen
from autoencoder.model_path import check_model, checkpoint_weights, folder_of, is_checkpoint
from autoencoder.network_file import load_network_file
from autoencoder.runtime.checkpoint import STATE
from autoencoder.runtime.cli import load_config
from autoencoder.runtime.errors import ConfigError, UsageError, first_line
from autoencoder.runtime.run_folder import CONFIG
from autoencoder.scale import learned_scale
from autoencoder.single_file import load_single_file


@dataclass(frozen=True)
class Pretrained:
    """An autoencoder in fp32 with what is known of it."""

    vae: AutoencoderKL
    """With log scales in its decoder where the likelihood is a `PixelScale`."""
    likelihood: Likelihood | None = None
    preprocessing: dict[str, Any] | None = None
    """Pixel recipe and crops."""
    scale_known: bool = True
    """Whether its scaling factor is that of its latents: not in single files of others, nor in checkpoints before a run's end."""

    @property
    def pixels(self) -> dict[str, Any]:
        """The pixel recipe; of an autoencoder that tells none, 8-bit pixels to [-1, 1]."""
        return pixels_of(self.vae, self.preprocessing).to_json()


def load(path: str, *, subfolder: str | None = None, revision: str | None = None, variant: str | None = None) -> AutoencoderKL:
    """The network of `open_pretrained`, as stock code knows it."""
    return narrow(open_pretrained(path, subfolder=subfolder, revision=revision, variant=variant).vae)


def open_pretrained(
    path: str, *, subfolder: str | None = None, revision: str | None = None, variant: str | None = None, key: str = "model"
) -> Pretrained:
    """The autoencoder that `path`, given as the setting `key`, names.

    Raises:
        UsageError: nothing there that loads, or another architecture; the message says what was found.
    """
    check_model(path, key, subfolder, variant)
    if Path(path).is_file():
        found = load_single_file(Path(path))
        return Pretrained(found.vae, preprocessing=found.preprocessing, scale_known=found.scale_known)
    if is_checkpoint(path):
        return _open_checkpoint(Path(path))
    folder = folder_of(path, subfolder)
    if folder is None:
        return Pretrained(_from_diffusers(path, subfolder=subfolder, revision=revision, variant=variant))
    vae = _from_diffusers(str(folder), variant=variant)
    attach_scales(vae, folder)
    preprocessing = load_preprocessing(folder)
    known = preprocessing is None or not preprocessing.pop(SCALE_UNKNOWN, False)
    # What came from a file without a recipe has nothing else there.
    return Pretrained(vae, load_likelihood(folder), preprocessing or None, known)


def _from_diffusers(path: str, **where: str | None) -> AutoencoderKL:
    """`AutoencoderKL.from_pretrained`, without its leave to start what a file lacks at random."""
    try:
        vae, found = AutoencoderKL.from_pretrained(path, torch_dtype=torch.float32, output_loading_info=True, **where)
    except Exception as error:  # diffusers, huggingface_hub and safetensors each raise kinds of their own
        raise UsageError(f"{path}: cannot be loaded as an AutoencoderKL: {first_line(error)}") from error
    wrong = [f"{kind.removesuffix('_keys')}: {', '.join(sorted(map(str, names))[:3])}" for kind, names in found.items() if names]
    if wrong:
        raise UsageError(f"{path}: its weights are of another architecture than its config.json:\n  " + "\n  ".join(wrong))
    return vae


def _open_checkpoint(folder: Path) -> Pretrained:
    run = folder.parent.parent
    config, kept = load_config(TrainAutoencoderConfig, run / CONFIG), load_network_file(run)
    vae = build(config.model, channels=config.data.channels, resolution=config.data.resolution) if kept is None else kept.build()
    chosen = config.objective.likelihood
    if chosen.scale == "pixel":
        widen(vae, chosen.value)
    load_weights(vae, str(folder), key=str(folder))
    recipe = preprocessing(config.data, json.loads((folder / STATE).read_text())["task"]["levels"])
    if kept is not None and kept.pixels is not None:
        recipe["pixels"] = kept.pixels
    known = kept is not None and config.model.train == "decoder"
    return Pretrained(vae.eval(), _likelihood_of(folder, config), recipe, known)


def _likelihood_of(folder: Path, config: TrainAutoencoderConfig) -> Likelihood:
    """The likelihood of a checkpoint, at its scale by then."""
    chosen = config.objective.likelihood
    if chosen.scale == "pixel":
        return PixelScale(chosen.name, chosen.levels, chosen.bounds)
    weights = checkpoint_weights(folder)
    assert weights is not None
    log_scale = load_file(weights).get("log_scale")
    scale = load_file(folder / "controllers.safetensors")["scale"] if log_scale is None else learned_scale(log_scale, chosen)
    return build_likelihood(chosen.name, chosen.value if chosen.scale == "fixed" else scale, chosen.levels)


def load_weights(vae: AutoencoderKL, path: str, *, key: str = "init_from") -> str | None:
    """Weights for `vae` from wherever `open_pretrained` finds them, or from a checkpoint without its run.

    Log scales that one of the two networks lacks keep their starting value, or are dropped; what is returned says which.

    Raises:
        UsageError: nothing there, or weights of another architecture; the message names the first that differ.
    """
    state, note = _weights(path, key), None
    channels, widened = vae.config["in_channels"], is_widened(vae)
    rows = len(state.get(CONV_OUT[0], ()))
    if widened and rows == channels:
        state |= {name: torch.cat((state[name], fresh.to(state[name]))) for name, fresh in scale_rows(vae).items()}
        note = f"{key}: {path} has no log scales in its decoder; they start at objective.likelihood.value everywhere"
    elif not widened and rows == 2 * channels:
        state |= {name: state[name][:channels] for name in CONV_OUT}
        note = f"{key}: {path} has log scales in its decoder, which this objective does not use; they are dropped"
    own = {k: tuple(v.shape) for k, v in vae.state_dict().items()}
    wrong = differing(own, {k: tuple(v.shape) for k, v in state.items()})
    if wrong:
        listed = "\n  ".join(wrong)
        raise UsageError(
            f"{key}: {path} has weights of another network:\n  {listed}\ngive weights of the same architecture, or give them as "
            "model.pretrained, which takes the network with them"
        )
    vae.load_state_dict(state)
    return note


def _weights(path: str, key: str) -> dict[str, Tensor]:
    """The network's state, with its log scales where it has any."""
    file = checkpoint_weights(path)
    if file is not None:
        try:
            saved = load_file(file)
        except Exception as error:  # safetensors raises a kind of its own
            raise ConfigError(key, path, f"{file} cannot be read ({first_line(error)}); give another checkpoint") from error
        return {name.removeprefix("vae."): value for name, value in saved.items() if name.startswith("vae.")}
    state: dict[str, Tensor] = open_pretrained(path, key=key).vae.state_dict()
    return state
