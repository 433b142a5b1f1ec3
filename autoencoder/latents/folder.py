"""The folder of latents: who may write in it, whether its plan is still the same, and what is done already. Torch-free."""

import json
import shutil
from pathlib import Path

from autoencoder.latents.check import MANIFEST, PLAN
from autoencoder.latents.plan import VERSION, Plan
from autoencoder.runtime.errors import ConfigError, UsageError
from autoencoder.runtime.files import partial, put
from autoencoder.runtime.lock import LOCK, Before, hold, make_folder, release

VAE = "vae"
MADE = (PLAN, VAE, "data-*", "*.partial", ".*.partial", LOCK)
"""What a start may have made when it is refused."""


class LatentsFolder:
    """A folder of latents that one process at a time encodes into; `notes` says what a user should know of how it goes on."""

    def __init__(self, path: str | Path, *, dry: bool = False) -> None:
        """Take hold of a folder that is new, empty or holds latents; a `dry` start makes and changes nothing.

        Raises ConfigError for a folder of something else, one that another process holds, or one that cannot be written.
        """
        self.path, self.notes = Path(path), list[str]()
        self._lock: int | None = None
        self._alone = False
        self._before: Before | None = None
        if dry and not self.path.exists():
            return
        self._before = make_folder(self.path, "the latents")
        used = {name for name in self._before.names if name != LOCK and not _is_partial(name)}
        if used and not (self.path / PLAN).is_file():
            raise ConfigError(
                "out", str(path), f"a folder with other files and no {PLAN}, so no latents; give a folder that is new or empty"
            )
        if not dry:
            self._lock = hold(self.path, self.notes)
            self._alone = not self.notes
            for leftover in self.path.iterdir():
                if _is_partial(leftover.name):
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            release(self._lock)

    def withdraw(self) -> None:
        """After a start that was refused: take away what it has made, unless there are shards, or the folder could not be locked."""
        if self._before is not None and self._alone and not self._begun():
            self._before.restore(MADE)

    def _begun(self) -> bool:
        return next(self.path.glob("data-*.json"), None) is not None

    def agree(self, plan: Plan) -> Plan:
        """The plan that the folder's shards are of, which is `plan` where there are none yet.

        Raises UsageError, naming what differs, where `plan` would give other rows.
        """
        file = self.path / PLAN
        # A start that failed before its first shard has nothing to protect: its settings may be mended.
        if not self._begun():
            return plan
        frozen = self._read(file)
        differences = frozen.differences(plan)
        if differences:
            listed = "\n  ".join(f"{key}: {_short(old)} -> {_short(new)}" for key, old, new in differences)
            raise UsageError(
                f"{self.path} holds latents of another plan:\n  {listed}\n"
                f"give another --out, or the old values (all of them: {file}); what may change: data.workers, data.max_bad"
            )
        if frozen.decoder_hash != plan.decoder_hash:
            self.notes.append(
                f"note: the autoencoder's decoder has changed since these latents were begun: decoder_hash {frozen.decoder_hash} -> "
                f"{plan.decoder_hash}; {self.path / VAE} keeps the first one"
            )
        changed = [f"{k}: {v} -> {plan.made_with.get(k)}" for k, v in frozen.made_with.items() if plan.made_with.get(k) != v]
        if changed and not (self.path / MANIFEST).is_file():
            self.notes.append(f"note: shards encoded from here on may differ in their last bits ({', '.join(changed)})")
        return frozen

    def freeze(self, plan: Plan) -> None:
        """Write `plan` down, before the first shard; what a failed start with another one left goes."""
        file, text = self.path / PLAN, json.dumps(plan.to_json(), indent=1)
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            return
        (self.path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.path / VAE, ignore_errors=True)
        for leftover in self.path.glob("data-*"):
            leftover.unlink()
        partial(file).write_text(text, encoding="utf-8")
        put(file)

    def _read(self, file: Path) -> Plan:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            version = content["version"]
            frozen = Plan.from_json(content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError("out", str(self.path), f"its {PLAN} cannot be read ({error!r}); give another folder") from error
        if version != VERSION:
            raise ConfigError(
                "out", str(self.path), f"its {PLAN} has version {version}, this program writes {VERSION}; give another folder"
            )
        return frozen


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(".partial")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
