"""The space in which a run diffuses: which encoder's latents, normalised how, with which classes. Frozen at a run's first start."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoencoder.identity import Identity, check_identity
from autoencoder.latents.reader import Latents
from autoencoder.runtime.errors import ConfigError, UsageError
from autoencoder.runtime.files import replace_text
from diffusion.config import MOST_CLASSES

FILE = "latents.json"


@dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """What stays the same from a run's first step to its pipeline."""

    encoder_hash: str
    decoder_hash: str
    rows_hash: str
    """Equal for data sets of equal rows: of the recipe and of what it was applied to."""
    shape: tuple[int, int, int]
    """(c, h, w)."""
    mean: list[float]
    """Per channel, over draws from the posteriors of all rows."""
    std: list[float]
    """Per channel, likewise."""
    rows: int
    """Rows of the data set when the run began."""
    labels: list[str] | None
    """Class names by label; None for a run without classes."""

    @property
    def identity(self) -> Identity:
        """The autoencoder of these latents."""
        return Identity(self.encoder_hash, self.decoder_hash)

    @property
    def classes(self) -> int:
        """Number of classes, 0 for none."""
        return 0 if self.labels is None else len(self.labels)

    def normalize(self, moments: Tensor) -> Tensor:
        """Latents as the encoder gives them, (B, c, h, w), to latents of zero mean and unit variance in each channel."""
        mean, std = self._columns(moments)
        return (moments - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, c, h, w) to what the decoder takes."""
        mean, std = self._columns(latents)
        return latents * std + mean

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return mean, std

    def save(self, folder: Path) -> None:
        """Write it down in a run's folder."""
        replace_text(folder / FILE, json.dumps(asdict(self), indent=1))


def of_side(latents: Latents, side: int | None) -> Latents:
    """The rows of square latents of this side, of None all; ConfigError where there are none."""
    if side is None:
        return latents
    shape = next((shape for shape in latents.shapes if shape[1:] == (side, side)), None)
    if shape is None:
        listed = ", ".join(map(str, latents.shapes))
        raise ConfigError("data.side", side, f"{latents.folder} has latents of {listed}; give the side of square ones")
    return latents.of_shape(shape)


def of_latents(latents: Latents, *, conditional: bool) -> LatentSpace:
    """The space of a data set of latents, as of now.

    Raises:
        ConfigError: rows of several shapes, more classes than a stock pipeline holds, or a channel that never varies.
    """
    if len(latents.shapes) > 1:
        listed = ", ".join(map(str, latents.shapes))
        raise ConfigError("latents", str(latents.folder), f"rows of shapes {listed}; a pipeline has one: give data.side, or encode to one")
    classes = _classes(latents) if conditional else 0
    if classes > MOST_CLASSES:
        raise ConfigError(
            "latents",
            f"{classes} classes",
            f"a stock DiT pipeline holds {MOST_CLASSES} at most (its null class is number {MOST_CLASSES}); merge classes, "
            "or train without them: conditioning.classes=none",
        )
    flat = [i for i, std in enumerate(latents.std.tolist()) if not std > 0]
    if flat:
        raise ConfigError(
            "latents", str(latents.folder), f"latent channel {flat[0]} never varies and cannot be normalised; train the autoencoder anew"
        )
    manifest = latents.manifest
    return LatentSpace(
        encoder_hash=manifest["encoder_hash"],
        decoder_hash=manifest["decoder_hash"],
        rows_hash=manifest["rows_hash"],
        shape=latents.shape,
        mean=latents.mean.tolist(),
        std=latents.std.tolist(),
        rows=len(latents),
        labels=(latents.labels or [str(i) for i in range(classes)]) if classes else None,
    )


def _classes(latents: Latents) -> int:
    """How many classes there are: names in the table, or numbers from 0 to the largest label; none where no row has a label."""
    largest = int(latents.labels_of().max(initial=-1))
    return 0 if largest < 0 else largest + 1 if latents.labels is None else len(latents.labels)


def load(folder: Path) -> LatentSpace:
    """The space that a run began with; UsageError where its file is missing or damaged."""
    path = folder / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return LatentSpace(**{**values, "shape": tuple(values["shape"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); without it the run cannot go on: start a new one") from error


def agree(frozen: LatentSpace, now: LatentSpace, *, allow: bool) -> list[str]:
    """Compare what a run began with, and what its latents are now; notes for the log.

    Raises:
        ConfigError: latents of another encoder (unless `allow`), shape or class table.
    """
    notes = check_identity(frozen.identity, now.identity, key="latents", what="this run", allow=allow, other="these latents")
    if frozen.shape != now.shape:
        raise ConfigError("latents", now.shape, f"the run began with latents of shape {frozen.shape}; give those, or a new --out")
    if frozen.labels != now.labels:
        other = next((name for name in now.labels or [] if name not in (frozen.labels or [])), "in another order or fewer")
        raise ConfigError(
            "latents",
            f"{now.classes} classes",
            f"the run began with a table of {frozen.classes} (first difference: {other}); give those latents, or a new --out",
        )
    if (frozen.rows_hash, frozen.rows) != (now.rows_hash, now.rows):
        notes.append(
            f"warning: the latents have changed since this run began ({frozen.rows:,} rows then, {now.rows:,} now); it keeps the "
            "normalisation that it began with, and is no longer bitwise an unbroken run"
        )
    return notes
