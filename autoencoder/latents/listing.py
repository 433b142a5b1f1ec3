"""The images of a segment by name and size: what an append tells images that are there already from others by."""

import hashlib
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from autoencoder.data.sources import Source


@runtime_checkable
class Listed(Source, Protocol):
    """A source whose images have names that stay theirs when others come."""

    def listing(self) -> pyarrow.Table:
        """`name` (binary) and `bytes` (int64) of each image's file, in order."""
        ...


def file_name(segment: int) -> str:
    """The file with the listing of a segment."""
    return f"images-{segment:05d}.parquet"


def index_name(segment: int) -> str:
    """The file by which the source of a segment is opened again."""
    return f"index-{segment:05d}.arrow"


def write_listing(listing: pyarrow.Table, path: Path) -> None:
    """Names in order share beginnings, which takes most of their bytes away."""
    pyarrow.parquet.write_table(
        listing, path, compression="zstd", use_dictionary=False, column_encoding={"name": "DELTA_BYTE_ARRAY", "bytes": "PLAIN"}
    )


def read_listing(path: Path) -> pyarrow.Table | None:
    """The listing in a file; None where there is none that can be read."""
    try:
        return pyarrow.parquet.read_table(path, columns=["name", "bytes"])
    except (OSError, pyarrow.ArrowException):
        return None


def fingerprint(listing: pyarrow.Table) -> str:
    """A digest of names and sizes; of a whole folder the source's own."""
    state = hashlib.sha256()
    for batch in listing.to_batches(max_chunksize=65536):
        for name, size in zip(batch["name"].to_pylist(), batch["bytes"].to_pylist(), strict=True):
            state.update(name + b"\0%d\0" % size)
    return state.hexdigest()


def places(wanted: pyarrow.Table, listing: pyarrow.Table) -> tuple[np.ndarray, np.ndarray]:
    """Where `listing` has the names of `wanted`, -1 where it has not, and whether with another size; (n,) int64 and bool."""
    found = pyarrow.compute.index_in(wanted["name"], value_set=listing["name"].combine_chunks())
    at = pyarrow.compute.fill_null(found, -1).to_numpy().astype(np.int64)
    sizes = listing["bytes"].to_numpy()[at] if len(listing) else np.zeros(len(at), np.int64)
    return at, (at >= 0) & (sizes != wanted["bytes"].to_numpy())
