"""WebDatasets: samples in uncompressed tars, here or remote, read where they lie."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from autoencoder.data.columns import refuse_unknown
from autoencoder.data.index.members import is_text, parted
from autoencoder.data.index.opening import files_of, opened_or_made
from autoencoder.data.index.samples import index_tars
from autoencoder.data.paths import Location
from autoencoder.data.ranges import Ranges
from autoencoder.data.sources import BadImage, Record
from autoencoder.data_config import DataConfig
from autoencoder.pixel_recipe import recipe_of

KEY = "__key__"
"""The column of samples' names, as WebDatasets call it."""


class TarSource:
    """The samples of tars: members of one key that follow each other. An image's id is its row and its member's name."""

    in_memory = False

    def __init__(self, location: Location, name: str, config: DataConfig, key: str, index: Path | None = None) -> None:
        asked = {"kind": "tars", "image_column": config.image_column, "label_column": config.label_column}
        self._index = opened_or_made(index, asked, lambda: index_tars(location, config.image_column, config.label_column, key), key)
        self.name, self.fingerprint = name, str(self._index.facts["fingerprint"])
        self.labels: list[str] | None = self._index.facts["classes"]
        self._label: str | None = self._index.facts["label"]
        self._fields = [name[1:] for name in self._index.table.column_names if name.startswith(".")]
        self._ranges, self._recipe = Ranges(files_of(self._index, location), key), recipe_of(config)

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> Record:
        data, id = self.encoded(index)
        return Record.decoded(data, self._recipe, label=self._index.value("label", index), id=id)

    def encoded(self, index: int) -> tuple[bytes, str]:
        id = f"{index}:{self._name(index)}"
        offset = self._index.value("offset", index)
        if offset is None:
            raise BadImage(id, "the sample has no image")
        return self._ranges.read(self._index.value("tar", index), offset, self._index.value("bytes", index)), id

    def others(self, wanted: list[str] | None, key: str) -> list[str]:
        """The `wanted` columns, or the key and all fields of text but the label; ConfigError under `key` for one that is not there."""
        refuse_unknown(wanted, [KEY, *self._fields], key)
        if wanted is not None:
            return wanted
        return [KEY, *(field for field in self._fields if is_text(field) and field != self._label)]

    def columns(self, images: np.ndarray, names: list[str]) -> pa.Table:
        """These columns of these images: text as it stands, also JSON's, other fields as bytes."""
        return pa.table({name: pa.array([self._cell(name, row) for row in images.tolist()], _type(name)) for name in names})

    def write_index(self, path: Path) -> None:
        """Write what opens this source without reading the tars' headers."""
        self._index.write(path)

    def _name(self, index: int) -> str:
        name: bytes = self._index.value("name", index)
        return name.decode("utf-8", "surrogateescape")

    def _cell(self, name: str, row: int) -> str | bytes | None:
        if name == KEY:
            whole = self._name(row)
            parts = parted(whole) if self._index.value("offset", row) is not None else None
            return (parts[0] if parts else whole).encode("utf-8", "replace").decode()
        place = self._index.value(f".{name}", row)
        if place is None:
            return None
        data = self._ranges.read(self._index.value("tar", row), place["offset"], place["bytes"])
        return data.decode("utf-8", "replace") if is_text(name) else data


def _type(name: str) -> pa.DataType:
    return pa.string() if name == KEY or is_text(name) else pa.large_binary()
