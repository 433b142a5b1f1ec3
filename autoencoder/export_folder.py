"""A folder that an export writes: whole or not at all, listed file by file, and replaced only where nobody has changed it. Torch-free."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from autoencoder.runtime.errors import ConfigError
from autoencoder.runtime.files import partial, replace_text
from autoencoder.runtime.lock import make_folder

RECORD = "export.json"
"""Size and SHA-256 of every other file, and what was measured of it."""


def check_place(out: str, key: str = "out") -> None:
    """Raise `ConfigError` under `key` unless `out` is free for an export: new, empty, or an earlier export that nobody has changed."""
    folder = Path(out)
    if folder.resolve() == Path.cwd():
        raise ConfigError(key, out, "is the folder that the command runs in, and would be replaced under it; give another")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ConfigError(key, out, f"{above} is a file; give a folder that can be made")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    give = "give a folder that is new or empty"
    if not (folder / RECORD).is_file():
        raise ConfigError(key, out, f"{'a file' if folder.is_file() else f'it holds files and no {RECORD}, so no earlier export'}; {give}")
    try:
        listed = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
        expected = {name: (told["bytes"], told["sha256"]) for name, told in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(key, out, f"its {RECORD} cannot be read ({error}); {give}") from error
    for name in published(folder):
        file = folder / name
        if name != RECORD and (name not in expected or expected[name] != (file.stat().st_size, _digest(file))):
            what = "has changed since" if name in expected else "is not of"
            raise ConfigError(key, out, f"{name} {what} the export that {RECORD} lists; keep it elsewhere, or {give}")


def begin(out: Path) -> Path:
    """An empty folder beside `out` to write in; ConfigError where there can be none."""
    out = out.resolve()
    make_folder(out.parent, "the export")
    beside = partial(out)
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
    except OSError as error:
        raise ConfigError("out", str(out), f"cannot be written ({error.strerror}); give a folder that can be") from error
    return beside


def finish(beside: Path, out: Path, told: dict[str, Any]) -> None:
    """List what is in `beside` in its record, with `told`, and put it in the place of `out`."""
    files = {name: {"bytes": (beside / name).stat().st_size, "sha256": _digest(beside / name)} for name in published(beside)}
    replace_text(beside / RECORD, json.dumps({**told, "files": files}, indent=1, ensure_ascii=False) + "\n")
    place = out.resolve()
    before = place.with_name(f".{place.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    try:
        if place.exists():
            os.replace(place, before)
        os.replace(beside, place)
    # A volume's own folder cannot be replaced.
    except OSError as error:
        raise ConfigError("out", str(out), f"cannot be replaced ({error.strerror}); give a folder in it, or another") from error
    shutil.rmtree(before, ignore_errors=True)


def published(folder: Path) -> list[str]:
    """All files of an export, by their paths in it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
