"""A folder of images, with or without class folders and split folders."""

import os

import numpy as np
import pyarrow

from autoencoder.data.decode import DecodeError, decode_image
from autoencoder.data.paths import folder_splits, visible_subfolders, walk_images
from autoencoder.data.sources import BadImage, Record, digest
from autoencoder.data_config import DataConfig
from autoencoder.pixel_recipe import recipe_of
from autoencoder.runtime.errors import ConfigError


class FolderSource:
    """The image files under a folder, or under one of its split folders.

    Two or more subfolders that hold all the images are classes: the label is the first folder on an image's path, by the
    sorted names of the class folders of all splits. Otherwise images have no labels.
    """

    in_memory = False

    def __init__(self, root: str, split: str, config: DataConfig, key: str) -> None:
        splits = folder_splits(root)
        self._root = os.path.join(root, split) if splits else root
        names = list(walk_images(self._root))
        if not names:
            raise ConfigError(key, self._root, "the folder holds no images")
        class_roots = [os.path.join(root, name) for name in splits] or [root]
        classes = sorted({name for class_root in class_roots for name in visible_subfolders(class_root)})
        labelled = len(classes) > 1 and all(os.sep in name for name in names)
        index = {name: label for label, name in enumerate(classes)}
        self.name = self._root
        self.labels: list[str] | None = classes if labelled else None
        self.fingerprint = digest((name.replace(os.sep, "/") for name in names), (os.path.join(self._root, name) for name in names))
        # Arrays, not lists: loader processes then share the pages, which reference counts of strings would copy.
        self._labels = np.array([index[name.split(os.sep)[0]] if labelled else -1 for name in names], dtype=np.int32)
        self._names = np.array([os.fsencode(name) for name in names])
        self._recipe = recipe_of(config)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> Record:
        path, id = self.encoded(index)
        try:
            image = decode_image(path, self._recipe)
        except DecodeError as error:
            raise BadImage.of(id, error) from error
        return Record(image.pixels, int(self._labels[index]), id, image.valid)

    def listing(self) -> pyarrow.Table:
        """`name` (binary, with `/`) and `bytes` of each file, in order."""
        names = [bytes(name).replace(os.fsencode(os.sep), b"/") for name in self._names]
        sizes = [os.stat(os.path.join(os.fsencode(self._root), name)).st_size for name in names]
        return pyarrow.table({"name": pyarrow.array(names, pyarrow.binary()), "bytes": pyarrow.array(sizes, pyarrow.int64())})

    def encoded(self, index: int) -> tuple[str, str]:
        name = os.fsdecode(bytes(self._names[index]))
        return os.path.join(self._root, name), name.replace(os.sep, "/")
