"""What names an autoencoder: a run, a checkpoint, a diffusers folder, a hub id or a single file. Torch-free."""

import json
import re
from pathlib import Path
from typing import Any

from autoencoder.ldm_names import find_prefix
from autoencoder.runtime.errors import ConfigError, require, sibling
from autoencoder.runtime.run_folder import CONFIG

GIVE = "give a run, one of its checkpoints/step-* folders, a diffusers folder, a safetensors file or a hub id (`owner/name`)"
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
_WEIGHTS = re.compile(r"diffusion_pytorch_model(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)")


def folder_of(path: str | Path, subfolder: str | None = None) -> Path | None:
    """The local folder with the autoencoder's `config.json`: as given, or the `vae/` of a run or pipeline; None for all else."""
    places = (Path(path) / subfolder,) if subfolder else (Path(path), Path(path) / "vae")
    return next((place for place in places if (place / "config.json").is_file()), None)


def checkpoint_weights(path: str | Path) -> Path | None:
    """The file with the network's weights in a training checkpoint; None for all else.

    The moving average where there is one; of several, the one that the last validation before the checkpoint found best, and where there
    was none, the longest.
    """
    folder = Path(path)
    lengths = sorted((file.stem for file in folder.glob("ema-*.safetensors")), reverse=True)
    names = ("ema", *_validated_best(folder), *lengths, "model")
    return next((file for name in names if (file := folder / f"{name}.safetensors").is_file()), None)


def _validated_best(checkpoint: Path) -> list[str]:
    """Name of the moving average that a checkpoint's state calls the best; empty where it names none."""
    try:
        return [str(json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["averages"]["chosen"])]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` is a training checkpoint within its run, which tells what network the weights are of."""
    return checkpoint_weights(path) is not None and (Path(path).parent.parent / CONFIG).is_file()


def check_model(path: str, key: str, subfolder: str | None = None, variant: str | None = None) -> None:
    """Raise `ConfigError` under `key` where `path` names no autoencoder; a hub id is only checked for its form."""
    given = Path(path)
    if given.is_file():
        _check_single_file(given, key)
        for name, value in (("subfolder", subfolder), ("variant", variant)):
            require(value is None, sibling(key, name), value, f"{path} is a single file: leave it out")
    elif given.is_dir():
        if not is_checkpoint(path):
            _check_folder(path, key, subfolder, variant)
    elif not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) or Path(path.split("/")[0]).is_dir():
        raise ConfigError(key, path, f"no such folder or file; {GIVE}")


def _check_folder(path: str, key: str, subfolder: str | None, variant: str | None) -> None:
    folder = folder_of(path, subfolder)
    if folder is None:
        looked_for = f"{subfolder}/config.json" if subfolder else "config.json, nor vae/config.json"
        raise ConfigError(key, path, f"no autoencoder in it (no {looked_for}); {GIVE}")
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ConfigError(key, path, f"its config.json cannot be read ({error}); give a diffusers folder") from error
    require(name == "AutoencoderKL", key, path, f"it holds a {name or 'model of another library'}; give an AutoencoderKL")
    held = {match["variant"] for file in folder.iterdir() if (match := _WEIGHTS.fullmatch(file.name))}
    if held and variant not in held:
        told = ", ".join(sorted(f"`{v}`" for v in held if v)) or "none"
        plain = "; weights without a variant are there: leave it out" if None in held else ""
        raise ConfigError(sibling(key, "variant"), variant, f"variants in {folder}: {told}{plain}")


def _check_single_file(path: Path, key: str) -> None:
    if path.suffix in PICKLED:
        remedy = "such files are pickles, which may run code when they are read; convert it to safetensors where it comes from"
        raise ConfigError(key, str(path), remedy)
    try:
        find_prefix(name for name in _header(path) if name != "__metadata__")
    except ValueError as error:
        raise ConfigError(key, str(path), str(error)) from error


def _header(path: Path) -> dict[str, Any]:
    """A safetensors file's header: tensors by name, and its metadata."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = file.read(length) if 2 <= length <= size - 8 else b""
    try:
        header = json.loads(start)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise ValueError(f"not a whole safetensors file; {GIVE}")
    return header
