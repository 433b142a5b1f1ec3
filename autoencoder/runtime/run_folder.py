"""A run's folder: who may write in it, whether its configuration is still the same, and where to go on. Torch-free."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from autoencoder.runtime.config import count
from autoencoder.runtime.config_file import dotted, plain, read_config, to_yaml
from autoencoder.runtime.errors import ConfigError, UsageError
from autoencoder.runtime.files import replace_text
from autoencoder.runtime.lock import LOCK, Before, hold, make_folder, release

FREE = (
    "log", "checkpoint", "data.workers", "train.max_hours", "train.on_nonfinite", "train.rollbacks", "train.rollback_lr", "sampling", "vae",
)  # fmt: skip
"""Settings and groups that may change between two starts of one run: they do not move its weights, or (what answers values that are
not finite) not before they are needed."""
START = ("out", "resume", "preflight", "allow_vae_mismatch")
"""Settings of a start, not of the run."""
LENGTH = "train.images"
"""May grow: the run is extended."""

CONFIG, FINISHED, METRICS = "config.yaml", "finished.json", "metrics.jsonl"
MADE = (CONFIG, METRICS, "network.json", "bad_images.jsonl", "checkpoints", "images", "tensorboard", ".*.partial", LOCK)
"""What a start may have made when it is refused."""


class _NotGiven:
    def __repr__(self) -> str:
        return "not given"


NOT_GIVEN = _NotGiven()
"""The value of an argument that is not there."""


class RunFolder:
    """A run's folder, held by one process at a time.

    `notes` says what a user should know of how the run goes on; `finished` whether there is nothing left to do.
    """

    def __init__(self, path: Path, images: int, before: Before) -> None:
        self.path, self._images, self._before = path, images, before
        self.notes: list[str] = []
        self._lock = hold(path, self.notes)
        self._alone = not self.notes
        file = path / CONFIG
        self._config = file.read_text() if file.is_file() else None
        self._from = self.newest_checkpoint()

    @classmethod
    def open(cls, path: str | Path, config: Any, *, resume: Literal["auto", "never"]) -> "RunFolder":
        """Take hold of the folder for the run of `config`, a dataclass with `train.images`.

        Empty or new: start, and write `config.yaml`. The same configuration, or one that differs in `FREE`
        settings or a larger `LENGTH`: go on, noted. Raises `UsageError`, naming the settings with old and
        new value, for any other difference; for a used folder where `resume` is `never`; for a folder that
        another process holds, that cannot be written, or that is something else than a run.
        """
        path = Path(path)
        before = make_folder(path, "the run")
        used = before.names - {LOCK, f".{CONFIG}.partial"}
        if used and not (path / CONFIG).is_file():
            raise ConfigError("out", str(path), f"a folder with other files and no {CONFIG}, so no run; give a folder that is new or empty")
        if used and resume == "never":
            raise ConfigError("out", str(path), "a used folder, and resume is `never`; give another folder, or resume=auto to go on")
        run = cls(path, count(config.train.images, LENGTH), before)
        try:
            run._agree(plain(config), _defaults(type(config)))
        except BaseException:
            run.close()
            raise
        return run

    @property
    def finished(self) -> bool:
        """Whether a run at least this long has been finished here."""
        record = self.path / FINISHED
        return record.is_file() and json.loads(record.read_text())["images"] >= self._images

    def newest_checkpoint(self) -> Path | None:
        """The complete checkpoint of the highest step."""
        complete = [marker.parent for marker in self.path.glob("checkpoints/step-*/complete")]
        return max(complete, key=lambda folder: int(folder.name.removeprefix("step-")), default=None)

    @property
    def begun(self) -> bool:
        """Whether there is something to protect: not where every start has failed before its first log line."""
        return (self.path / METRICS).is_file() or self.newest_checkpoint() is not None

    def withdraw(self) -> None:
        """After a start that was refused: what it has made goes, unless the run has begun, and the configuration is what it was,
        unless there are checkpoints under the new one.

        Where the folder could not be locked, all of it stays: it may be another process's.
        """
        if not self._alone:
            return
        if self._config is not None and self.newest_checkpoint() == self._from:
            replace_text(self.path / CONFIG, self._config)
        if not self.begun:
            self._before.restore(MADE)

    def finish(self, record: dict[str, int]) -> None:
        """Write down that the run has ended after `record["images"]` images."""
        replace_text(self.path / FINISHED, json.dumps(record))

    def close(self) -> None:
        """Let other processes have the folder."""
        release(self._lock)

    def _agree(self, new: dict[str, Any], defaults: dict[str, Any]) -> None:
        """Compare with the folder's configuration, refuse or note what changed, and leave the new one there."""
        file = self.path / CONFIG
        # The settings of a run that has not begun may be mended.
        if file.is_file() and self.begun:
            old = {**defaults, **dotted(read_config(file))}
            refused = []
            for key, before, now in _changes(old, dotted(new)):
                change = f"{key}: {before!r} -> {now!r}"
                if key == LENGTH and count(now, key) > count(before, key):
                    self.notes.append(
                        f"{change}, a longer run; what follows its length (schedules) changes from here on{_cut(before, new)}"
                    )
                elif _within(key, FREE):
                    self.notes.append(change)
                elif not _within(key, START):
                    refused.append(change)
            if refused:
                listed = "\n  ".join(refused)
                free = [name for name in FREE if any(_within(key, (name,)) for key in dotted(new))]
                raise UsageError(
                    f"{self.path} holds a run with another configuration:\n  {listed}\ngive another --out, or the old values "
                    f"(all of them: {file}); what may change: {LENGTH} (longer), {', '.join(free)}"
                )
        replace_text(file, to_yaml(new))


def _cut(before: Any, new: dict[str, Any]) -> str:
    """What the shorter run's last batch, where it was not a whole one, leaves out of the longer run."""
    size, images = new["train"].get("batch_size", 1), count(before, LENGTH)
    end = -(-images // size) * size
    return (
        f"; if it had ended, images {images:,} to {end - 1:,} of the stream are left out, as its last batch was not full"
        if end > images
        else ""
    )


def _within(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings that differ, with old and new value; `20k` images are 20000."""

    def values(key: str) -> tuple[Any, Any]:
        # An argument that is left out is at its class's default, whatever that is.
        absent = NOT_GIVEN if ".init_args." in key else None
        return old.get(key, absent), new.get(key, absent)

    def same(key: str) -> bool:
        before, now = values(key)
        if key.endswith("images") and ".init_args." not in key and before is not None and now is not None:
            return count(before, key) == count(now, key)
        return bool(before == now)

    return [(key, *values(key)) for key in {**old, **new} if not same(key)]


def _defaults(config_class: type) -> dict[str, Any]:
    """Dotted defaults: what a configuration written before a setting existed stands for."""
    missing = dataclasses.MISSING
    values = {}
    for f in dataclasses.fields(config_class):
        if f.default is not missing or f.default_factory is not missing:
            values[f.name] = f.default if f.default_factory is missing else f.default_factory()
    return dotted(plain(values))
