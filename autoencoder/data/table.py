"""Images in tables: parquet, WebDataset and the hub, through `datasets`, which keeps an Arrow copy in its cache."""

import os
from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import pyarrow
from datasets import ClassLabel, Dataset, Image, Value
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from autoencoder.data.decode import DecodeError, decode_image
from autoencoder.data.paths import Location
from autoencoder.data.sources import BadImage, Record, digest
from autoencoder.data_config import DataConfig
from autoencoder.pixel_recipe import recipe_of
from autoencoder.runtime.errors import ConfigError


class TableSource:
    """The rows of a table with a column of encoded images; an image's id is its row and, where known, its file name."""

    in_memory = False

    def __init__(self, table: Dataset, *, name: str, fingerprint: str, config: DataConfig, key: str) -> None:
        room = key.rpartition(".")[0]
        self.name, self.fingerprint = name, fingerprint
        self._image = _image_column(table, config.image_column, f"{room}.image_column")
        if isinstance(table.features[self._image], Image):
            table = table.cast_column(self._image, Image(decode=False))
        self._label = _label_column(table, config.label_column, f"{room}.label_column")
        self.labels, self._classes = _classes(table, self._label)
        self._whole, self._table = table, table.select_columns([self._image] + ([self._label] if self._label else []))
        self._recipe = recipe_of(config)

    def __len__(self) -> int:
        return len(self._table)

    def others(self, wanted: list[str] | None, key: str) -> Dataset:
        """The `wanted` columns, or all but image and label that hold no raw bytes; ConfigError under `key` for one that is not there."""
        names = self._whole.column_names
        for name in wanted or []:
            if name not in names:
                raise ConfigError(key, name, f"the table has {', '.join(names)}")
        if wanted is None:
            # WebDataset's own column, a path on this machine.
            left = [name for name in names if name not in (self._image, self._label, "__url__")]
            wanted = [name for name in left if not _has_bytes(self._whole.data.schema.field(name).type)]
        return self._whole.select_columns(wanted)

    def read(self, index: int) -> Record:
        row = self._table[int(index)]
        data, id = self._data(index, row)
        try:
            image = decode_image(data, self._recipe)
        except DecodeError as error:
            raise BadImage.of(id, error) from error
        value = row[self._label] if self._label else None
        label = -1 if value is None else self._classes[value] if self._classes is not None else int(value)
        return Record(image.pixels, label, id, image.valid)

    def encoded(self, index: int) -> tuple[bytes | str, str]:
        return self._data(index, self._table[int(index)])

    def _data(self, index: int, row: dict[str, Any]) -> tuple[bytes | str, str]:
        data, path = _encoded(row[self._image])
        id = f"{index}:{path}" if path else str(index)
        if not data:
            raise BadImage(id, "the cell is empty")
        return data, id


def open_tables(location: Location, source: str, config: DataConfig, key: str) -> TableSource:
    """The rows of parquet or WebDataset files."""
    names = [os.path.basename(file) for file in location.paths]
    try:
        table = (
            _tars(location.paths)
            if location.kind == "webdataset"
            else _load("parquet", data_files={"train": list(location.paths)}, split="train")
        )
    except Exception as error:
        raise ConfigError(key, source, f"cannot be read as {location.kind}: {_reason(error)}; check the files") from error
    return TableSource(table, name=source, fingerprint=digest(names, location.paths), config=config, key=key)


def open_hub(name: str, split: str, config: DataConfig, key: str) -> TableSource:
    """A split of a dataset on the hub, downloaded or from the cache."""
    splits = hub_splits(name, key)
    if split not in splits:
        raise ConfigError(f"{key.rpartition('.')[0]}.split", split, f"{name} has {' and '.join(splits)}")
    try:
        table = _load(name, split=split)
    except Exception as error:
        raise _unreachable(name, key, error) from error
    return TableSource(table, name=f"{name} ({split})", fingerprint=table._fingerprint, config=config, key=key)


def hub_splits(name: str, key: str) -> list[str]:
    """The splits of a dataset on the hub."""
    try:
        return list(datasets.get_dataset_split_names(name))
    except Exception as error:
        raise _unreachable(name, key, error) from error


def _load(name: str, **arguments: Any) -> Dataset:
    # What goes wrong is raised and becomes our one message; `datasets` would log it as well.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets.load_dataset(name, **arguments)


class _Tars(WebDataset):
    """WebDataset with .npy members as encoded images beside the others: decoded, they would be kept as nested lists."""

    IMAGE_EXTENSIONS: ClassVar[list[str]] = [*WebDataset.IMAGE_EXTENSIONS, "npy"]
    DECODERS: ClassVar[dict[str, Any]] = {ending: decode for ending, decode in WebDataset.DECODERS.items() if ending != "npy"}


def _tars(files: Sequence[str]) -> Dataset:
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    builder = _Tars(dataset_name="firststage_webdataset", data_files={"train": list(files)})
    builder.download_and_prepare()
    return builder.as_dataset(split="train")


def _unreachable(name: str, key: str, error: Exception) -> ConfigError:
    return ConfigError(
        key, name, f"no folder here, and the hub does not give it: {_reason(error)}; check the name, the network or `hf auth login`"
    )


def _reason(error: Exception) -> str:
    first_line = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first_line}".rstrip(":. ")


def _image_column(table: Dataset, wanted: str | None, key: str) -> str:
    def holds_images(feature: Any) -> bool:
        struct_of_bytes = isinstance(feature, dict) and "bytes" in feature
        return isinstance(feature, Image) or struct_of_bytes or (isinstance(feature, Value) and feature.dtype in ("binary", "large_binary"))

    columns = [name for name, feature in table.features.items() if holds_images(feature)]
    if wanted is None and len(columns) == 1:
        return columns[0]
    if wanted is not None and wanted in columns:
        return wanted
    remedy = (
        f"columns that can hold images: {', '.join(columns)}"
        if columns
        else f"no column holds images, among {', '.join(table.column_names)}"
    )
    raise ConfigError(key, wanted, remedy)


def _label_column(table: Dataset, wanted: str | None, key: str) -> str | None:
    """The column of class labels, by default `label`, or `cls` as WebDatasets call it."""

    def holds_labels(feature: Any) -> bool:
        return isinstance(feature, ClassLabel) or (
            isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "bool", "string", "large_string"))
        )

    columns = [name for name, feature in table.features.items() if holds_labels(feature)]
    if wanted is None:
        return next((name for name in ("label", "cls") if name in columns), None)
    if wanted not in columns:
        raise ConfigError(key, wanted, f"columns that can hold labels: {', '.join(columns) or 'none'}")
    return wanted


def _classes(table: Dataset, column: str | None) -> tuple[list[str] | None, dict[str, int] | None]:
    """Class names where they are known, and where labels are strings their numbers, in the order of their names."""
    feature = table.features[column] if column else None
    if isinstance(feature, ClassLabel):
        return list(feature.names), None
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        names = sorted(name for name in table.unique(column) if name is not None)
        return names, {name: label for label, name in enumerate(names)}
    return None, None


def _has_bytes(type: pyarrow.DataType) -> bool:
    if pyarrow.types.is_binary(type) or pyarrow.types.is_large_binary(type) or pyarrow.types.is_fixed_size_binary(type):
        return True
    return any(_has_bytes(type.field(i).type) for i in range(type.num_fields))


def _encoded(cell: Any) -> tuple[bytes | str | None, str | None]:
    """What to decode (bytes, else a path) and the file's name."""
    if not isinstance(cell, dict):
        return cell, None
    return cell.get("bytes") or cell.get("path"), cell.get("path")
