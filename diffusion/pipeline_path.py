"""What names a pipeline: a finished run, a diffusers folder or a hub id. Torch-free."""

import hashlib
import json
import re
from pathlib import Path

from autoencoder.runtime.errors import ConfigError

INDEX = "model_index.json"
FP32 = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors")
"""Files with a network's weights in full precision: those of variants have a name more."""
_WEIGHTS = ("diffusion_pytorch_model*.safetensors",)
_NEEDED = {"transformer": ("config.json", _WEIGHTS), "vae": ("config.json", _WEIGHTS), "scheduler": ("scheduler_config.json", ())}


def pipeline_folder(path: str) -> Path | None:
    """The local folder with the pipeline's index, a run's `pipeline/` included; None for hub ids and where there is none."""
    return next((place for place in (Path(path) / "pipeline", Path(path)) if (place / INDEX).is_file()), None)


def network_hash(folder: Path) -> str:
    """SHA-256 over the network of a pipeline's folder, its configuration and fp32 weights, file by file."""
    digest = hashlib.sha256()
    for file in ("config.json", *sorted(file.name for file in (folder / "transformer").iterdir() if FP32.fullmatch(file.name))):
        with (folder / "transformer" / file).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def check_pipeline(path: str, key: str, *, hub: bool = True) -> None:
    """Raise `ConfigError` under `key` where `path` is no DiTPipeline that is whole; the message names the missing file.

    A hub id is only checked for its form; without `hub` it is refused.
    """
    wanted = (
        "give a finished diffusion run, a DiTPipeline folder or a hub id"
        if hub
        else "give a finished diffusion run or a DiTPipeline folder"
    )
    folder = pipeline_folder(path)
    if folder is not None:
        _check_folder(folder, key)
    elif Path(path).is_dir():
        if (Path(path) / "latents.json").is_file():
            remedy = "this run has no pipeline/ yet: let it finish (the same train_diffusion command goes on)"
        elif (Path(path) / "config.yaml").is_file():
            remedy = "a run of the autoencoder, and pipelines come from train_diffusion"
        else:
            remedy = f"no {INDEX} in it"
        raise ConfigError(key, path, f"{remedy}; {wanted}")
    elif Path(path).exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) or Path(path.split("/")[0]).is_dir():
        raise ConfigError(key, path, f"no such folder; {wanted}{' (`owner/name`)' if hub else ''}")
    elif not hub:
        remedy = "if it is a repository of the hub, fetch it first (`hf download`) and give that folder"
        raise ConfigError(key, path, f"no such folder; {remedy}")


def _check_folder(folder: Path, key: str) -> None:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        name = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(key, str(folder), f"its {INDEX} cannot be read ({error}); export the pipeline again") from error
    if name != "DiTPipeline":
        raise ConfigError(key, str(folder), f"holds a {name}; give a DiTPipeline")
    for part, (configuration, weights) in _NEEDED.items():
        missing = [] if (folder / part / configuration).is_file() else [configuration]
        if weights and not any(next((folder / part).glob(pattern), None) for pattern in weights):
            missing.append(weights[0])
        if missing:
            files = " and ".join(f"{part}/{name}" for name in missing)
            raise ConfigError(key, str(folder), f"{files} is missing; copy the folder again, or let the run write it again")
