"""A folder that one process at a time writes in, and that a refused start leaves as it was. Torch-free."""

import fcntl
import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from autoencoder.runtime.errors import ConfigError

LOCK = ".lock"


@dataclass(frozen=True)
class Before:
    """What there was of a folder when a start took it."""

    path: Path
    names: frozenset[str]
    """What it held."""
    missing: tuple[Path, ...]
    """Itself and those above it that did not exist, from the inside out."""

    def restore(self, ours: Sequence[str]) -> None:
        """Take away what has come since of the names `ours` (shell patterns): what was there stays, and so does what is someone else's. The
        lock goes last, so that no other process is let in while others go."""
        came = {entry.name for entry in self.path.iterdir()} - self.names
        for name in sorted(came, key=lambda name: name == LOCK):
            entry = self.path / name
            if not any(fnmatch(name, pattern) for pattern in ours):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        for folder in self.missing:
            try:
                folder.rmdir()
            except OSError:  # someone else's file is there
                return


def make_folder(path: Path, purpose: str) -> Before:
    """Make the folder given as `out` where it is not there yet; returns what there was. ConfigError where that cannot be done."""
    if not str(path).strip() or path == Path():
        raise ConfigError("out", str(path), f"give a folder for {purpose}")
    if path.exists() and not path.is_dir():
        raise ConfigError("out", str(path), f"a file; give a folder for {purpose}")
    try:
        missing = tuple(folder for folder in (path, *path.parents) if not folder.exists())
        path.mkdir(parents=True, exist_ok=True)
        return Before(path, frozenset(entry.name for entry in path.iterdir()), missing)
    except OSError as error:
        raise ConfigError("out", str(path), f"cannot be made or read ({error.strerror}); give a folder that can be written") from error


def hold(path: Path, notes: list[str], *, shared: bool = False) -> int:
    """A lock on the folder, exclusive or `shared` with those who ask for it so, which ends with this process at the latest; `notes` gets
    one where it cannot be locked.

    Raises ConfigError where another process holds it, or where it cannot be written.
    """
    try:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError("out", str(path), f"cannot be written ({error.strerror}); give a folder that can be written") from error
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(lock)
        raise ConfigError("out", str(path), f"in use by {holder}; wait for it, stop it, or give another folder") from error
    except OSError as error:
        notes.append(f"{path} cannot be locked ({error.strerror}): see to it that no other process writes there")
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError:  # a full disk: it is only what others read
        pass
    _held.append(lock)
    return lock


def release(lock: int) -> None:
    """Let other processes have the folder; a second time does nothing."""
    if lock in _held:
        _held.remove(lock)
        os.close(lock)


_held: list[int] = []


def _release_in_child() -> None:
    # Else loader workers that outlive a killed run for some seconds would hold its lock.
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)
