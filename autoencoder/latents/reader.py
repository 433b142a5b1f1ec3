"""Read a folder of latents that `encode_dataset` made: this one file, numpy and torch are enough. Copy it beside a trainer of your own.

    latents = Latents("LATENTS")
    rows = latents.gather([3, 1, 2])                       # float32 arrays (N, c, h, w)
    z = rows.mean + np.exp(0.5 * rows.logvar) * noise      # a draw from the posterior
    z = (z - latents.mean[:, None, None]) / latents.std[:, None, None]

Format: docs/latents-format.md.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

FORMAT, VERSION, MANIFEST = "firststage-latents", 2, "manifest.json"
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I64": np.dtype("<i8")}

_AGAIN = "copy it again, or delete it and run the same encode_dataset command again"


class LatentsError(ValueError):
    """A folder of latents that is incomplete, damaged or not as its manifest says; the message says what to do."""


@dataclass(frozen=True)
class Rows:
    """Rows of a data set of latents, in the order that was asked for."""

    mean: np.ndarray
    """(N, c, h, w) float32: the posterior's means, not normalised."""
    logvar: np.ndarray | None
    """(N, c, h, w) float32: its log-variances; None where only means were stored."""
    label: np.ndarray
    """(N,) int64; -1 where there is none."""
    id: np.ndarray
    """(N,) int64: the row's number in the plan; image = id // rows_per_image."""


class Latents(Dataset[dict[str, torch.Tensor]]):
    """The rows of `folder`, memory-mapped: 0 .. len - 1 in the order of the plan, rows of unreadable images left out.

    Raises LatentsError for a folder that was not finished, a manifest of another version or edited by hand, shards that are
    missing, of another size or of differing shapes, and labels outside the manifest's table. Picklable: a copy opens the files again.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.shape: tuple[int, int, int] = tuple(self.manifest["shapes"][0])
        self.labels: list[str] | None = self.manifest["labels"]
        self.has_logvar = "logvar" in self.manifest["contents"]
        self.rows_per_image: int = self.manifest["rows_per_image"]
        # float64 (c,): (z - mean) / std has zero mean and unit variance in every channel, over draws from the posteriors.
        self.mean = np.array(self.manifest["statistics"]["mean"], dtype=np.float64)
        self.std = np.array(self.manifest["statistics"]["std"], dtype=np.float64)
        self._shards = [Shard(self.folder / entry["file"]) for entry in self.manifest["shards"]]
        self._check()
        self._starts = np.cumsum([0, *(shard.rows for shard in self._shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def gather(self, rows: Sequence[int] | np.ndarray) -> Rows:
        """The rows with these numbers, read in the order of the files; IndexError for a number outside 0 .. len - 1.

        Raises LatentsError naming shard and row where a value is not finite.
        """
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"row {wanted.min() if wanted.min() < 0 else wanted.max()} of {len(self)}")
        names = ("mean", "logvar", "label", "id") if self.has_logvar else ("mean", "label", "id")
        found = {name: np.empty((len(wanted), *(self.shape if name in ("mean", "logvar") else ())), np.float32) for name in names}
        found |= {name: np.empty(len(wanted), np.int64) for name in ("label", "id")}
        order = np.argsort(wanted, kind="stable")
        ordered = wanted[order]
        cuts = np.searchsorted(ordered, self._starts)
        for shard, start, first, last in zip(self._shards, self._starts, cuts, cuts[1:], strict=False):
            if first == last:
                continue
            local = ordered[first:last] - start
            for name in names:
                values = shard.tensors[name][local]
                if not np.isfinite(values).all():
                    row = local[np.argmin(np.isfinite(values).reshape(len(values), -1).all(1))]
                    raise LatentsError(f"{shard.path}: {name} of row {row} is not finite; {_AGAIN}")
                found[name][order[first:last]] = values
        return Rows(found["mean"], found.get("logvar"), found["label"], found["id"])

    def labels_of(self) -> np.ndarray:
        """The labels of all rows, (N,) int64."""
        return np.concatenate([shard.tensors["label"] for shard in self._shards])

    @property
    def ids(self) -> np.ndarray:
        """The ids of all rows, (N,) int64, ascending."""
        return np.concatenate([shard.tensors["id"] for shard in self._shards])

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[dict[str, torch.Tensor]]:
        """What a DataLoader takes for a batch: `mean`, `logvar` where stored, `label` and `id` of each row."""
        got = self.gather(rows)
        columns = {name: torch.from_numpy(values) for name, values in vars(got).items() if values is not None}
        return [{name: values[i] for name, values in columns.items()} for i in range(len(rows))]

    def __getstate__(self) -> Path:
        return self.folder

    def __setstate__(self, folder: Path) -> None:
        self.__init__(folder)  # type: ignore[misc]

    def _check(self) -> None:
        names = {"mean": self.shape, **({"logvar": self.shape} if self.has_logvar else {}), "label": (), "id": ()}
        for shard, entry in zip(self._shards, self.manifest["shards"], strict=True):
            here, there = (s.shapes.get("mean", (0, *self.shape))[1:] for s in (shard, self._shards[0]))
            if here != there:
                raise LatentsError(f"{shard.path}: latents of shape {here}, but {self._shards[0].path.name} has {there}; {_AGAIN}")
            for name, shape in names.items():
                wanted = (entry["rows"], *shape)
                if shard.shapes.get(name) != wanted:
                    held = shard.shapes.get(name, "no such tensor")
                    raise LatentsError(f"{shard.path}: {name}: {held}, the manifest says {wanted}; {_AGAIN}")
            if shard.bytes != entry["bytes"]:
                raise LatentsError(f"{shard.path}: {shard.bytes} bytes, the manifest says {entry['bytes']}; {_AGAIN}")
            shard.open()
            self._check_labels(shard)

    def _check_labels(self, shard: "Shard") -> None:
        label = shard.tensors["label"]
        outside = label < -1 if self.labels is None else (label < -1) | (label >= len(self.labels))
        if outside.any():
            row = int(np.argmax(outside))
            table = "labels are -1 (none) or more" if self.labels is None else f"the table has {len(self.labels)} classes"
            raise LatentsError(f"{shard.path}: row {row} has label {label[row]}, but {table}; mend the source's labels and encode again")


class Shard:
    """A safetensors file: an 8-byte length, a JSON header, the tensors' bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self.bytes = file.seek(0, 2)
                file.seek(8)
                header = file.read(length) if length <= self.bytes - 8 else None
        except OSError as error:
            raise LatentsError(f"{path}: cannot be read ({error.strerror}); {_AGAIN}") from error
        if header is None:
            raise LatentsError(f"{path}: {self.bytes} bytes, shorter than its header; {_AGAIN}")
        try:
            self._tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
            self.shapes = {name: tuple(entry["shape"]) for name, entry in self._tensors.items()}
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise LatentsError(f"{path}: not a safetensors file; {_AGAIN}") from error
        self._offset = 8 + length
        self.rows = self.shapes.get("id", (0,))[0]
        self.tensors: dict[str, np.ndarray] = {}

    def open(self) -> None:
        """Map the tensors into memory, read-only; LatentsError for one that ends beyond the file or is not as its header says."""
        try:
            self._map()
        except OSError as error:
            remedy = "allow more open files (`ulimit -n`): each shard takes one" if error.errno == 24 else _AGAIN
            raise LatentsError(f"{self.path}: cannot be mapped into memory ({error.strerror}); {remedy}") from error
        except (TypeError, KeyError) as error:
            raise LatentsError(f"{self.path}: damaged header ({error!r}); {_AGAIN}") from error

    def _map(self) -> None:
        raw = np.memmap(self.path, dtype=np.uint8, mode="r")
        for name, entry in self._tensors.items():
            first, last = (self._offset + offset for offset in entry["data_offsets"])
            if entry["dtype"] not in _DTYPES:
                raise LatentsError(f"{self.path}: {name} has dtype {entry['dtype']}; this reader knows {', '.join(_DTYPES)}")
            if last > self.bytes:
                raise LatentsError(f"{self.path}: {self.bytes} bytes, but {name} ends at {last}; {_AGAIN}")
            if last - first != _DTYPES[entry["dtype"]].itemsize * math.prod(entry["shape"]):
                raise LatentsError(f"{self.path}: {name} has {last - first} bytes, not those of its shape; {_AGAIN}")
            self.tensors[name] = np.asarray(raw[first:last]).view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`; LatentsError where it is missing, edited or of a version that this reader does not know."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LatentsError(f"{folder}: no {MANIFEST}, so not finished; run the same encode_dataset command again") from error
    except (OSError, ValueError) as error:
        raise LatentsError(f"{path}: cannot be read ({error}); run encode_dataset again, which rewrites it from the records") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise LatentsError(f"{path}: not the manifest of latents (no `format: {FORMAT}`); give a folder that encode_dataset made")
    if manifest.get("version") != VERSION:
        raise LatentsError(f"{path}: version {manifest.get('version')}, this reader knows {VERSION}; take the reader of that version")
    if manifest.get("sha256") != manifest_digest(manifest):
        raise LatentsError(
            f"{path}: edited since it was written (its sha256 does not fit); run encode_dataset again, which rewrites it from the records"
        )
    return manifest


def manifest_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 over the manifest without its own `sha256`, as JSON with sorted keys and without spaces."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
