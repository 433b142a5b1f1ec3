"""A folder of latents behind a URL: a shard at a time is made in a folder of this machine, and sent. Torch-free."""

import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from autoencoder.data.remote import opened, refused
from autoencoder.latents.announcing import check_room
from autoencoder.latents.check import PLAN
from autoencoder.latents.folder import VAE, LatentsFolder, check_names
from autoencoder.latents.place import Place
from autoencoder.latents.plan import Plan
from autoencoder.latents.store import COMPLETE, Store
from autoencoder.runtime.errors import ConfigError, UsageError
from autoencoder.runtime.lock import LOCK, hold, make_folder, release

LISTINGS = ("images-*", "index-*", "buckets-*")


class RemoteLatents(LatentsFolder):
    """Latents at a URL, as the folder that `path` is until it is closed. Nobody is kept out: there are no locks behind a URL."""

    def __init__(self, url: str, *, staging: str | None, worker: int) -> None:
        """Take hold of the staging folder, and fetch what says how far the latents are.

        Raises ConfigError for a URL that cannot be used or holds something else, and a staging folder that another process holds.
        """
        self._url, self._outer = url.rstrip("/"), _staging(url, staging, worker)
        self._held: int | None = None
        with refused("out", url):
            _, root = opened(url)
        if not root.strip("/"):
            raise ConfigError("out", url, "give a folder for the latents behind it")
        unlocked = list[str]()
        try:
            make_folder(self._outer, "the shards that are being made")
            self._held = hold(self._outer, unlocked)
            here = self._outer / "latents"
            # What a killed process has left may be older than what is there.
            shutil.rmtree(here, ignore_errors=True)
            here.mkdir()
        except ConfigError as error:
            raise ConfigError("staging", str(self._outer), error.remedy) from error
        self._store = Store(self._url, here)
        try:
            self._store.fetch()
            check_names([name.partition("/")[0] for name in self._store.names], url)
            super().__init__(here)
        except BaseException:
            self._give_back()
            raise
        self.notes += unlocked

    def __str__(self) -> str:
        return self._url

    @property
    def place(self) -> Place:
        return self._store

    @property
    def alone(self) -> bool:
        return False

    def close(self) -> None:
        super().close()
        self._give_back()

    def withdraw(self) -> None:
        """What is there stays: others may be at work on it."""

    def has_model(self) -> bool:
        return self._store.has(f"{VAE}/{COMPLETE}")

    def refresh(self) -> None:
        """See what other processes have done since; UsageError where one of them has planned something else."""
        if self._store.content(PLAN) != (self.path / PLAN).read_bytes():
            raise UsageError(f"{self}: {PLAN} is not that of these shards any more: another process has planned here; run the same again")
        self._store.fetch()

    def freeze(self, plan: Plan, seen: Plan | None, files: Mapping[str, Callable[[Path], object]]) -> bool:
        file = self.path / PLAN
        before = None if seen is None else file.read_bytes()
        super().freeze(plan, seen, files)
        if self._store.content(PLAN) == before:
            ours = [path.name for pattern in LISTINGS for path in self.path.glob(pattern)]
            theirs = [name for name in self._store.names if any(fnmatch(name, pattern) for pattern in LISTINGS)]
            self._store.drop(*(name for name in theirs if name not in ours))
            self._store.keep(*(self.path / name for name in files))
            if self._store.exchange(PLAN, before):
                return True
        for name in (PLAN, *files):
            (self.path / name).unlink(missing_ok=True)
        self._store.fetch()
        if not file.is_file():
            raise UsageError(f"{self}: {PLAN} cannot be put there; see to it that objects there can be listed, read and written")
        return False

    def check_room(self, plan: Plan, pending: list[int]) -> None:
        try:
            check_room(self.path, plan, _largest(plan, pending))
        except ConfigError as error:
            raise ConfigError("staging" if error.key == "out" else error.key, error.given, error.remedy) from error

    def where(self, plan: Plan, pending: list[int]) -> str:
        most = sum(map(plan.bytes_of, _largest(plan, pending)))
        most += sum(file.stat().st_size for file in self.path.iterdir())
        return f"\n  staging    {self._outer}, {most / 2**20:,.1f} MiB: one shard at a time, and before the first the autoencoder"

    def _give_back(self) -> None:
        if self._held is not None:
            shutil.rmtree(self._outer / "latents", ignore_errors=True)
            with suppress(OSError):
                (self._outer / LOCK).unlink()
                self._outer.rmdir()
            release(self._held)
            self._held = None


def _staging(url: str, given: str | None, worker: int) -> Path:
    """The same folder for the same worker, whatever became of it before."""
    whose = f"{url.rstrip('/')} {worker} {os.getuid()} {socket.gethostname()}"
    return Path(given or tempfile.gettempdir()) / f"firststage-{hashlib.sha256(whose.encode()).hexdigest()[:12]}"


def _largest(plan: Plan, pending: list[int]) -> list[int]:
    return sorted(pending, key=plan.bytes_of)[-1:]
