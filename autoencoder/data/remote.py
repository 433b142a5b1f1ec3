"""Files behind URLs, through fsspec: `s3://`, `gs://`, `https://`, `memory://` and whatever else a package is installed for. Torch-free.

A URL is opened anew where it is used, never kept open: file systems hold threads and connections that no forked process may share, and
fsspec keeps those of each process. Credentials, endpoints and the like come from fsspec's own configuration.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from autoencoder.runtime.errors import ConfigError, UsageError, first_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def is_remote(path: str) -> bool:
    """Whether it is a URL."""
    return "://" in path


@contextmanager
def refused(key: str, source: str) -> Iterator[None]:
    """What a file system raises becomes a ConfigError under `key`: no package for the protocol, no credentials, no network."""
    try:
        yield
    except UsageError:
        raise
    except ImportError as error:
        remedy = f"{source.split('://')[0]}:// needs a package that is not installed: {first_line(error)}"
        raise ConfigError(key, source, remedy) from error
    except ValueError as error:
        raise ConfigError(key, source, f"{first_line(error)}; give a path, or a URL of a protocol that fsspec knows") from error
    # Each file system has errors of its own.
    except Exception as error:
        remedy = f"cannot be reached: {type(error).__name__}: {first_line(error)}; check the address, the network and the credentials"
        raise ConfigError(key, source, remedy) from error


def check_local(path: str | None, key: str) -> None:
    """Raise `ConfigError` for a URL, where a command writes to disks alone."""
    if path is not None and is_remote(path):
        raise ConfigError(key, path, "encode_dataset alone writes behind URLs; give a path on a disk, and copy it when it is done")


def opened(url: str) -> "tuple[AbstractFileSystem, str]":
    """The file system, and the path in it."""
    from fsspec.core import url_to_fs

    found: tuple[AbstractFileSystem, str] = url_to_fs(url)
    return found


def normal(url: str) -> str:
    """The URL as its file system writes it: one name for a file however it was given."""
    files, path = opened(url)
    named: str = files.unstrip_protocol(path)
    return named


def is_folder(url: str) -> bool:
    files, path = opened(url)
    return bool(files.isdir(path))


def is_file(url: str) -> bool:
    files, path = opened(url)
    return bool(files.isfile(path))


def expand(pattern: str) -> list[str]:
    """The files that match, sorted."""
    files, path = opened(pattern)
    return sorted(files.unstrip_protocol(name) for name, info in files.glob(path, detail=True).items() if info["type"] == "file")


def list_folder(url: str) -> tuple[list[str], list[tuple[str, int]]]:
    """Names of the subfolders; name and bytes of the files."""
    files, path = opened(url)
    subfolders, found = [], []
    for info in files.ls(path, detail=True):
        name = info["name"].rstrip("/").rpartition("/")[2]
        # Object stores list a folder's own marker within it.
        if not name or info["name"].strip("/") == path.strip("/"):
            continue
        if info["type"] == "directory":
            subfolders.append(name)
        else:
            found.append((name, int(info.get("size") or 0)))
    return subfolders, found


def stat(url: str) -> tuple[int, str]:
    """Size, and what tells one version of the file from another: its etag or time of modification, empty where neither is known."""
    files, path = opened(url)
    info = files.info(path)
    return int(info["size"]), str(next((info[name] for name in ("ETag", "etag", "mtime", "LastModified", "created") if name in info), ""))


def read(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """The bytes from `start` to before `end`, by default all; OSError and whatever its file system raises."""
    files, path = opened(url)
    data: bytes = files.cat_file(path, start=start, end=end)
    return data


def open_file(url: str) -> Any:
    """The file, open to read, seekable."""
    files, path = opened(url)
    return files.open(path, "rb")
