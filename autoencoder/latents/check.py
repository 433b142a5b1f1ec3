"""What can be said of a folder of latents before torch is imported."""

import json
from pathlib import Path

from autoencoder.data.remote import is_remote
from autoencoder.runtime.errors import ConfigError

MANIFEST, PLAN = "manifest.json", "plan.json"


def check_latents(path: str, key: str) -> None:
    """Raise `ConfigError` under `key` where `path` is no finished folder of latents; its shards are checked when it is opened."""
    if is_remote(path):
        url = path.rstrip("/")
        raise ConfigError(
            key,
            path,
            f'rows are mapped from a disk; copy the folder to one first (`aws s3 sync`, `gsutil rsync -r`, or for any URL `python -c "'
            f"import fsspec; files, path = fsspec.url_to_fs('{url}'); files.get(path + '/', 'latents/', recursive=True)\"`), and give that",
        )
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(key, path, "no such folder; give one that encode_dataset made (its --out)")
    if not (folder / MANIFEST).is_file():
        if (folder / PLAN).is_file():
            raise ConfigError(key, path, "these latents are not finished; run the same encode_dataset command again, it goes on")
        raise ConfigError(key, path, f"no {MANIFEST} in it, so no latents; give a folder that encode_dataset made (its --out)")
    try:
        json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(key, path, f"its {MANIFEST} cannot be read ({error}); run the same encode_dataset command again") from error
