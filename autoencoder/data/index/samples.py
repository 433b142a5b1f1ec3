"""Samples of tars: members of one key that follow each other, and which of them is the image."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from autoencoder.data.index.listed import Listed
from autoencoder.data.index.members import SHORT, TEXT, is_text, members_of
from autoencoder.data.index.opening import files_told, fingerprint, stat_files, told
from autoencoder.data.index.table import Index, table_of
from autoencoder.data.paths import IMAGE_EXTENSIONS, Location
from autoencoder.runtime.errors import ConfigError, sibling

PLACE = pa.struct([("offset", pa.int64()), ("bytes", pa.int64())])
"""Where in its tar a member is."""
MOST_FIELDS = 500
"""Each is a column. Names with something of their own after the first dot would make one of every member."""
_READERS = 8
"""Tars whose headers are read at a time: mostly a wait for the disk or the network."""

Sample = dict[str, tuple[int, int, bytes | None]]
"""Offset, size and, where it is short text, content of each field."""


def index_tars(location: Location, image_column: str | None, label_column: str | None, key: str) -> Index:
    """One row a sample: number of the tar, name, place of image and label; and of each other field a column `.FIELD` of its place."""
    files = stat_files(location)
    tables, fields = [], dict[str, None]()
    with ThreadPoolExecutor(min(_READERS, len(files))) as pool:
        for number, members in enumerate(told(_in_order(pool, files, key), "tars", of=len(files))):
            found = members["field"].unique().to_pylist()
            fields |= dict.fromkeys(found)
            if len(fields) > MOST_FIELDS:
                seen = f"{files[number].path} has fields (what comes after the first dot of a name) like {found[-1]!r}, and more than"
                raise ConfigError(key, location.base, f"{seen} {MOST_FIELDS} of them; pack it with names like 0001.jpg")
            tables.append(_samples(members, number, found, image_column, label_column, key))
    if image_column is not None and image_column not in fields:
        columns = ", ".join(name for name in fields if is_image(name)) or "none"
        raise ConfigError(sibling(key, "image_column"), image_column, f"columns that can hold images: {columns}")
    table = pa.concat_tables(tables, promote_options="default")
    if table["offset"].null_count == table.num_rows:
        raise ConfigError(sibling(key, "image_column"), image_column, f"no column holds images, among {', '.join(fields) or 'none'}")
    label = _label_field(fields, label_column, sibling(key, "label_column"))
    numbers, classes = _labels(table["label_text"] if label else None, table.num_rows, label_column, sibling(key, "label_column"))
    table = table.drop_columns(["label_text"]).append_column("label", pa.array(numbers, pa.int32()))
    facts = {
        "files": files_told(files, location),
        "fingerprint": _fingerprint(files, table),
        "label": label,
        "classes": classes,
    }
    return Index(table, facts)


def _fingerprint(files: list[Listed], table: pa.Table) -> str:
    """Of the files' names and sizes, and of the images' names, places and sizes: sizes of tars alone are round, and an order packed anew
    keeps them."""
    state = hashlib.sha256(fingerprint((os.path.basename(file.path), file.bytes) for file in files).encode())
    for batch in table.select(["name", "offset", "bytes"]).to_batches(max_chunksize=2**14):
        for name, offset, size in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            state.update(name + f"\0{offset}\0{size}\0".encode())
    return state.hexdigest()


@cache
def is_image(field: str) -> bool:
    """Whether a field is an image, by its last ending."""
    return f".{field.rpartition('.')[2].lower()}" in IMAGE_EXTENSIONS


def _in_order(pool: ThreadPoolExecutor, files: list[Listed], key: str) -> Iterator[pa.Table]:
    """The members of each tar, read a few tars ahead: all at once would not fit into memory."""
    waiting = []
    for file in files:
        waiting.append(pool.submit(members_of, file, key))
        if len(waiting) > _READERS:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def _grouped(members: pa.Table) -> Iterator[tuple[bytes, Sample]]:
    """Keys and fields of the samples of a tar. A field that comes again begins another sample, so that none is lost."""
    last: bytes | None = None
    sample: Sample = {}
    columns = [members[name] for name in ("key", "field", "offset", "bytes", "text")]
    for start in range(0, members.num_rows, 2**14):
        for key, field, offset, size, text in zip(*(column.slice(start, 2**14).to_pylist() for column in columns), strict=True):
            if key != last or field in sample:
                if last is not None:
                    yield last, sample
                last, sample = key, {}
            sample[field] = (offset, size, text)
    if last is not None:
        yield last, sample


def _samples(members: pa.Table, number: int, fields: list[str], wanted: str | None, label: str | None, key: str) -> pa.Table:
    others = [field for field in fields if field != wanted]
    schema = pa.schema(
        [("tar", pa.int32()), ("name", pa.large_binary()), ("offset", pa.int64()), ("bytes", pa.int64()), ("label_text", pa.binary())]
        + [(f".{field}", PLACE) for field in others]
    )
    labels = [field for field in (("label", "cls") if label is None else (label,)) if is_text(field)]

    def rows() -> Iterator[tuple[Any, ...]]:
        for name, sample in _grouped(members):
            image = wanted if wanted is not None else _only_image(name, sample, key)
            place = sample.get(image) if image is not None else None
            offset, size = place[:2] if place else (None, None)
            named = name + f".{image}".encode() if place else name
            told_by = next((field for field in labels if field in sample), None)
            text = None if told_by is None else _class_name(name, told_by, sample, key)
            yield number, named, offset, size, text, *(_place(sample, field) if field != image else None for field in others)

    table = table_of(rows(), schema)
    # The images' own fields, where no sample has them besides.
    return table.drop_columns([name for name in table.column_names[5:] if table[name].null_count == table.num_rows])


def _place(sample: Sample, field: str) -> dict[str, int] | None:
    return {"offset": sample[field][0], "bytes": sample[field][1]} if field in sample else None


def _class_name(name: bytes, field: str, sample: Sample, key: str) -> bytes:
    text = sample[field][2]
    if text is None:
        remedy = f"{name.decode(errors='replace')}.{field} has {sample[field][1]:,} bytes; class names and numbers have {SHORT} at most"
        raise ConfigError(sibling(key, "label_column"), field, remedy)
    return text


def _only_image(name: bytes, sample: Sample, key: str) -> str | None:
    images = [field for field in sample if is_image(field)]
    if len(images) > 1:
        remedy = f"columns that can hold images: {', '.join(images)} (of {name.decode(errors='replace')}); give one of them"
        raise ConfigError(sibling(key, "image_column"), None, remedy)
    return images[0] if images else None


def _label_field(fields: dict[str, None], wanted: str | None, key: str) -> str | None:
    """The field of class labels, by default `label`, or `cls` as WebDatasets call it."""
    texts = [field for field in fields if is_text(field)]
    if wanted is None:
        return next((name for name in ("label", "cls") if name in texts), None)
    if wanted not in texts:
        raise ConfigError(key, wanted, f"columns that can hold labels: {', '.join(texts) or 'none'} (text, by endings: {', '.join(TEXT)})")
    return wanted


def _labels(texts: pa.ChunkedArray | None, rows: int, wanted: str | None, key: str) -> tuple[np.ndarray, list[str] | None]:
    """Numbers by sample, -1 where there is none or an empty one; and class names, in their order, where the texts are not all integers."""
    if texts is None:
        return np.full(rows, -1, np.int32), None
    coded = texts.combine_chunks().dictionary_encode()
    names = [bytes(text).decode(errors="replace").strip() for text in coded.dictionary.to_pylist()]
    told = sorted({name for name in names if name})
    try:
        numbers, classes = {name: int(name) for name in told}, None
    except ValueError:
        numbers, classes = {name: number for number, name in enumerate(told)}, told
    beyond = next((number for number in numbers.values() if abs(number) >= 2**31), None)
    if beyond is not None:
        raise ConfigError(key, wanted, f"a label is {beyond}; classes are numbers below 2**31, or names")
    by_code = np.array([*(numbers.get(name, -1) for name in names), -1], np.int32)
    return by_code[coded.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)], classes
