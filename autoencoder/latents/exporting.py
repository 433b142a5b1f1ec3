"""A data set of latents as parquet files or WebDataset tars, a file for each shard, whole or not there."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow
import pyarrow.parquet

from autoencoder.export_latents import ExportLatentsConfig
from autoencoder.latents.opened import open_latents
from autoencoder.latents.progress import Progress
from autoencoder.latents.reader import Latents, LatentsError, Shard, check_shard, not_finite
from autoencoder.runtime.errors import ConfigError, first_line
from autoencoder.runtime.files import partial, put
from autoencoder.runtime.lock import hold, make_folder, release

TOLD = "latents.json"
"""What the files are, written last: manifest, format and files."""
ROWS_AT_ONCE = 256
"""Rows of a row group of parquet, which are in memory together."""
_DTYPES: dict[str, np.dtype[Any]] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}
_OURS = {"id", "label", "name", "image", "view", "mean", "logvar"}


def export_latents(config: ExportLatentsConfig) -> int:
    """Write the files that are not there yet, and `latents.json` last; returns the exit code.

    Raises:
        UsageError: latents that are damaged or do not fit the type, or a folder with something else in it.
    """
    latents = open_latents(config.latents, "latents")
    dtype: str = config.dtype or latents.manifest["dtype"]
    ending = {"parquet": ".parquet", "webdataset": ".tar"}[config.format]
    entries = [entry for entry in latents.manifest["shards"] if entry["rows"]]
    files = [Path(entry["file"]).with_suffix(ending).name for entry in entries]
    told = {"export": {"format": config.format, "dtype": dtype, "files": files}, **latents.manifest}
    out = Path(config.out)
    make_folder(out, "the export")
    notes: list[str] = []
    lock = hold(out, notes)
    try:
        with _writing(out / TOLD):
            done = _begin(out, json.dumps(told, indent=1))
        if done:
            print(f"{out}: finished already ({len(latents):,} rows); nothing to do")
            return 0
        write = {"parquet": _write_parquet, "webdataset": _write_tar}[config.format]
        pending = [(entry, out / name) for entry, name in zip(entries, files, strict=True) if not (out / name).is_file()]
        progress = Progress(len(latents), len(latents) - sum(entry["rows"] for entry, _ in pending), verb="exported")
        for entry, path in pending:
            content = _content(latents, entry, _DTYPES[dtype])
            with _writing(path):
                _write(path, content, latents, write)
            progress.advance(entry["rows"])
        progress.close(finished=True)
        with _writing(out / TOLD):
            put(out / TOLD)
    finally:
        release(lock)
    print(f"{out}: {len(latents):,} rows in {len(files)} files of {config.format}, {dtype}; {TOLD} has their statistics and hashes")
    return 0


def _begin(out: Path, told: str) -> bool:
    """Whether the very same export is finished already; ConfigError where the folder is of something else."""
    file = out / TOLD
    held = next((path for path in (file, partial(file)) if path.is_file()), None)
    begun = any(path for path in out.iterdir() if not path.name.startswith("."))
    # Where nothing is exported yet, what was killed may have written half of it.
    if held is None or not begun:
        if begun:
            raise ConfigError("out", str(out), f"a folder with other files and no {TOLD}; give one that is new or empty")
        partial(file).write_text(told, encoding="utf-8")
    elif held.read_text(encoding="utf-8") != told:
        raise ConfigError("out", str(out), "an export of other latents, or in another format or dtype; give a folder that is new or empty")
    return held == file


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """ConfigError where `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise ConfigError("out", str(path), f"cannot be written ({first_line(error)}); the same command goes on from here") from error


def _content(latents: Latents, entry: dict[str, Any], dtype: np.dtype[Any]) -> "_Content":
    """What is to be written of a shard; ConfigError where it is not what the manifest says."""
    file = latents.folder / entry["table"]["file"]
    try:
        shard = Shard(latents.folder / entry["file"])
        shard.open()
        check_shard(shard, entry, has_logvar=latents.has_logvar, classes=None if latents.labels is None else len(latents.labels))
        table = pyarrow.parquet.read_table(file)
        if not np.array_equal(table["row"].to_numpy(), shard.tensors["id"]):
            raise LatentsError(f"{file}: not the rows of {entry['file']}; run verify_latents")
    except LatentsError as error:
        raise ConfigError("latents", str(latents.folder), str(error)) from error
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise ConfigError("latents", str(latents.folder), f"{file} cannot be read ({first_line(error)}); run verify_latents") from error
    return _Content(shard, table, dtype)


def _write(path: Path, content: "_Content", latents: Latents, write: Callable[[Path, "_Content", Latents], None]) -> None:
    try:
        write(partial(path), content, latents)
        put(path)
    except LatentsError as error:
        raise ConfigError("latents", str(latents.folder), str(error)) from error
    finally:
        partial(path).unlink(missing_ok=True)


class _Content:
    """A shard and its side table, as it is to be written."""

    def __init__(self, shard: Shard, table: pyarrow.Table, dtype: np.dtype[Any]) -> None:
        self.path, self.id, self.label = shard.path, shard.tensors["id"], shard.tensors["label"]
        self.moments: dict[str, np.ndarray] = {name: shard.tensors[name] for name in ("mean", "logvar") if name in shard.tensors}
        self.dtype = dtype
        others = [name for name in table.column_names if name not in ("row", "image", "view", "name")]
        self.name, self.image, self.view = (table[name] for name in ("name", "image", "view"))
        self.others = {f"source_{name}" if name in _OURS else name: table[name] for name in others}

    def __len__(self) -> int:
        return len(self.id)

    def rows(self, first: int) -> dict[str, np.ndarray]:
        """The moments of the rows that are written together, in the type that is written; LatentsError where one does not fit it."""
        found: dict[str, np.ndarray] = {}
        for name, values in self.moments.items():
            with np.errstate(over="ignore"):  # reported below, with the row
                found[name] = values[first : first + ROWS_AT_ONCE].astype(self.dtype)
            place = not_finite(found[name])
            if place is not None:
                remedy = "run verify_latents" if not np.isfinite(values[first + place]).all() else "fp16 ends at 65504: export as fp32"
                raise LatentsError(f"{self.path}: {name} of row {first + place} is not finite; {remedy}")
        return found


def _write_parquet(path: Path, content: _Content, latents: Latents) -> None:
    shape = next(iter(content.moments.values())).shape[1:]
    facts = {"shape": list(shape), "labels": latents.labels, "statistics": latents.manifest["statistics"]}
    hashes = {key: latents.manifest[key] for key in ("encoder_hash", "decoder_hash", "rows_hash")}
    columns: dict[str, Any] = {
        "id": pyarrow.array(content.id),
        "label": pyarrow.array(content.label),
        "name": content.name,
        "image": content.image,
        "view": content.view,
        **content.others,
    }
    table = pyarrow.table(columns)
    of_row = pyarrow.list_(pyarrow.from_numpy_dtype(content.dtype), int(np.prod(shape)))
    schema = table.schema
    for name in content.moments:
        schema = schema.append(pyarrow.field(name, of_row))
    schema = schema.with_metadata({"latents": json.dumps({**facts, **hashes})})
    # Dictionaries and compression find nothing in moments.
    others = {"use_dictionary": table.column_names, "compression": dict.fromkeys(table.column_names, "zstd")}
    with pyarrow.parquet.ParquetWriter(path, schema, **others) as writer:
        for first in range(0, len(content), ROWS_AT_ONCE):
            rows = table.slice(first, ROWS_AT_ONCE)
            for name, values in content.rows(first).items():
                rows = rows.append_column(name, pyarrow.FixedSizeListArray.from_arrays(values.reshape(-1), type=of_row))
            writer.write_table(rows.cast(schema))


def _write_tar(path: Path, content: _Content, latents: Latents) -> None:
    del latents
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for first in range(0, len(content), ROWS_AT_ONCE):
            moments = content.rows(first)
            others = {name: column.slice(first, ROWS_AT_ONCE).to_pylist() for name, column in content.others.items()}
            named = {name: getattr(content, name).slice(first, ROWS_AT_ONCE).to_pylist() for name in ("name", "image", "view")}
            for row in range(len(named["name"])):
                id, label = int(content.id[first + row]), int(content.label[first + row])
                told = {"id": id, "label": label, **{name: values[row] for name, values in {**named, **others}.items()}}
                for name, values in moments.items():
                    buffer = io.BytesIO()
                    np.save(buffer, values[row])
                    _add(archive, f"{id:09d}.{name}.npy", buffer.getvalue())
                _add(archive, f"{id:09d}.cls", str(label).encode())
                _add(archive, f"{id:09d}.json", json.dumps(told, default=str).encode())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """A member without times and owners: equal rows make equal files."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    source: IO[bytes] = io.BytesIO(content)
    archive.addfile(member, source)
