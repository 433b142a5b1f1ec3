"""Files behind a URL and their copies in a folder of this machine. Torch-free.

Assumed of a store: putting an object is atomic, and who has put one finds it (S3, Google Cloud Storage, Azure, and disks but for a
process that is killed while it copies). Nothing is renamed there and nothing locked.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from autoencoder.data.remote import opened
from autoencoder.latents.check import MANIFEST, PLAN
from autoencoder.latents.commit import remove
from autoencoder.latents.place import Place
from autoencoder.runtime.errors import UsageError, first_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SMALL = (PLAN, MANIFEST, "images-*.parquet", "index-*.arrow", "buckets-*.npy", "data-*.json")
"""What is fetched at a start and stays when it has been sent; latents and tables are never fetched, and go when they have been sent."""

COMPLETE = "config.json"
"""The last file of a folder that is sent: where it is, all are."""


class Store(Place):
    """What is at `url`; `here` has copies of the small files of it."""

    def __init__(self, url: str, here: Path) -> None:
        self.url, self._here = url, here
        self._sizes: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """The files that are there, as they were last listed, and those that were sent since."""
        return list(self._sizes)

    def has(self, name: str) -> bool:
        return name in self._sizes

    def size(self, path: Path) -> int:
        try:
            return self._sizes[self._name(path)]
        except KeyError as error:
            raise FileNotFoundError(path) from error

    def fetch(self) -> None:
        """List what is there, and have the small files of it here; copies of what is there no more go."""
        with self._reached() as (files, root):
            found = files.find(root, detail=True)
            if root in found:
                raise UsageError(f"out: got {self.url!r}, a file; give a folder for the latents")
            inside = {name.removeprefix(f"{root}/"): info for name, info in found.items() if name.startswith(f"{root}/")}
            # An object store may list a folder's own marker.
            self._sizes = {name: int(info["size"]) for name, info in inside.items() if name and not name.endswith("/")}
            wanted = [name for name, size in self._sizes.items() if _is_small(name) and _size(self._here / name) != size]
            files.get([f"{root}/{name}" for name in wanted], [str(self._here / name) for name in wanted])
        for path in self._here.iterdir():
            if _is_small(path.name) and path.name not in self._sizes:
                remove(path)

    def content(self, name: str) -> bytes | None:
        """The bytes of a file that is there; None where there is none."""
        with self._reached() as (files, root):
            try:
                found: bytes = files.cat_file(f"{root}/{name}")
            except FileNotFoundError:
                return None
            return found

    def look(self, *paths: Path) -> None:
        """As far as the first that is not there, have the small ones of these here, and the sizes of all."""
        for path in paths:
            name = self._name(path)
            with self._reached() as (files, root):
                try:
                    size = int(files.info(f"{root}/{name}")["size"])
                    if _is_small(name):
                        files.get_file(f"{root}/{name}", str(path))
                except FileNotFoundError:
                    self._sizes.pop(name, None)
                    path.unlink(missing_ok=True)
                    return
            self._sizes[name] = size

    def keep(self, *paths: Path) -> None:
        """Send these; of a folder its files, `config.json` last."""
        for path in paths:
            for file in sorted(path.iterdir(), key=lambda file: file.name == COMPLETE) if path.is_dir() else [path]:
                self._send(file)

    def exchange(self, name: str, before: bytes | None) -> bool:
        """Send a file where what is there of its name still is `before`, None for nothing; else False.

        Of several who find nothing at one moment a store that puts on condition lets one in. Any other keeps what came last, which some
        of them may not see: who goes by the file compares it again in the end.
        """
        sent = (self._here / name).read_bytes()
        if self.content(name) != before:
            return False
        with self._reached() as (files, root):
            try:
                _put(files, f"{root}/{name}", lambda path: _pipe(files, path, sent, exclusive=before is None))
            except FileExistsError:
                return False
        self._sizes[name] = len(sent)
        return self.content(name) == sent

    def drop(self, *names: str) -> None:
        """Take files away."""
        for name in names:
            with self._reached() as (files, root), suppress(FileNotFoundError):
                files.rm_file(f"{root}/{name}")
            self._sizes.pop(name, None)

    def _send(self, path: Path) -> None:
        name, size = self._name(path), path.stat().st_size
        with self._reached() as (files, root):
            _put(files, f"{root}/{name}", lambda there: files.put_file(str(path), there))
            arrived = int(files.info(f"{root}/{name}")["size"])
        if arrived != size:
            raise UsageError(f"{self.url}/{name}: {size:,} bytes were sent, {arrived:,} are there; the same command goes on")
        self._sizes[name] = size
        if not _is_small(name):
            path.unlink()

    def _name(self, path: Path) -> str:
        return path.relative_to(self._here).as_posix()

    @contextmanager
    def _reached(self) -> "Iterator[tuple[AbstractFileSystem, str]]":
        """The file system, as it is, and the folder's path in it; UsageError where it does not answer as it should."""
        try:
            files, root = opened(self.url)
            # What was listed before says nothing of what others have put there since.
            files.invalidate_cache()
            yield files, root.rstrip("/")
        except UsageError:
            raise
        # Each file system has errors of its own.
        except Exception as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            raise UsageError(f"{self.url}: {what}; check the network and the credentials, then the same command goes on") from error


def _pipe(files: "AbstractFileSystem", path: str, content: bytes, *, exclusive: bool) -> None:
    if exclusive:
        try:
            files.pipe_file(path, content, mode="create")
        # Stores, and releases of fsspec, that know no such mode.
        except (TypeError, ValueError, NotImplementedError):
            files.pipe_file(path, content)
    else:
        files.pipe_file(path, content)


def _put(files: "AbstractFileSystem", path: str, put: Callable[[str], None]) -> None:
    try:
        put(path)
    except FileNotFoundError:
        _make_folder(files, path.rpartition("/")[0])
        put(path)


def _make_folder(files: "AbstractFileSystem", path: str) -> None:
    """Where folders have to be made: this one and those above it, but not a bucket, which is its owner's to make."""
    if "/" in path.strip("/") and not files.isdir(path):
        _make_folder(files, path.rpartition("/")[0])
        with suppress(FileExistsError):
            files.mkdir(path, create_parents=False)


def _is_small(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in SMALL)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
