"""Files as an index lists them, and whether a file still is the one that was listed."""

import os
from datetime import datetime
from typing import NamedTuple

from autoencoder.data import remote
from autoencoder.runtime.errors import UsageError

_SECOND = 10**9


class Listed(NamedTuple):
    """A file of an index."""

    path: str
    bytes: int
    version: str
    """Changes with its content, as far as the file system tells: nanoseconds of the time of modification here, an etag or a time behind a
    URL; empty where nothing is told."""

    @classmethod
    def of(cls, path: str, status: os.stat_result) -> "Listed":
        """A file here."""
        return cls(path, status.st_size, str(status.st_mtime_ns))

    def check(self, found: "Listed | None", key: str) -> None:
        """UsageError under `key` where `found`, None for a file that is gone, is not this one.

        Times of modification are compared where both are known, and as exactly as both are: some file systems and archives keep whole
        seconds.
        """
        if found is None:
            raise self._changed(key, f"it is gone, the index has {self.bytes:,} bytes")
        if found.bytes != self.bytes:
            raise self._changed(key, f"it has {found.bytes:,} bytes, the index has {self.bytes:,} bytes")
        if not _same(found.version, self.version):
            times = f"it was modified at {_time(found.version)}, when it was indexed at {_time(self.version)}"
            raise self._changed(key, f"{times} (a copy keeps the time by `cp -p` or `rsync -t`)")

    def _changed(self, key: str, how: str) -> UsageError:
        remedy = "put it back, or start anew, which indexes again (a folder of latents keeps its index: encode to another folder)"
        return UsageError(f"{key}: {self.path} has changed since it was indexed: {how}; {remedy}")


def as_it_is(path: str) -> Listed | None:
    """The file, here or remote; None where there is none."""
    if not remote.is_remote(path):
        try:
            return Listed.of(path, os.stat(path))
        except OSError:
            return None
    try:
        return Listed(path, *remote.stat(path))
    except FileNotFoundError:
        return None


def _same(one: str, other: str) -> bool:
    if one == other or not (one.isdecimal() and other.isdecimal()):
        return True
    times = int(one), int(other)
    return any(time % _SECOND == 0 for time in times) and abs(times[0] - times[1]) < 2 * _SECOND


def _time(nanoseconds: str) -> str:
    return datetime.fromtimestamp(int(nanoseconds) / _SECOND).isoformat(" ", "microseconds")
