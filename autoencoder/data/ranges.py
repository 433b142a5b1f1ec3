"""Parts of indexed files, here or remote."""

import os
import threading
from collections import OrderedDict
from typing import Any

from autoencoder.data import remote
from autoencoder.data.index.listed import Listed, as_it_is
from autoencoder.runtime.errors import UsageError, first_line

_OPEN = 64
"""Files that a process keeps open."""


class Ranges:
    """Bytes of `files` by file, offset and length. Travels to another process without its open files; threads take turns."""

    def __init__(self, files: list[Listed], key: str) -> None:
        self._files, self._key = files, key
        self._process, self._lock = os.getpid(), threading.Lock()
        self._handles: OrderedDict[int, int] = OrderedDict()
        self._seen: set[int] = set()

    def read(self, file: int, offset: int, length: int) -> bytes:
        """UsageError where the file cannot be read, or is not the one that was indexed."""
        listed = self._files[file]
        # A lock that another thread holds would stay locked in a fork; files may be read by both.
        if self._process != os.getpid():
            self._process, self._lock = os.getpid(), threading.Lock()
        if remote.is_remote(listed.path):
            data = self._download(file, offset, length)
        else:
            with self._lock:
                data = os.pread(self._handle(file), length, offset)
        if len(data) != length:
            raise UsageError(f"{self._key}: {listed.path} gives {len(data):,} of {length:,} bytes at {offset:,}; check the disk or network")
        return data

    def _handle(self, file: int) -> int:
        listed = self._files[file]
        if file in self._handles:
            self._handles.move_to_end(file)
        else:
            try:
                self._handles[file] = os.open(listed.path, os.O_RDONLY)
            except OSError as error:
                if isinstance(error, FileNotFoundError):
                    listed.check(None, self._key)
                raise UsageError(f"{self._key}: {listed.path} cannot be read: {error.strerror}; make it readable") from error
            if len(self._handles) > _OPEN:
                os.close(self._handles.popitem(last=False)[1])
        listed.check(Listed.of(listed.path, os.fstat(self._handles[file])), self._key)
        return self._handles[file]

    def _download(self, file: int, offset: int, length: int) -> bytes:
        listed = self._files[file]
        try:
            # Once a process: asking for a size takes as long as reading.
            if file not in self._seen:
                listed.check(as_it_is(listed.path), self._key)
                self._seen.add(file)
            return remote.read(listed.path, offset, offset + length)
        except UsageError:
            raise
        # Each file system has errors of its own.
        except Exception as error:
            if isinstance(error, FileNotFoundError):
                listed.check(None, self._key)
            raise UsageError(f"{self._key}: {listed.path} cannot be read: {type(error).__name__}: {first_line(error)}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return Ranges, (self._files, self._key)
