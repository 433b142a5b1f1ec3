"""Files that several processes may write at once: each beside, under a name of the process's own, then renamed. Torch-free."""

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from autoencoder.runtime.errors import ConfigError

STALE = 24 * 3600.0
"""Seconds after which nobody writes a file any more: they take moments."""


def _processes() -> str:
    """What this process has in common with those whose numbers are comparable to its own: machine, boot and container."""
    told = [socket.gethostname()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(), lambda: os.readlink("/proc/self/ns/pid")):
        with suppress(OSError):  # no Linux, or a closed /proc
            told.append(read())
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:12]


_PROCESSES = _processes()
# A number comes again.
_TOKEN = secrets.token_hex(3)
_OF_PROCESS = re.compile(r"\..+\.(?P<processes>[0-9a-f]{12})-(?P<process>\d+)-[0-9a-f]{6}\.partial")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_LET = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR)


def beside(path: Path) -> Path:
    """Where this process writes `path` before it is renamed."""
    return path.with_name(f".{path.name}.{_PROCESSES}-{os.getpid()}-{_TOKEN}.partial")


def is_partial(name: str) -> bool:
    """Whether a file or folder of this name was being written."""
    return name.startswith(".") and name.endswith(".partial")


def abandoned(path: Path, now: float) -> bool:
    """Whether `path` was being written by a process that is no more: one whose number can be asked for, or so long before `now`, a time of
    the clock of its file system, that none is at it."""
    if not is_partial(path.name):
        return False
    found = _OF_PROCESS.fullmatch(path.name)
    if found is None or found["processes"] != _PROCESSES:
        with suppress(FileNotFoundError):
            return now - path.stat().st_mtime > STALE
        return False
    try:
        os.kill(int(found["process"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def remove(path: Path) -> None:
    """Take a file or folder away, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def writing(*paths: Path) -> Iterator[None]:
    """Nothing of what is written beside `paths` outlasts this; ConfigError where the folder takes no more."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*_NO_ROOM, *_NOT_LET, *_IN_THE_WAY):
            raise
        taken = "take away what has its name"
        remedy = "make room" if error.errno in _NO_ROOM else taken if error.errno in _IN_THE_WAY else "see to it that it can be written"
        # Of a rename the second name is the one that is to be.
        name = Path(error.filename2 or paths[0]).name
        raise ConfigError(
            "out", str(paths[0].parent), f"{name} cannot be written ({error.strerror}); {remedy}, then the same command goes on"
        ) from error
    finally:
        for path in paths:
            remove(beside(path))
