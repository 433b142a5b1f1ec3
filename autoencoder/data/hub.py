"""Datasets on the hub, through `datasets`, which downloads them and keeps an Arrow copy in its cache."""

from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Image

from autoencoder.data import columns
from autoencoder.data.sources import Record
from autoencoder.data_config import DataConfig
from autoencoder.pixel_recipe import recipe_of
from autoencoder.runtime.errors import ConfigError, first_line, sibling


class HubSource:
    """The rows of a dataset with a column of encoded images; an image's id is its row and, where known, its file name."""

    in_memory = False

    def __init__(self, table: Dataset, *, name: str, config: DataConfig, key: str) -> None:
        schema = table.features.arrow_schema
        self.name, self.fingerprint = name, table._fingerprint
        self._image = columns.image_column(schema, config.image_column, sibling(key, "image_column"))
        if isinstance(table.features[self._image], Image):
            table = table.cast_column(self._image, Image(decode=False))
        self._label = columns.label_column(schema, config.label_column, sibling(key, "label_column"))
        self.labels, self._numbers = columns.class_names(schema, self._label), None
        if self.labels is None and self._label is not None and columns.is_text(schema.field(self._label).type):
            self.labels = sorted(name for name in table.unique(self._label) if name is not None)
            self._numbers = {name: number for number, name in enumerate(self.labels)}
        self._whole, self._table = table, table.select_columns([self._image] + ([self._label] if self._label else []))
        self._recipe, self._label_key = recipe_of(config), sibling(key, "label_column")

    def __len__(self) -> int:
        return len(self._table)

    def read(self, index: int) -> Record:
        row = self._table[int(index)]
        data, id = columns.encoded(row[self._image], index)
        label = columns.label(row[self._label] if self._label else None, self._numbers, id, self._label_key)
        return Record.decoded(data, self._recipe, label=label, id=id)

    def encoded(self, index: int) -> tuple[bytes | str, str]:
        return columns.encoded(self._table[int(index)][self._image], index)

    def others(self, wanted: list[str] | None, key: str) -> list[str]:
        """The `wanted` columns, or all but image and label that hold no raw bytes; ConfigError under `key` for one that is not there."""
        return columns.others(self._whole.features.arrow_schema, (self._image, self._label), wanted, key)

    def columns(self, images: np.ndarray, names: list[str]) -> pa.Table:
        """These columns of these images."""
        wanted, place = np.unique(images, return_inverse=True)
        carried: pa.Table = self._whole.select_columns(names).with_format("arrow")[wanted.tolist()].take(pa.array(place))
        return carried.replace_schema_metadata(None)


def open_hub(name: str, split: str, config: DataConfig, key: str) -> HubSource:
    """A split of a dataset on the hub, downloaded or from the cache."""
    splits = hub_splits(name, key)
    if split not in splits:
        raise ConfigError(sibling(key, "split"), split, f"{name} has {' and '.join(splits)}")
    try:
        table = _load(name, split=split)
    except Exception as error:
        raise _unreachable(name, key, error) from error
    return HubSource(table, name=f"{name} ({split})", config=config, key=key)


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


def _unreachable(name: str, key: str, error: Exception) -> ConfigError:
    told = f"{type(error).__name__}: {first_line(error)}".rstrip(":. ")
    return ConfigError(key, name, f"no folder here, and the hub does not give it: {told}; check the name, the network or `hf auth login`")
