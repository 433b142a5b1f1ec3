"""One shard: latents, side table and record, committed so that a record means that both are whole."""

import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from safetensors.numpy import save

from autoencoder.latents.commit import beside, writing
from autoencoder.latents.place import HERE, Place
from autoencoder.latents.plan import Plan, digest
from autoencoder.latents.reader import LatentsError, Shard
from autoencoder.latents.statistics import Moments
from autoencoder.runtime.errors import TrainingError
from autoencoder.runtime.files import put


@dataclass(frozen=True)
class Encoded:
    """A shard's rows before they are written; rows of bad images are left out of all but `bad`."""

    tensors: dict[str, np.ndarray]
    """`mean` and perhaps `logvar` (n, c, h, w) in the stored dtype, `label` and `id` (n,) int64."""
    table: pyarrow.Table
    bad: list[dict[str, Any]]
    """`image`, `name`, `reason`, `rows` (first and last) of each unreadable image."""


def names(shard: int) -> tuple[str, str, str]:
    """File names of a shard's latents, side table and record."""
    return f"data-{shard:05d}.safetensors", f"data-{shard:05d}.parquet", f"data-{shard:05d}.json"


def write(folder: Path, plan: Plan, shard: int, encoded: Encoded, place: Place = HERE) -> dict[str, Any]:
    """Commit a shard and return its record. What is written is a function of the arguments alone: no times, no names of machines.

    Each file is written beside, on the disk and looked at again before it gets its name; the record comes last. Where another process
    has committed the same shard meanwhile, what it wrote stays. Raises ConfigError where the disk is full.
    """
    latents, table, record = (folder / name for name in names(shard))
    try:
        with writing(latents, table, record):
            return _write(latents, table, record, plan, shard, encoded, place)
    except (FileNotFoundError, LatentsError) as error:
        # Who finds all shards done takes away what is left half written: then this one is.
        done = read_record(folder, plan, shard, place)
        if done is None:
            raise TrainingError(f"{latents} could not be written ({error}); check the disk, and run the same command again") from error
        return done


def _write(latents: Path, table: Path, record: Path, plan: Plan, shard: int, encoded: Encoded, place: Place) -> dict[str, Any]:
    # Several keys of metadata would come out in random order.
    tensors = {name: np.ascontiguousarray(value) for name, value in encoded.tensors.items()}
    beside(latents).write_bytes(save(tensors, metadata={"encoder_hash": plan.recipe["encoder_hash"]}))
    _check_written(beside(latents), tensors)
    in_memory = io.BytesIO()
    pyarrow.parquet.write_table(encoded.table, in_memory, compression="zstd")
    beside(table).write_bytes(in_memory.getbuffer())
    rows = plan.shard(shard)
    told: dict[str, Any] = {
        "shard": shard,
        "first_row": rows[0],
        "last_row": rows[-1],
        "rows": len(tensors["id"]),
        "shape": list(tensors["mean"].shape[1:]),
        "recipe_hash": plan.recipe_hash,
        "fingerprint": plan.segment_of(shard).source["fingerprint"],
        "files": {path.name: _size_and_digest(beside(path)) for path in (latents, table)},
        "moments": Moments.of(tensors["mean"], tensors.get("logvar")).to_json(),
        "bad": encoded.bad,
    }
    told["sha256"] = digest(told)
    # Of two who did it on unlike hardware the first stays: its files are not to be mixed with others.
    place.look(record, latents, table)
    if (done := read_record(latents.parent, plan, shard, place)) is not None:
        return done
    put(latents, beside(latents))
    put(table, beside(table))
    place.keep(latents, table)
    beside(record).write_text(json.dumps(told, indent=1), encoding="utf-8")
    put(record, beside(record))
    place.keep(record)
    return told


def read_record(folder: Path, plan: Plan, shard: int, place: Place = HERE) -> dict[str, Any] | None:
    """The record of a shard that is done: it is whole, of this plan, and its files have the recorded sizes. Else None."""
    try:
        record: dict[str, Any] = json.loads((folder / names(shard)[2]).read_text(encoding="utf-8"))
        content = {key: value for key, value in record.items() if key != "sha256"}
        rows, fingerprint = plan.shard(shard), plan.segment_of(shard).source["fingerprint"]
        wanted = (shard, plan.recipe_hash, fingerprint, rows[0], rows[-1], digest(content))
        told = tuple(record[key] for key in ("shard", "recipe_hash", "fingerprint", "first_row", "last_row", "sha256"))
        whole = all(place.size(folder / name) == record["files"][name]["bytes"] for name in names(shard)[:2])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if whole and told == wanted else None


def read_records(folder: Path, plan: Plan, place: Place = HERE) -> dict[int, dict[str, Any]]:
    """The records of all shards that are done."""
    return {n: record for n in range(plan.shards) if (record := read_record(folder, plan, n, place)) is not None}


def _check_written(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Reopen a file, and compare what is there with what should be."""
    written = Shard(path)
    written.open()
    for name, wanted in tensors.items():
        # Equal to itself: a value that is not a number is refused as well.
        if not np.array_equal(written.tensors[name], wanted):
            raise TrainingError(f"{path}: {name} was not written as it was encoded; check the disk, and run the same command again")


def _size_and_digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
