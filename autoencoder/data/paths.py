"""What a `source` string names. Torch-free: commands check their paths with it before they import anything heavy."""

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NoReturn

from autoencoder.runtime.errors import ConfigError, UsageError

# fmt: off
IMAGE_EXTENSIONS = (
    ".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".npy", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
)
# fmt: on
VALIDATION_SPLITS = ("validation", "val", "valid", "dev", "test")


@dataclass(frozen=True)
class Location:
    """Where the images of a source are."""

    kind: Literal["demo", "folder", "parquet", "webdataset", "hub"]
    paths: tuple[str, ...] = ()
    """The folder, or the files in order; nothing for `demo` and hub names."""


def check_source(source: str, key: str = "source") -> None:
    """Raise ConfigError under `key` where `source` cannot name any images: no such folder, a glob without match, no image in it.

    A hub name is only checked for its form; whether it exists is known when it is opened.
    """
    location = locate(source, key)
    if location.kind == "folder" and next(walk_images(location.paths[0]), None) is None:
        raise ConfigError(
            key, source, f"the folder holds no images ({', '.join(IMAGE_EXTENSIONS)}); give FOLDER/*.parquet or FOLDER/*.tar for tables"
        )


def locate(source: str, key: str = "source") -> Location:
    """The kind and the files of `source`; ConfigError under `key` where there are none."""
    if source == "demo":
        return Location("demo")
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return Location("folder", (path,))
    if os.path.isfile(path):
        return _tables((path,), source, key)
    if glob.has_magic(path):
        files = tuple(sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name)))
        if not files:
            raise ConfigError(key, source, "no file matches; give a glob that matches .parquet or .tar files")
        return _tables(files, source, key)
    # `owner/name` is a hub name, unless `owner` is a folder here: then it is a path that is not there.
    if (
        re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)
        and not source.endswith((".parquet", ".tar"))
        and not os.path.isdir(source.split("/")[0])
    ):
        return Location("hub")
    raise ConfigError(
        key,
        source,
        "no such file or folder; give `demo`, a folder of images, a .parquet or .tar file or glob, or a hub name (`owner/name`)",
    )


def walk_images(root: str) -> Iterator[str]:
    """The image files under `root` by extension, relative to it, in an order of their names alone; hidden ones are left out."""
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_refuse):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root)


def folder_splits(root: str) -> list[str]:
    """The splits of a folder: its subfolders where `train` is among them, alone or beside a validation or test folder; else none.

    A class that happens to be called `train` does not make splits of its neighbours.
    """
    subfolders = visible_subfolders(root)
    has_splits = "train" in subfolders and (len(subfolders) == 1 or any(name in subfolders for name in VALIDATION_SPLITS))
    return subfolders if has_splits else []


def visible_subfolders(root: str) -> list[str]:
    """Names of the subfolders of `root` that are not hidden, sorted."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _tables(files: tuple[str, ...], source: str, key: str) -> Location:
    endings = {os.path.splitext(name)[1] for name in files}
    if endings == {".parquet"}:
        return Location("parquet", files)
    if endings == {".tar"}:
        return Location("webdataset", files)
    raise ConfigError(
        key, source, f"files must be all .parquet or all .tar, not {', '.join(sorted(endings))}; give a folder for single images"
    )


def _refuse(error: OSError) -> NoReturn:
    raise UsageError(f"cannot read the folder {error.filename}: {error.strerror}; make it readable or leave it out")
