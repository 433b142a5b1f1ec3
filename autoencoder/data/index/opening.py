"""What all indexed sources share: how an index is found or made, and the files that it lists."""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from autoencoder.data import remote
from autoencoder.data.index.listed import Listed
from autoencoder.data.index.table import Index
from autoencoder.data.paths import Location
from autoencoder.runtime.errors import UsageError

_EVERY = 5.0
"""Seconds between two lines of progress."""

T = TypeVar("T")


def opened_or_made(path: Path | None, asked: dict[str, Any], make: Callable[[], Index], key: str) -> Index:
    """The index in the file `path`, which has to be made with the same settings `asked`; without `path` the one that `make` gives."""
    if path is None:
        made = make()
        # Arrow keeps what was freed on the way, several times what the index takes.
        pa.default_memory_pool().release_unused()
        return Index(made.table, {**made.facts, "asked": asked})
    index = Index.open(path)
    if index.facts["asked"] != asked:
        raise UsageError(f"{key}: {path} was made with {index.facts['asked']}, not with {asked}; give these settings, or make it again")
    return index


def stat_files(location: Location) -> list[Listed]:
    """The files of a location as they are."""
    return [Listed(path, *remote.stat(path)) if remote.is_remote(path) else Listed.of(path, os.stat(path)) for path in location.paths]


def files_told(files: list[Listed], location: Location) -> list[list[Any]]:
    """The files as an index keeps them: relative to the location, so that they may lie elsewhere when it is opened.

    Without what a URL tells of versions, in which each file system has words of its own.
    """
    return [[file.path.removeprefix(location.base), file.bytes, "" if remote.is_remote(file.path) else file.version] for file in files]


def files_of(index: Index, location: Location) -> list[Listed]:
    """The files of an index, where the location is."""
    return [Listed(location.base + name, size, version) for name, size, version in index.facts["files"]]


def fingerprint(named: Iterable[tuple[str, int]]) -> str:
    """A digest of names and sizes; an edit that keeps both escapes it."""
    state = hashlib.sha256()
    for name, size in named:
        state.update(signed(name, size))
    return state.hexdigest()


def signed(name: str, size: int) -> bytes:
    """What a file adds to a fingerprint."""
    return f"{name}\0{size}\0".encode("utf-8", "surrogateescape")


def told(items: Iterable[T], what: str, of: int | None = None) -> Iterator[T]:
    """The items, counted on a line of stderr every few seconds, by one of a machine's processes."""
    start = last = time.monotonic()
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    for count, item in enumerate(items):
        yield item
        # A look at the clock costs more than most items.
        if count % 64 == 63 or of is not None:
            now = time.monotonic()
            if speaks and now - last > _EVERY:
                last = now
                whole = "" if of is None else f" of {of:,}"
                print(f"index: {count + 1:,}{whole} {what} in {now - start:.0f} s", file=sys.stderr)
