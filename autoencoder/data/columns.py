"""Which columns of a table hold images and labels, and what their cells say; after `datasets`' features where the schema has them."""

import json
from collections import Counter
from typing import Any

import pyarrow as pa

from autoencoder.data.sources import BadImage
from autoencoder.runtime.errors import ConfigError


def refuse_repeated(schema: pa.Schema, file: str, key: str) -> None:
    """ConfigError under `key` for a file with two columns of one name, which no name tells apart."""
    twice = [name for name, count in Counter(schema.names).items() if count > 1]
    if twice:
        names = " and several called ".join(map(repr, twice))
        raise ConfigError(key, file, f"has several columns called {names}; write it anew with a name of its own for each")


def image_column(schema: pa.Schema, wanted: str | None, key: str) -> str:
    """The column of encoded images, the only one where none is `wanted`; ConfigError under `key` with those there are."""
    columns = [field.name for field in schema if _holds_images(field.type)]
    if wanted is None and len(columns) == 1:
        return columns[0]
    if wanted is not None and wanted in columns:
        return wanted
    remedy = (
        f"columns that can hold images: {', '.join(columns)}" if columns else f"no column holds images, among {', '.join(schema.names)}"
    )
    raise ConfigError(key, wanted, remedy)


def label_column(schema: pa.Schema, wanted: str | None, key: str) -> str | None:
    """The column of class labels, by default `label`, or `cls` as WebDatasets call it; ConfigError under `key` with those there are."""
    columns = [field.name for field in schema if _holds_labels(field.type)]
    if wanted is None:
        return next((name for name in ("label", "cls") if name in columns), None)
    if wanted not in columns:
        raise ConfigError(key, wanted, f"columns that can hold labels: {', '.join(columns) or 'none'}")
    return wanted


def class_names(schema: pa.Schema, column: str | None) -> list[str] | None:
    """The names of a column's classes where `datasets` wrote them into the schema."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    # Whatever else others have written there.
    except (KeyError, ValueError, TypeError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def label(value: Any, numbers: dict[str, int] | None, id: str, key: str) -> int:
    """The label that a cell says, by `numbers` where it is a name, -1 for none; ConfigError under `key` for one that is no class."""
    number = -1 if value is None else int(value) if numbers is None else numbers[value]
    if not -(2**63) <= number < 2**63:
        raise ConfigError(key, None, f"image {id} has label {number}; classes are numbers below 2**63, or names")
    return number


def others(schema: pa.Schema, taken: tuple[str | None, ...], wanted: list[str] | None, key: str) -> list[str]:
    """The `wanted` columns, or all but those `taken` that hold no raw bytes; ConfigError under `key` for one that is not there."""
    refuse_unknown(wanted, schema.names, key)
    return wanted if wanted is not None else [field.name for field in schema if field.name not in taken and not _holds_bytes(field.type)]


def refuse_unknown(wanted: list[str] | None, names: list[str], key: str) -> None:
    """ConfigError under `key` for a wanted column that there is not."""
    for name in wanted or []:
        if name not in names:
            raise ConfigError(key, name, f"the table has {', '.join(names)}")


def is_text(type: pa.DataType) -> bool:
    """Whether values are text, each written out or by number."""
    return pa.types.is_string(_plain(type)) or pa.types.is_large_string(_plain(type))


def encoded(cell: Any, row: int) -> tuple[bytes | str, str]:
    """What to decode (bytes, else a path) and the image's id, its row and, where it is known, its file's name; BadImage for nothing."""
    data, path = (cell.get("bytes") or cell.get("path"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    id = f"{row}:{path}" if path else str(row)
    if not data:
        raise BadImage(id, "the cell is empty")
    if not isinstance(data, (bytes, str)):
        raise BadImage(id, f"the cell holds a {type(data).__name__}, neither bytes nor a path")
    return data, id


def _plain(type: pa.DataType) -> pa.DataType:
    return type.value_type if pa.types.is_dictionary(type) else type


def _holds_images(type: pa.DataType) -> bool:
    struct_of_bytes = pa.types.is_struct(type) and type.get_field_index("bytes") >= 0
    return struct_of_bytes or pa.types.is_binary(type) or pa.types.is_large_binary(type)


def _holds_labels(type: pa.DataType) -> bool:
    return is_text(type) or pa.types.is_integer(type) or pa.types.is_boolean(type)


def _holds_bytes(type: pa.DataType) -> bool:
    if pa.types.is_binary(type) or pa.types.is_large_binary(type) or pa.types.is_fixed_size_binary(type):
        return True
    return any(_holds_bytes(type.field(i).type) for i in range(type.num_fields))
