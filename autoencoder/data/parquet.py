"""Images in parquet files, here or remote, read a row group at a time where they lie."""

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from autoencoder.data import columns, remote
from autoencoder.data.index.listed import Listed, as_it_is
from autoencoder.data.index.opening import files_of, files_told, fingerprint, opened_or_made, stat_files, told
from autoencoder.data.index.table import Index, table_of
from autoencoder.data.order import Blocks
from autoencoder.data.paths import Location
from autoencoder.data.sources import Record
from autoencoder.data_config import DataConfig
from autoencoder.pixel_recipe import recipe_of
from autoencoder.runtime.errors import ConfigError, UsageError, first_line, sibling

KEPT = 2**29
"""Bytes of row groups that a process keeps."""
SHUFFLED = 2**28
"""Bytes of row groups that training shuffles images among: half, as the next window begins before all of the last has been read."""
_OPEN = 16
"""Files that a process keeps open: a footer of thousands of row groups takes megabytes."""
_SCHEMA = pa.schema([("file", pa.int32()), ("group", pa.int32()), ("rows", pa.int64()), ("bytes", pa.int64())])


class ParquetSource:
    """The rows of parquet files with a column of encoded images; an image's id is its row and, where known, its file name.

    Reading an image reads its row group's image and label columns, and the last row groups are kept: images are quick in the order of
    `blocks`, and in that of their rows.
    """

    in_memory = False

    def __init__(self, location: Location, name: str, config: DataConfig, key: str, index: Path | None = None) -> None:
        asked = {"kind": "parquet", "image_column": config.image_column, "label_column": config.label_column}
        self._index = opened_or_made(index, asked, lambda: _index(location, config, key), key)
        facts = self._index.facts
        self.name, self.fingerprint = name, str(facts["fingerprint"])
        self.labels: list[str] | None = facts["classes"]
        self._numbers = {name: number for number, name in enumerate(self.labels or [])} if facts["label_is_text"] else None
        self._image, self._label = str(facts["image"]), facts["label"]
        self._cells = [self._image] + ([self._label] if self._label else [])
        self._groups = RowGroups(files_of(self._index, location), key)
        # Lists: Arrow's own conversion imports pandas.
        ends = np.cumsum(self._index.table["rows"].to_pylist())
        self._starts, self._rows = np.concatenate([[0], ends[:-1]]), int(ends[-1])
        largest = max(self._index.table["bytes"].to_pylist())
        self.blocks = Blocks(self._starts, self._rows, together=max(1, SHUFFLED // max(1, largest)))
        self._recipe, self._label_key = recipe_of(config), sibling(key, "label_column")

    def __len__(self) -> int:
        return self._rows

    def read(self, index: int) -> Record:
        row, (data, id) = self._row(index)
        label = columns.label(row[self._label] if self._label else None, self._numbers, id, self._label_key)
        return Record.decoded(data, self._recipe, label=label, id=id)

    def encoded(self, index: int) -> tuple[bytes | str, str]:
        return self._row(index)[1]

    def others(self, wanted: list[str] | None, key: str) -> list[str]:
        """The `wanted` columns, or all but image and label that hold no raw bytes; ConfigError under `key` for one that is not there."""
        return columns.others(self._groups.schema(), (self._image, self._label), wanted, key)

    def columns(self, images: np.ndarray, names: list[str]) -> pa.Table:
        """These columns of these images."""
        wanted, place = np.unique(images, return_inverse=True)
        groups = self._group(wanted)
        parts = [
            self._read(int(group), names).take(pa.array(wanted[groups == group] - self._starts[group])) for group in dict.fromkeys(groups)
        ]
        return pa.concat_tables(parts).take(pa.array(place))

    def write_index(self, path: Path) -> None:
        """Write what opens this source without reading the files' footers."""
        self._index.write(path)

    def _row(self, index: int) -> tuple[dict[str, Any], tuple[bytes | str, str]]:
        group = int(self._group(np.asarray(index)))
        table, row = self._read(group, self._cells), int(index - self._starts[group])
        cells = {name: table[name][row].as_py() for name in self._cells}
        return cells, columns.encoded(cells[self._image], index)

    def _group(self, index: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, index, side="right") - 1

    def _read(self, group: int, names: list[str]) -> pa.Table:
        return self._groups.read(self._index.value("file", group), self._index.value("group", group), tuple(names))


class RowGroups:
    """Columns of row groups, of which a process keeps the last read. Travels to another process without them; threads take turns."""

    def __init__(self, files: list[Listed], key: str) -> None:
        self._files, self._key = files, key
        self._forget()

    def schema(self) -> pa.Schema:
        with _reasons(self._files[0], self._key):
            return self._file(0).schema_arrow

    def read(self, file: int, group: int, names: tuple[str, ...]) -> pa.Table:
        """Columns of a row group; UsageError where the file cannot be read, or is not the one that was indexed."""
        # What is open may be a connection or locked by a thread, neither of which a fork survives.
        if self._process != os.getpid():
            self._forget()
        wanted = (file, group, names)
        with self._lock:
            if wanted in self._kept:
                self._kept.move_to_end(wanted)
            else:
                with _reasons(self._files[file], self._key):
                    # A thread of Arrow's would not survive a fork either.
                    table = self._file(file).read_row_group(group, columns=list(names), use_threads=False).select(list(names))
                self._kept[wanted] = table.replace_schema_metadata(None)
                self._bytes += table.nbytes
                while len(self._kept) > 1 and self._bytes > KEPT:
                    self._bytes -= self._kept.popitem(last=False)[1].nbytes
            return self._kept[wanted]

    def _forget(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        self._opened: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._kept: OrderedDict[tuple[int, int, tuple[str, ...]], pa.Table] = OrderedDict()
        self._bytes = 0

    def _file(self, file: int) -> pq.ParquetFile:
        listed = self._files[file]
        if file in self._opened:
            self._opened.move_to_end(file)
            # Asking for a size takes no time here.
            if not remote.is_remote(listed.path):
                listed.check(as_it_is(listed.path), self._key)
        else:
            self._opened[file] = open_parquet(listed, self._key)
            if len(self._opened) > _OPEN:
                self._opened.popitem(last=False)[1].close(force=True)
        return self._opened[file]

    def __reduce__(self) -> tuple[Any, ...]:
        return RowGroups, (self._files, self._key)


def open_parquet(file: Listed, key: str) -> pq.ParquetFile:
    """A parquet file, its footer read; UsageError where it is not the one that was listed."""
    file.check(as_it_is(file.path), key)
    return pq.ParquetFile(remote.open_file(file.path) if remote.is_remote(file.path) else file.path)


@contextmanager
def _reasons(file: Listed, key: str) -> Iterator[None]:
    """What reading a file raises becomes a UsageError that names it."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        remedy = f"cannot be read as parquet: {type(error).__name__}: {first_line(error)}; check the file"
        raise ConfigError(key, file.path, remedy) from error


def _index(location: Location, config: DataConfig, key: str) -> Index:
    """One row a row group: file, number in it, rows, and bytes of its images."""
    files = stat_files(location)
    first: pa.Schema | None = None
    facts: dict[str, Any] = {}

    def rows() -> Iterator[tuple[int, int, int, int]]:
        nonlocal first
        for number, file in enumerate(told(files, "files", of=len(files))):
            with _reasons(file, key), open_parquet(file, key) as opened:
                schema, footer = opened.schema_arrow, opened.metadata
                if first is None:
                    first = schema
                    columns.refuse_repeated(schema, file.path, key)
                    facts["image"] = columns.image_column(schema, config.image_column, sibling(key, "image_column"))
                    facts["label"] = columns.label_column(schema, config.label_column, sibling(key, "label_column"))
                elif not schema.equals(first):
                    remedy = f"{file.path} has columns other than those of {files[0].path}: {_difference(schema, first)}; give one of them"
                    raise ConfigError(key, location.paths, remedy)
                # A column's own name may have dots as well as the way to what it holds.
                image = [c for c in range(footer.num_columns) if f"{footer.schema.column(c).path}.".startswith(f"{facts['image']}.")]
                for group in range(footer.num_row_groups):
                    of = footer.row_group(group)
                    if of.num_rows:
                        yield number, group, of.num_rows, sum(of.column(column).total_uncompressed_size for column in image)

    table = table_of(rows(), _SCHEMA)
    if first is None or not table.num_rows:
        raise ConfigError(key, location.paths, "the files have no rows")
    largest = max(table["bytes"].to_pylist())
    if largest > KEPT:
        remedy = "write the files anew with row_group_size=100 to read less for each"
        print(f"{key}: the largest row group has {largest / 2**20:,.0f} MiB of images, all read for one of them; {remedy}", file=sys.stderr)
    facts["classes"], label = columns.class_names(first, facts["label"]), facts["label"]
    facts["label_is_text"] = facts["classes"] is None and label is not None and columns.is_text(first.field(label).type)
    if facts["label_is_text"]:
        facts["classes"] = _names(told(files, "files' labels", of=len(files)), label, key)
    named = fingerprint((os.path.basename(file.path), file.bytes) for file in files)
    return Index(table, {"files": files_told(files, location), "fingerprint": named, **facts})


def _names(files: Iterable[Listed], column: str, key: str) -> list[str]:
    """The different texts of a column, sorted."""
    names = set[str]()
    for file in files:
        with _reasons(file, key), open_parquet(file, key) as opened:
            for group in range(opened.num_row_groups):
                names.update(opened.read_row_group(group, columns=[column], use_threads=False)[column].unique().to_pylist())
    return sorted(name for name in names if name is not None)


def _difference(schema: pa.Schema, first: pa.Schema) -> str:
    old, new = ({field.name: str(field.type) for field in each} for each in (first, schema))
    other = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} ({new.get(name, 'missing')}, {old.get(name, 'missing')})" for name in other) or "their order"
