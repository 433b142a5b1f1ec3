"""Files that several processes may write at once: each beside, under a name of the process's own, then renamed. Torch-free."""

import errno
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autoencoder.runtime.errors import ConfigError

_HOST = socket.gethostname().replace(".", "_")
# Containers of one host name may have processes of one number.
_TOKEN = secrets.token_hex(3)
_OF_PROCESS = re.compile(r"\..+\.(?P<host>[^.]+)-(?P<process>\d+)-[0-9a-f]{6}\.partial")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_LET = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def beside(path: Path) -> Path:
    """Where this process writes `path` before it is renamed."""
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{_TOKEN}.partial")


def is_partial(name: str) -> bool:
    """Whether a file or folder of this name was being written."""
    return name.startswith(".") and name.endswith(".partial")


def abandoned(name: str) -> bool:
    """Whether `name` was being written by a process of this host that is no more."""
    found = _OF_PROCESS.fullmatch(name)
    if found is None or found["host"] != _HOST:
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
        if error.errno not in (*_NO_ROOM, *_NOT_LET):
            raise
        remedy = "make room" if error.errno in _NO_ROOM else "see to it that it can be written"
        raise ConfigError(
            "out", str(paths[0].parent), f"{paths[0].name} cannot be written ({error.strerror}); {remedy}, then the same command goes on"
        ) from error
    finally:
        for path in paths:
            remove(beside(path))
