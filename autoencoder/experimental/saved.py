"""The families' part of an exported autoencoder: a file beside the network that stock code does not look at."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from autoencoder.config import TrainAutoencoderConfig
from autoencoder.experimental.config import ExperimentalConfig
from autoencoder.experimental.module import Families, Family
from autoencoder.model import Autoencoder, AutoencoderKL
from autoencoder.model_path import checkpoint_weights, folder_of
from autoencoder.runtime.cli import load_config
from autoencoder.runtime.errors import UsageError, first_line

FILE = "experimental.safetensors"
_TOLD = ("posterior", "prior", "flow_couplings", "flow_width", "components")


def save_families(families: Families, folder: Path) -> None:
    """Write the file into an exported `folder`, in fp32, with what rebuilds the families in its metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in families.state_dict().items()}
    told = {key: getattr(families.config, key) for key in _TOLD} | {"resolution": families.resolution}
    # One key: several come out in random order, and equal families should be equal files.
    (folder / FILE).write_bytes(save(tensors, metadata={"experimental": json.dumps(told)}))


def load_families(vae: AutoencoderKL, folder: Path | None) -> Families | None:
    """The families saved beside `vae` in an exported `folder`, ready to measure with, if there are any."""
    path = None if folder is None else folder / FILE
    if path is None or not path.is_file():
        return None
    try:
        config, resolution = _told(path)
        families = Families(config, vae, resolution=resolution)
        families.load_state_dict(load_file(path))
    except Exception as error:  # safetensors, json and torch raise many kinds, each a damaged or foreign file
        raise UsageError(f"{path}: cannot be loaded beside this network: {first_line(error)}") from error
    return families.requires_grad_(False)


@torch.no_grad()
def open_family(vae: AutoencoderKL, path: str | Path, device: torch.device, *, subfolder: str | None = None) -> Family | None:
    """Posterior and prior of the families that `path` has beside `vae`, to measure with on `device`, where `vae` goes too."""
    families = find_families(vae, path, subfolder)
    return None if families is None else families.to(device).bound_to(vae.to(device))


def find_families(vae: AutoencoderKL, path: str | Path, subfolder: str | None = None) -> Families | None:
    """The families that a training checkpoint (its moving average where it has one), a run or an exported folder has beside `vae`."""
    weights = checkpoint_weights(path)
    if weights is None:
        return load_families(vae, folder_of(path, subfolder))
    run = weights.parent.parent.parent / "config.yaml"
    config = load_config(TrainAutoencoderConfig, run) if run.is_file() else None
    if config is None or not config.experimental.parts:
        return None
    families, prefix = Families(config.experimental, vae, resolution=config.data.resolution), "experimental."
    families.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in load_file(weights).items() if name.startswith(prefix)})
    return families.requires_grad_(False)


def start_from(module: Autoencoder, path: str) -> str | None:
    """Give `module` the families at `path` where they are of its own kinds and sizes; what a log should say otherwise."""
    own, found = module.experimental, find_families(module.vae, path)
    if own is None or not own.config.parts:
        return None if found is None else f"init_from: {path} has experimental families, which this run has not; they are left out"
    if found is None or _shapes(own) != _shapes(found):
        return f"init_from: {path} has no experimental families like this run's; they start anew"
    own.load_state_dict(found.state_dict())
    return None


def _shapes(families: Families) -> dict[str, torch.Size]:
    """By names, which tell the families apart."""
    return {name: tensor.shape for name, tensor in families.state_dict().items()}


def has_flow_posterior(vae: AutoencoderKL, path: str, subfolder: str | None = None) -> bool:
    """Whether the decoder of `vae`, from `path`, expects what a flow has made of the encoder's Gaussian."""
    families = find_families(vae, path, subfolder)
    return families is not None and families.config.posterior == "flow"


def describe(config: ExperimentalConfig) -> str:
    """What a run's log and an export say of the families: what stock code makes of the folder."""
    without = {
        "flow": "stock code decodes the Gaussian before the flow: wrong latents; encode_dataset refuses this autoencoder",
        "gaussian": "latents and reconstructions of stock code are right without it",
    }[config.posterior]
    return f"experimental: posterior {config.posterior}, prior {config.prior}, in {FILE}, which stock code does not load; {without}"


def left_out(config: ExperimentalConfig) -> str:
    """What an export says that has no place for the families."""
    flow = "; its decoder expects latents that the flow has bent, so that it reconstructs wrongly" if config.posterior == "flow" else ""
    return f"experimental: posterior {config.posterior}, prior {config.prior} are left out{flow}"


def _told(path: Path) -> tuple[ExperimentalConfig, int]:
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["experimental"])
    resolution = told.pop("resolution")
    return ExperimentalConfig(**told), resolution
