"""One shard: latents, side table and record, committed so that a record means that both are whole."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from safetensors.numpy import save

from autoencoder.latents.plan import Plan
from autoencoder.latents.reader import Shard
from autoencoder.latents.statistics import Moments
from autoencoder.runtime.errors import TrainingError
from autoencoder.runtime.files import partial, put


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


def write(folder: Path, plan: Plan, shard: int, encoded: Encoded) -> dict[str, Any]:
    """Commit a shard and return its record. What is written is a function of the arguments alone: no times, no names of machines."""
    latents, table, record = (folder / name for name in names(shard))
    # Several keys of metadata would come out in random order.
    tensors = {name: np.ascontiguousarray(value) for name, value in encoded.tensors.items()}
    partial(latents).write_bytes(save(tensors, metadata={"encoder_hash": plan.recipe["encoder_hash"]}))
    _check_written(partial(latents), tensors)
    pyarrow.parquet.write_table(encoded.table, partial(table), compression="zstd")
    rows = plan.shard(shard)
    told = {
        "shard": shard,
        "first_row": rows.start,
        "last_row": rows.stop - 1,
        "rows": len(tensors["id"]),
        "shape": list(plan.shape),
        "fingerprint": plan.source["fingerprint"],
        "recipe_hash": plan.recipe_hash,
        "files": {path.name: _size_and_digest(partial(path)) for path in (latents, table)},
        "moments": Moments.of(tensors["mean"], tensors.get("logvar")).to_json(),
        "bad": encoded.bad,
    }
    put(latents)
    put(table)
    partial(record).write_text(json.dumps(told, indent=1), encoding="utf-8")
    put(record)
    return told


def read_record(folder: Path, plan: Plan, shard: int) -> dict[str, Any] | None:
    """The record of a shard that is done: it is of this plan, and its files have the recorded sizes. Else None."""
    try:
        record: dict[str, Any] = json.loads((folder / names(shard)[2]).read_text(encoding="utf-8"))
        whole = all(os.stat(folder / name).st_size == record["files"][name]["bytes"] for name in names(shard)[:2])
        rows = plan.shard(shard)
        ours = (record["recipe_hash"], record["first_row"], record["last_row"]) == (plan.recipe_hash, rows.start, rows.stop - 1)
        ours = ours and record["fingerprint"] == plan.source["fingerprint"]
        Moments.from_json(record["moments"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole and ours else None


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
