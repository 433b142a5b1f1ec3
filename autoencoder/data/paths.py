"""What a `source` string names. Torch-free: commands check their paths with it before they import anything heavy."""

import glob
import os
import re
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, NoReturn

from autoencoder.data import remote
from autoencoder.runtime.errors import ConfigError, UsageError

# fmt: off
IMAGE_EXTENSIONS = (
    ".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".npy", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
)
# fmt: on
VALIDATION_SPLITS = ("validation", "val", "valid", "dev", "test")

_Way = tuple[tuple[int, int], ...]
"""The folders from the root to one, by device and inode."""


@dataclass(frozen=True)
class Location:
    """Where the images of a source are."""

    kind: Literal["demo", "folder", "parquet", "webdataset", "hub"]
    paths: tuple[str, ...] = ()
    """The folder, or the files in order, paths or URLs; nothing for `demo` and hub names."""
    base: str = ""
    """What all `paths` of files begin with: the pattern's folder, up to its last slash."""


class Found(NamedTuple):
    """An image file of a folder."""

    name: str
    """Relative to the folder, with slashes."""
    bytes: int
    """-1 where it is not to be had: a link that leads nowhere."""
    mtime_ns: int
    """0 where it is not to be had, and behind a URL."""


def check_source(source: str, key: str = "source") -> None:
    """Raise ConfigError under `key` where `source` cannot name any images: no such folder, a glob without match, no image in it.

    A hub name is only checked for its form; whether it exists is known when it is opened.
    """
    location = locate(source, key)
    if location.kind == "folder" and not _holds_images(location.paths[0]):
        raise ConfigError(
            key, source, f"the folder holds no images ({', '.join(IMAGE_EXTENSIONS)}); give FOLDER/*.parquet or FOLDER/*.tar for tables"
        )


def locate(source: str, key: str = "source") -> Location:
    """The kind and the files of `source`; ConfigError under `key` where there are none."""
    if source == "demo":
        return Location("demo")
    if remote.is_remote(source):
        return _locate_remote(source, key)
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return Location("folder", (path,))
    if os.path.isfile(path):
        return _tables((path,), path, source, key)
    if glob.has_magic(path):
        files = tuple(sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name)))
        return _tables(files, path, source, key)
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
    return (found.name.replace("/", os.sep) for found in find_images(root))


def find_images(root: str) -> Iterator[Found]:
    """The image files under a folder, here or remote, by extension; hidden ones are left out.

    The order is one of their names alone: of each folder first its files, then its subfolders. Links are followed; UsageError for one
    that leads back to a folder that it is in. Pipes, sockets and devices are passed over, with one line on stderr at the end.
    """
    pending: list[tuple[str, _Way]] = [("", ())]
    passed = 0
    while pending:
        under, way = pending.pop()
        here = _join(root, under)
        way = _onwards(way, here)
        subfolders, files = _listed(here, under) if remote.is_remote(root) else _scanned(here, under)
        for found in files:
            if found is None:
                passed += 1
            else:
                yield found
        pending.extend((f"{under}{name}/", way) for name in sorted(subfolders, reverse=True))
    if passed and os.environ.get("LOCAL_RANK", "0") == "0":
        what = "file is a pipe, socket or device and is" if passed == 1 else "files are pipes, sockets or devices and are"
        print(f"note: {root}: {passed:,} {what} passed over, though named like an image", file=sys.stderr)


def folder_splits(root: str) -> list[str]:
    """The splits of a folder: its subfolders where `train` is among them, alone or beside a validation or test folder; else none.

    A class that happens to be called `train` does not make splits of its neighbours.
    """
    subfolders = visible_subfolders(root)
    has_splits = "train" in subfolders and (len(subfolders) == 1 or any(name in subfolders for name in VALIDATION_SPLITS))
    return subfolders if has_splits else []


def visible_subfolders(root: str) -> list[str]:
    """Names of the subfolders of `root` that are not hidden, sorted."""
    if remote.is_remote(root):
        return sorted(name for name in remote.list_folder(root)[0] if not name.startswith("."))
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if _is_folder(entry) and not entry.name.startswith("."))


def _join(root: str, under: str) -> str:
    return os.path.join(root, under.replace("/", os.sep)) if not remote.is_remote(root) else f"{root.rstrip('/')}/{under}".rstrip("/")


def _onwards(way: _Way, folder: str) -> _Way:
    """The way on into `folder`; UsageError where it has been on it already: then links go in a circle."""
    if remote.is_remote(folder):
        return way
    try:
        stat = os.stat(folder)
    except OSError as error:
        _refuse(error)
    this = (stat.st_dev, stat.st_ino)
    if this in way:
        raise UsageError(f"{folder} is a link back to a folder that it is in, so that images would come again and again; take it away")
    return (*way, this)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def _listed(folder: str, under: str) -> tuple[list[str], Iterator[Found]]:
    """The subfolders of a remote folder, and its image files by name, with `under` before their names."""
    names, entries = remote.list_folder(folder)
    found = (Found(under + name, size, 0) for name, size in sorted(entries) if _is_image(name))
    return [name for name in names if not name.startswith(".")], found


def _scanned(folder: str, under: str) -> tuple[list[str], Iterator[Found | None]]:
    """As `_listed` of a folder here; None for what is no file that can be read to an end."""
    subfolders, names = [], []
    try:
        with os.scandir(folder) as scanned:
            for entry in scanned:
                if _is_folder(entry):
                    subfolders += [] if entry.name.startswith(".") else [entry.name]
                elif _is_image(entry.name):
                    names.append(entry.name)
    except OSError as error:
        _refuse(error)
    names.sort()
    # Looked at one by one: of a million files in a folder names alone are in memory.
    return subfolders, (_found(os.path.join(folder, name), under + name) for name in names)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _found(path: str, name: str) -> Found | None:
    try:
        status = os.stat(path)
    except OSError:
        return Found(name, -1, 0)
    return Found(name, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def _holds_images(root: str) -> bool:
    """Whether there is an image under a folder: as soon as one is seen."""
    if remote.is_remote(root):
        return next(find_images(root), None) is not None
    pending: list[tuple[str, _Way]] = [(root, ())]
    while pending:
        folder, way = pending.pop()
        way = _onwards(way, folder)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if _is_folder(entry):
                        pending += [] if entry.name.startswith(".") else [(entry.path, way)]
                    elif _is_image(entry.name) and _found(entry.path, entry.name) is not None:
                        return True
        except OSError as error:
            _refuse(error)
    return False


def _locate_remote(source: str, key: str) -> Location:
    with remote.refused(key, source):
        url = remote.normal(source)
        if glob.has_magic(url):
            return _tables(tuple(remote.expand(url)), url, source, key)
        if remote.is_folder(url):
            return Location("folder", (url,))
        if remote.is_file(url):
            return _tables((url,), url, source, key)
    raise ConfigError(key, source, "no such file or folder there; give a folder of images, or a .parquet or .tar file or glob")


def _tables(files: tuple[str, ...], pattern: str, source: str, key: str) -> Location:
    if not files:
        raise ConfigError(key, source, "no file matches; give a glob that matches .parquet or .tar files")
    # Of a file name without a wildcard the folder is what comes before the last slash as well.
    magic = re.search(r"[*?[]", pattern)
    base = re.sub(r"[^/]*$", "", pattern[: magic.start()] if magic else pattern)
    endings = {os.path.splitext(name)[1] for name in files}
    if endings == {".parquet"}:
        return Location("parquet", files, base)
    if endings == {".tar"}:
        return Location("webdataset", files, base)
    packed = next((name for name in files if re.search(r"\.(tar\.\w+|tgz|tbz2?|txz)$", name)), None)
    if packed is not None:
        remedy = f"{os.path.basename(packed)} is compressed, and images cannot be read from the middle of it; unpack it to a plain .tar"
        raise ConfigError(key, source, remedy)
    raise ConfigError(
        key, source, f"files must be all .parquet or all .tar, not {', '.join(sorted(endings))}; give a folder for single images"
    )


def _refuse(error: OSError) -> NoReturn:
    raise UsageError(f"cannot read the folder {error.filename}: {error.strerror}; make it readable or leave it out")
