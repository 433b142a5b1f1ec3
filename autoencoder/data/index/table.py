"""An index: what a source holds, as an Arrow table in memory or mapped from a file."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from autoencoder.runtime.errors import UsageError

VERSION = 2
_CHUNK = 2**14
"""Rows that are Python objects at a time while an index is made."""
_FACTS = b"firststage"


class Index:
    """Columns by row, and `facts` about the whole, which JSON can hold.

    In Arrow's own layout (values one after the other, names as one text with offsets), so that a row costs what its values do. One
    that was opened is a memory-mapped file, whose pages all processes share; it travels to another process as its path.
    """

    def __init__(self, table: pa.Table, facts: dict[str, Any], path: Path | None = None) -> None:
        self.table, self.facts, self._path = table, facts, path
        self._columns = {name: table[name] for name in table.column_names}

    @classmethod
    def open(cls, path: Path) -> "Index":
        """The index in a file; UsageError where it cannot be read as one."""
        try:
            table = map_table(path)
            facts = json.loads(table.schema.metadata[_FACTS])
        except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path} cannot be read as an index: {error}; delete it, and make it again") from error
        if facts["version"] != VERSION:
            raise UsageError(f"{path} is an index of version {facts['version']}, this is for version {VERSION}; make it again")
        return cls(table, facts, path)

    def write(self, path: Path) -> None:
        """Write it as an Arrow IPC file, uncompressed."""
        write_table(self.table.replace_schema_metadata({_FACTS: json.dumps({**self.facts, "version": VERSION})}), path)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def value(self, column: str, row: int) -> Any:
        return self._columns[column][row].as_py()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Index.open, (self._path,)) if self._path is not None else (Index, (self.table, self.facts))


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table as an Arrow IPC file, uncompressed, so that it can be mapped into memory."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def map_table(path: Path) -> pa.Table:
    """The table in an Arrow IPC file, mapped into memory; OSError or ArrowInvalid where it is none."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def table_of(rows: Iterable[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    """The table of `rows`, of whose Python objects few exist at a time."""
    return pa.Table.from_batches(_batches(rows, schema), schema)


def _batches(rows: Iterable[tuple[Any, ...]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    kept: list[tuple[Any, ...]] = []
    for row in rows:
        kept.append(row)
        if len(kept) == _CHUNK:
            yield _batch(kept, schema)
            kept = []
    yield _batch(kept, schema)


def _batch(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.RecordBatch:
    columns = zip(*rows, strict=True) if rows else [[] for _ in schema]
    return pa.record_batch([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema)
