"""What names an autoencoder: a run, a diffusers folder or a hub id. Torch-free."""

import re
from pathlib import Path

from autoencoder.runtime.errors import ConfigError


def folder_of(path: str, subfolder: str | None = None) -> Path | None:
    """The local folder with the autoencoder's `config.json`, a run's `vae/` included; None for hub ids and where there is none."""
    places = (Path(path) / (subfolder or ""), Path(path) / "vae")
    return next((place for place in places if (place / "config.json").is_file()), None)


def check_model(path: str, key: str, subfolder: str | None = None) -> None:
    """Raise `ConfigError` under `key` where `path` names no autoencoder: no such folder, or one without a `config.json`.

    A hub id is only checked for its form.
    """
    if Path(path).is_dir():
        if folder_of(path, subfolder) is None:
            raise ConfigError(
                key, path, "no autoencoder in it (no config.json, nor vae/config.json); give a finished run or a diffusers folder"
            )
    elif Path(path).exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) or Path(path.split("/")[0]).is_dir():
        raise ConfigError(key, path, "no such folder; give a finished run, a diffusers folder or a hub id (`owner/name`)")
