"""A folder of images, here or remote, with or without class folders and split folders."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from autoencoder.data import remote
from autoencoder.data.formats import Data
from autoencoder.data.index.listed import Listed, as_it_is
from autoencoder.data.index.opening import opened_or_made, signed, told
from autoencoder.data.index.table import Index, table_of
from autoencoder.data.paths import Found, find_images, folder_splits, visible_subfolders
from autoencoder.data.sources import Record
from autoencoder.data_config import DataConfig
from autoencoder.pixel_recipe import recipe_of
from autoencoder.runtime.errors import ConfigError, UsageError, first_line

# Bytes, not text: names of files need not be UTF-8.
_SCHEMA = pa.schema([("name", pa.large_binary()), ("bytes", pa.int64()), ("mtime_ns", pa.int64()), ("label", pa.int32())])


class FolderSource:
    """The image files under a folder, or under one of its split folders.

    Two or more subfolders that hold all the images are classes: the label is the first folder on an image's path, by the
    sorted names of the class folders of all splits. Otherwise images have no labels.
    """

    in_memory = False

    def __init__(self, root: str, split: str, config: DataConfig, key: str, index: Path | None = None) -> None:
        self._index = opened_or_made(index, {"kind": "folder", "split": split}, lambda: _index(root, split, key), key)
        self._key, self._remote, self._recipe = key, remote.is_remote(root), recipe_of(config)
        under: str = self._index.facts["under"]
        self.name = self._root = _under(root, under)
        self.labels: list[str] | None = self._index.facts["classes"]
        self.fingerprint: str = self._index.facts["fingerprint"]

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> Record:
        data, id = self.encoded(index)
        return Record.decoded(data, self._recipe, label=self._index.value("label", index), id=id)

    def encoded(self, index: int) -> tuple[Data, str]:
        id = self._index.value("name", index).decode("utf-8", "surrogateescape")
        size: int = self._index.value("bytes", index)
        if self._remote:
            return self._downloaded(Listed(f"{self._root}/{id}", size, "")), id
        path = os.path.join(self._root, id)
        found = as_it_is(path)
        # A link that leads nowhere has no size, and is a bad image.
        if found is not None or size >= 0:
            mtime_ns: int = self._index.value("mtime_ns", index)
            Listed(path, size, str(mtime_ns) if mtime_ns else "").check(found, self._key)
        return path, id

    def write_index(self, path: Path) -> None:
        """Write what opens this source without looking through the folder."""
        self._index.write(path)

    def listing(self) -> pa.Table:
        """`name` (binary, with `/`) and `bytes` of each file, in order."""
        return self._index.table.select(["name", "bytes"])

    def _downloaded(self, listed: Listed) -> bytes:
        try:
            data = remote.read(listed.path)
        except FileNotFoundError:
            data = None
        # Each file system has errors of its own; a network that fails makes no bad image.
        except Exception as error:
            raise UsageError(f"{self._key}: {listed.path} cannot be read: {type(error).__name__}: {first_line(error)}") from error
        listed.check(None if data is None else listed._replace(bytes=len(data)), self._key)
        assert data is not None
        return data


def _under(root: str, under: str) -> str:
    if not under:
        return root
    return f"{root}/{under}" if remote.is_remote(root) else os.path.join(root, under)


def _index(root: str, split: str, key: str) -> Index:
    splits = folder_splits(root)
    under = split if splits else ""
    class_roots = [_under(root, name) for name in splits] or [root]
    classes = sorted({name for class_root in class_roots for name in visible_subfolders(class_root)})
    state, facts = hashlib.sha256(), dict[str, Any]()

    def rows(found: Iterator[Found]) -> Iterator[tuple[bytes, int, int, int]]:
        numbers = {name: label for label, name in enumerate(classes)}
        labelled: bool | None = None
        for name, size, mtime_ns in found:
            # Files come before folders: where the first image is in a folder, all are.
            if labelled is None:
                labelled = len(classes) > 1 and "/" in name
                facts["classes"] = classes if labelled else None
            state.update(signed(name, size))
            yield name.encode("utf-8", "surrogateescape"), size, mtime_ns, numbers[name.partition("/")[0]] if labelled else -1

    table = table_of(rows(told(find_images(_under(root, under)), "files")), _SCHEMA)
    if not table.num_rows:
        raise ConfigError(key, _under(root, under), "the folder holds no images")
    return Index(table, {"under": under, "fingerprint": state.hexdigest(), **facts})
