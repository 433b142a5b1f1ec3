"""Latents for our own commands: the reader, with its refusals as ours."""

from autoencoder.latents.check import check_latents
from autoencoder.latents.reader import Latents, LatentsError
from autoencoder.runtime.errors import ConfigError


def open_latents(path: str, key: str) -> Latents:
    """The latents in a folder, every shard looked at; ConfigError under `key` for whatever the reader refuses."""
    check_latents(path, key)
    try:
        return Latents(path).check()
    except LatentsError as error:
        raise ConfigError(key, path, str(error)) from error
