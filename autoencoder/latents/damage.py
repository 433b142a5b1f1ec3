"""What is wrong with the files of a shard: sizes, digests, record, tensors, rows."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from autoencoder.latents.peculiarities import Measured
from autoencoder.latents.reader import LatentsError, Shard, check_shard
from autoencoder.latents.statistics import Moments

MEND = "delete {record} (or give --mend) and run the same encode_dataset command again, which makes this shard again"
TOLERANCE = 1e-6
"""Of a standard deviation: by how much statistics may differ that are computed in another order."""


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it should be."""

    file: str
    what: str
    remedy: str
    shard: int | None = None
    """The shard that is to be made again, if that mends it."""

    def __str__(self) -> str:
        return f"{self.file}: {self.what}; {self.remedy}"


@dataclass
class Looked:
    """A shard after it was read: what is wrong with it, and what its rows are like, where they can be trusted."""

    damage: list[Damage] = field(default_factory=list)
    bytes: int = 0
    moments: Moments | None = None
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    measured: Measured | None = None


def look(folder: Path, manifest: dict[str, Any], number: int) -> Looked:
    """Read the files of shard `number` and compare them with manifest, record and each other."""
    entry, found = manifest["shards"][number], Looked()
    record_file = Path(entry["file"]).with_suffix(".json").name

    def damaged(file: str, what: str, remedy: str = MEND) -> None:
        found.damage.append(Damage(file, what, remedy.format(record=record_file), number))

    contents: dict[str, bytes] = {}
    for told in (entry, entry["table"]):
        name = told["file"]
        try:
            contents[name] = (folder / name).read_bytes()
        except OSError as error:
            damaged(name, f"cannot be read ({error.strerror})")
            continue
        found.bytes += len(contents[name])
        digest = hashlib.sha256(contents[name]).hexdigest()
        if len(contents[name]) != told["bytes"]:
            damaged(name, f"{len(contents[name]):,} bytes, the manifest says {told['bytes']:,}")
        elif digest != told["sha256"]:
            damaged(name, f"its bytes have changed: SHA-256 {digest[:16]}..., the manifest says {told['sha256'][:16]}...")
    record = _record(folder / record_file, damaged)
    if record is not None:
        for what in _disagreements(record, entry, manifest, number):
            damaged(record_file, what)
    if found.damage:
        return found
    shard = Shard(folder / entry["file"])
    classes = None if manifest["labels"] is None else len(manifest["labels"])
    try:
        shard.load(np.frombuffer(contents[entry["file"]], np.uint8))
        check_shard(shard, entry, has_logvar="logvar" in manifest["contents"], classes=classes)
    except LatentsError as error:
        what = str(error).removeprefix(f"{shard.path}: ").partition("; ")[0]
        damaged(entry["file"], what, "mend the source's labels and encode again" if " has label " in what else MEND)
        return found
    _check_rows(shard.tensors, entry, record, contents[entry["table"]["file"]], damaged)
    if not found.damage:
        mean, logvar = shard.tensors["mean"], shard.tensors.get("logvar")
        found.ids = np.array(shard.tensors["id"])
        found.moments = Moments.of(mean, logvar)
        found.measured = Measured.of(mean, logvar, manifest["statistics"])
        if record is not None and not _same_moments(found.moments, Moments.from_json(record["moments"])):
            damaged(record_file, "its moments are not those of the rows")
    return found


def _same_moments(found: Moments, told: Moments) -> bool:
    # A shard whose images are all unreadable has no rows, and so no statistics.
    if not found.count or found.count != told.count:
        return found.count == told.count
    return deviation(found.statistics(), told.statistics()) <= TOLERANCE


def deviation(found: dict[str, Any], told: dict[str, Any]) -> float:
    """The largest difference of two statistics' means and standard deviations, in standard deviations of the channel."""
    std = np.maximum(np.array(found["std"]), np.finfo(np.float64).tiny)
    return float(max(np.max(np.abs(np.subtract(found[name], told[name])) / std) for name in ("mean", "std")))


def segment_of(manifest: dict[str, Any], shard: int) -> dict[str, Any]:
    """The segment of the data set that a shard is of."""
    found: dict[str, Any] = next(s for s in reversed(manifest["segments"]) if s["first_shard"] <= shard)
    return found


def _record(file: Path, damaged: Any) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for key in ("files", "rows", "first_row", "last_row", "recipe_hash", "fingerprint", "shape", "bad"):
            record[key]
        Moments.from_json(record["moments"])
    except FileNotFoundError:
        damaged(file.name, "is missing", "run the same encode_dataset command again, which makes this shard again")
    except (OSError, ValueError, KeyError, TypeError) as error:
        damaged(file.name, f"cannot be read ({error!r})")
    else:
        return record
    return None


def _disagreements(record: dict[str, Any], entry: dict[str, Any], manifest: dict[str, Any], number: int) -> list[str]:
    """What the record says otherwise than the manifest."""
    table = entry["table"]
    wanted = {
        "rows": entry["rows"],
        "shape": entry["shape"],
        "recipe_hash": manifest["recipe_hash"],
        "fingerprint": segment_of(manifest, number)["source"]["fingerprint"],
        "files": {told["file"]: {key: told[key] for key in ("bytes", "sha256")} for told in (entry, table)},
    }
    return [f"`{key}` is {record[key]!r}, the manifest says {value!r}" for key, value in wanted.items() if record[key] != value]


def _check_rows(tensors: dict[str, np.ndarray], entry: dict[str, Any], record: dict[str, Any] | None, table: bytes, damaged: Any) -> None:
    ids = tensors["id"]
    for name in ("mean", "logvar"):
        finite = np.isfinite(tensors[name]).reshape(len(ids), -1).all(1) if name in tensors and len(ids) else np.ones(1, bool)
        if not finite.all():
            place = int(np.argmin(finite))
            damaged(entry["file"], f"{name} of row {place} (id {ids[place]}) is not finite")
    if (np.diff(ids) <= 0).any():
        damaged(entry["file"], "its ids do not ascend")
    if record is not None and len(ids) and not record["first_row"] <= ids.min() <= ids.max() <= record["last_row"]:
        damaged(entry["file"], f"ids {ids.min()} to {ids.max()}, the record says {record['first_row']} to {record['last_row']}")
    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(table), columns=["row"])["row"].to_numpy()
    except (pyarrow.ArrowException, KeyError) as error:
        damaged(entry["table"]["file"], f"cannot be read ({error})")
        return
    if not np.array_equal(rows, ids):
        damaged(entry["table"]["file"], f"its rows are not those of {entry['file']}")
