"""An autoencoder in one safetensors file under LDM's names: ours with its configuration in the metadata, or anyone's."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from autoencoder.ldm_names import PARTS, differing, find_prefix, ldm_name, network_config
from autoencoder.model import AutoencoderKL, stock_config, stock_state
from autoencoder.runtime.errors import UsageError, first_line
from autoencoder.runtime.files import partial, put

METADATA = "firststage"
"""The one key of the metadata; several would come out in random order, and equal autoencoders should be equal files."""


def to_ldm(vae: AutoencoderKL) -> dict[str, Tensor]:
    """The stock state dict of `vae` under LDM's names and shapes."""
    levels = len(vae.config["block_out_channels"])
    named = {ldm_name(name, levels): value for name, value in stock_state(vae).items()}
    return {name: value[:, :, None, None] if ".attn" in name and value.ndim == 2 else value for name, value in named.items()}


class SingleFile(NamedTuple):
    """What a file holds."""

    vae: AutoencoderKL
    preprocessing: dict[str, Any] | None
    """Pixel recipe, crops and hashes, where the file tells them."""
    scale_known: bool
    """Whether the file tells the scaling factor."""


def save_single_file(
    vae: AutoencoderKL, path: Path, *, preprocessing: dict[str, Any] | None, scale_known: bool, dtype: torch.dtype = torch.float32
) -> None:
    """Write `vae` without log scales, in `dtype`, with its configuration and pixel recipe in the metadata.

    A scaling factor that nobody knows is left out of it: readers then ask. What is at `path` stays until the new file is whole.
    """
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in to_ldm(vae).items()}
    config = stock_config(vae)
    if not scale_known:
        del config["scaling_factor"]
    told = {"config": dict(sorted(config.items())), "preprocessing": preprocessing}
    partial(path).write_bytes(save(tensors, metadata={METADATA: json.dumps(told)}))
    put(path)


def load_single_file(path: Path) -> SingleFile:
    """The autoencoder in `path`, in fp32; of a whole diffusion checkpoint only its tensors are read.

    Raises:
        UsageError: no such autoencoder; the message names the first tensors that differ.
    """
    try:
        with safe_open(path, framework="pt") as file:
            prefix = find_prefix(file.keys())
            names = [name for name in file.keys() if name.startswith(tuple(prefix + part for part in PARTS))]  # noqa: SIM118
            given = {name.removeprefix(prefix): file.get_tensor(name).float() for name in names}
            told = json.loads((file.metadata() or {}).get(METADATA, "{}"))
        config = told.get("config") or network_config({name: tuple(value.shape) for name, value in given.items()})
        with torch.device("meta"):
            vae = AutoencoderKL(**config)
    except Exception as error:  # safetensors and diffusers raise kinds of their own
        raise UsageError(f"{path}: cannot be loaded as an AutoencoderKL: {first_line(error)}") from error
    known = "scaling_factor" in config
    if not known:
        # Latents as they are, until someone tells.
        vae.register_to_config(scaling_factor=1.0)
    levels = len(vae.config["block_out_channels"])
    own = {ldm_name(name, levels): (name, value) for name, value in vae.state_dict().items()}
    given = {name: _as_linear(value) if name in own and own[name][1].ndim == 2 else value for name, value in given.items()}
    wrong = differing(
        {name: tuple(value.shape) for name, (_, value) in own.items()}, {name: tuple(value.shape) for name, value in given.items()}
    )
    if wrong:
        listed = "\n  ".join(wrong)
        raise UsageError(f"{path}: holds an autoencoder of another architecture than AutoencoderKL's:\n  {listed}")
    vae.load_state_dict({own[name][0]: value for name, value in given.items()}, assign=True)
    return SingleFile(vae.eval(), told.get("preprocessing"), known)


def _as_linear(value: Tensor) -> Tensor:
    """A 1x1 convolution's kernel (out, in, 1, 1), or (out, in, 1), as a matrix; anything else as it is."""
    return value.flatten(1) if value.ndim > 2 and value.shape[2:].numel() == 1 else value
