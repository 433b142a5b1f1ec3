"""The folder of latents: who may write in it, its frozen plan, and what is done already. Torch-free."""

import fcntl
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from autoencoder.latents.announcing import check_room
from autoencoder.latents.check import MANIFEST, PLAN
from autoencoder.latents.commit import abandoned, beside, is_partial, remove, writing
from autoencoder.latents.place import HERE, Place
from autoencoder.latents.plan import VERSION, Plan, digest
from autoencoder.runtime.errors import ConfigError
from autoencoder.runtime.files import fsync, put
from autoencoder.runtime.lock import LOCK, Before, hold, make_folder, release

VAE = "vae"
PLANNING = ".planning"
"""Locked by who is about to change the plan."""
MADE = (PLAN, VAE, "images-*", "index-*", "buckets-*", "data-*", "*.partial", ".*.partial", PLANNING, LOCK)
"""What a start may have made when it is refused."""


BEFORE_PLAN = ("images-*.parquet", "index-*.arrow", "buckets-*.npy", ".*.partial", PLANNING, LOCK)
"""What a start may have made when it is killed before there is a plan."""


class LatentsFolder:
    """A folder of latents that one process encodes into, or several workers; `notes` says what a user should know of how it goes on."""

    def __init__(self, path: str | Path, *, dry: bool = False, shared: bool = False) -> None:
        """Take hold of a folder that is new, empty or holds latents; a `dry` start makes and changes nothing.

        `shared` with others who say so too; else alone. Raises ConfigError for a folder of something else, one that another process holds,
        or one that cannot be written.
        """
        self.path, self.notes = Path(path), list[str]()
        self._lock: int | None = None
        self._alone = self._froze = False
        self._before: Before | None = None
        if dry and not self.path.exists():
            return
        self._before = make_folder(self.path, "the latents")
        check_names(self._before.names, str(path))
        if not dry:
            self._lock = hold(self.path, self.notes, shared=shared)
            self._alone = not shared and not self.notes
            # Its content has just been written.
            now = (self.path / LOCK).stat().st_mtime
            for leftover in self.path.iterdir():
                if abandoned(leftover, now):
                    remove(leftover)

    def __str__(self) -> str:
        """As the user has given it."""
        return str(self.path)

    @property
    def place(self) -> Place:
        """Where the files are kept."""
        return HERE

    @property
    def alone(self) -> bool:
        """Whether no other process can be at work here."""
        return self._alone

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            release(self._lock)

    def withdraw(self) -> None:
        """After a start that was refused: take away what it has made, unless there are shards or others may be at work."""
        if self._before is None or self._lock is None:
            return
        # What another worker has planned stays, also where it has gone since.
        if not self._alone and not self._froze and (self.path / PLAN).is_file():
            return
        # A worker that was the only one is alone as well. Others who wait for the lock then find the folder gone, and make it.
        alone = self._alone or (not self.notes and _only_holder(self._lock))
        if alone and next(self.path.glob("data-*.json"), None) is None:
            self._before.restore(MADE)

    def plan(self) -> Plan | None:
        """The frozen plan, if there is one; ConfigError where it cannot be read."""
        file = self.path / PLAN
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            version = content["version"]
            if version != VERSION:
                raise ConfigError("out", str(self), f"its {PLAN} has version {version}, this program writes {VERSION}; give another folder")
            told = content.pop("sha256")
            if told != digest(content):
                raise ConfigError(
                    "out", str(self), f"its {PLAN} has been edited (its sha256 does not fit); put it back, or give another folder"
                )
            plan = Plan.from_json(content)
        except FileNotFoundError:
            return None
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError("out", str(self), f"its {PLAN} cannot be read ({error!r}); give another folder") from error
        try:
            return plan.with_buckets(self.path)
        except OSError as error:
            name = Path(error.filename).name
            remedy = f"its {name} cannot be read ({error.strerror}); put it back, or give another folder"
            raise ConfigError("out", str(self), remedy) from error
        except ValueError as error:
            raise ConfigError("out", str(self), f"{error}; put it back, or give another folder") from error

    def has_model(self) -> bool:
        """Whether the autoencoder is kept beside the latents."""
        return (self.path / VAE).is_dir()

    def refresh(self) -> None:
        """See what other processes have done since."""

    def check_room(self, plan: Plan, pending: list[int]) -> None:
        """ConfigError where there is no room for the pending shards."""
        check_room(self.path, plan, pending)

    def where(self, plan: Plan, pending: list[int]) -> str:
        """Where shards are until they are kept, as a line more of the announcement; empty where they are kept where they are written."""
        return ""

    def begun(self, plan: Plan) -> bool:
        """Whether a shard of the plan's last segment is done."""
        return any(self.shard_file(number, "json").is_file() for number in plan.segments[-1].numbers)

    def shard_file(self, number: int, ending: str) -> Path:
        """A file of a shard."""
        return self.path / f"data-{number:05d}.{ending}"

    def freeze(self, plan: Plan, seen: Plan | None, files: Mapping[str, Callable[[Path], object]]) -> bool:
        """Write `plan` down, and by their functions `files` beside it, where the frozen plan still is the one that was `seen`; else False.

        Shards that are not of `plan` go: only who is `alone` may leave segments of `seen` out.
        """
        file = self.path / PLAN
        with writing(file), self.planning():
            if self.plan() != seen:
                return False
            kept = 0 if seen is None else _common(seen, plan)
            if seen is not None and kept < len(seen.segments):
                assert self._alone
                self._clear("data-*", seen.segments[kept].first_shard)
                if not kept:
                    remove(self.path / MANIFEST)
                    remove(self.path / VAE)
            for listing in ("images-*", "index-*", "buckets-*"):
                self._clear(listing, kept)
            for name, write in files.items():
                with writing(self.path / name):
                    write(beside(self.path / name))
                    put(self.path / name, beside(self.path / name))
            beside(file).write_text(json.dumps(plan.to_json(), indent=1), encoding="utf-8")
            if seen is None:
                self._froze = _put_first(file)
                return self._froze
            put(file, beside(file))
        return True

    @contextmanager
    def planning(self) -> Iterator[None]:
        """The plan stays as it is: one process at a time, for a moment. Where files cannot be locked the renames alone must do."""
        lock = os.open(self.path / PLANNING, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def tidy(self) -> None:
        """Once all is done: what processes have left half written goes, whoever's it is."""
        with self.planning():
            for leftover in self.path.iterdir():
                if is_partial(leftover.name):
                    remove(leftover)

    def _clear(self, pattern: str, first: int) -> None:
        """Take away files of shards or segments that are numbered from `first` on."""
        for leftover in self.path.glob(pattern):
            number = leftover.name.partition("-")[2].partition(".")[0]
            if number.isdecimal() and int(number) >= first:
                remove(leftover)


def check_names(names: Collection[str], given: str) -> None:
    """ConfigError where files of these names are not those of latents."""
    if PLAN not in names and not all(any(fnmatch(name, pattern) for pattern in BEFORE_PLAN) for name in names):
        raise ConfigError("out", given, f"a folder with other files and no {PLAN}, so no latents; give a folder that is new or empty")


def _put_first(file: Path) -> bool:
    """Give a file its name unless another process has done so."""
    fsync(beside(file))
    try:
        os.link(beside(file), file)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        put(file, beside(file))
    fsync(file.parent)
    return True


def _common(seen: Plan, plan: Plan) -> int:
    """How many segments of `seen` stay in `plan`."""
    if (seen.recipe, seen.shapes) != (plan.recipe, plan.shapes):
        return 0
    same = [a == b for a, b in zip(seen.segments, plan.segments, strict=False)]
    return next((k for k, equal in enumerate(same) if not equal), len(same))


def _only_holder(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
