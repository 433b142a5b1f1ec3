"""Files that are there whole or not at all."""

import os
from pathlib import Path

from autoencoder.runtime.errors import ConfigError


def replace_text(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename: a reader, or a crash, sees the old content or the new."""
    beside = partial(path)
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_out(path: str, text: str) -> None:
    """What a command was asked to write to its `--out`, whole or not at all; ConfigError where it cannot be written."""
    try:
        replace_text(Path(path), text)
    except OSError as error:
        raise ConfigError("out", path, f"cannot be written ({error.strerror}); give a file in a folder that takes it") from error


def partial(path: Path) -> Path:
    """Where `path` is written before it is renamed."""
    return path.with_name(f".{path.name}.partial")


def put(path: Path, beside: Path | None = None) -> None:
    """Rename `beside` (None: `partial(path)`), a file or a folder of files, to `path`, its content on the disk: whole or not there after a
    power cut."""
    beside = beside or partial(path)
    for file in beside.iterdir() if beside.is_dir() else []:
        fsync(file)
    fsync(beside)
    os.replace(beside, path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
