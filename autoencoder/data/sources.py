"""Random access to the images of a source, and its split into training and validation."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from autoencoder.data.bands import DecodeError, Misfit
from autoencoder.data.decode import decode_image
from autoencoder.data.formats import Data
from autoencoder.data.order import Blocks, spread
from autoencoder.data.paths import VALIDATION_SPLITS, folder_splits, locate
from autoencoder.data_config import DataConfig, images_key
from autoencoder.pixel_recipe import PixelRecipe
from autoencoder.runtime.errors import ConfigError, sibling
from autoencoder.runtime.own_class import OwnClass
from autoencoder.runtime.rng import generator

if TYPE_CHECKING:
    import pyarrow

    from autoencoder.data.own import OwnSource


@dataclass(frozen=True)
class Record:
    """One image as it was read."""

    pixels: np.ndarray
    """(H, W, C), uint8 or uint16, of a stated range also int16 or float32; 0 where missing."""
    label: int
    """Class, or -1 where there is none."""
    id: str
    """Its name within the source."""
    valid: np.ndarray | None = None
    """(H, W) bool, false where pixels are missing; None where none can be."""

    @classmethod
    def decoded(cls, data: Data, recipe: PixelRecipe, *, label: int, id: str) -> "Record":
        """The record of an encoded image, bytes or path; raises BadImage."""
        try:
            image = decode_image(data, recipe)
        except DecodeError as error:
            raise BadImage.of(id, error) from error
        return cls(image.pixels, label, id, image.valid)


class BadImage(Exception):
    """An image that cannot be read; the loader takes another in its place."""

    def __init__(self, id: str, reason: str, misfit: str | None = None) -> None:
        """`misfit` is the setting that a whole image does not fit, None for a broken one."""
        self.id, self.reason, self.misfit = id, reason, misfit
        super().__init__(id, reason, misfit)

    @classmethod
    def of(cls, id: str, error: DecodeError) -> "BadImage":
        """The image of this name that raised `error`."""
        return cls(id, str(error), error.key if isinstance(error, Misfit) else None)


class Source(Protocol):
    """Images by index. Picklable, so that loader processes can have it.

    A source whose images are quickly read only a block at a time has an attribute `blocks` besides.
    """

    name: str
    """What logs call it."""
    labels: list[str] | None
    """Class names by label; None where images have no labels or numbers only."""
    in_memory: bool
    """Whether reading is a mere look-up, for which loader processes do not pay."""
    fingerprint: str
    """A hexadecimal digest that depends on the names and sizes of the source's files, not on where they lie."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Record:
        """The image at `index` in [0, len); raises BadImage."""
        ...


class Files(Source, Protocol):
    """A source whose images can be had encoded."""

    def encoded(self, index: int) -> tuple[Data, str]:
        """Bytes or path of the image at `index`, and its name within the source; raises BadImage where there are none."""
        ...


@runtime_checkable
class Indexed(Protocol):
    """A source that keeps a list of what it holds."""

    def write_index(self, path: Path) -> None:
        """Write what `open_images` opens this source by without looking for its files: an Arrow IPC file, mapped when it is opened."""
        ...


@runtime_checkable
class WithColumns(Protocol):
    """A source whose images come with other columns."""

    def others(self, wanted: list[str] | None, key: str) -> list[str]:
        """The `wanted` columns, by default all small ones besides image and label; ConfigError under `key` for one that is not there."""
        ...

    def columns(self, images: np.ndarray, names: list[str]) -> "pyarrow.Table":
        """The values of these columns for these images, (n,) in any order."""
        ...


class Subset:
    """The images of `source` at `indices`, in that order."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.name, self.labels, self.in_memory = source.name, source.labels, source.in_memory
        self.fingerprint = hashlib.sha256(source.fingerprint.encode() + np.ascontiguousarray(indices, dtype="<i8").tobytes()).hexdigest()
        blocks = blocks_of(source)
        self.blocks = None if blocks is None else blocks.of(indices)
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> Record:
        return self._source.read(int(self._indices[index]))


def fingerprints(source: Source) -> list[str]:
    """Of a source, and of those that it is a part of."""
    own = [source.fingerprint]
    return own + fingerprints(source._source) if isinstance(source, Subset) else own


def blocks_of(source: Source) -> Blocks | None:
    """The blocks that a source is read in; None where every image is as near as any other."""
    found: Blocks | None = getattr(source, "blocks", None)
    return found


def open_images(config: DataConfig, *, split: str, index: Path | None = None) -> Source:
    """The images of `data.own` where it is given, which has no splits; else `split` of `data.source`.

    With `index`, which a source of the same settings has written, its images are those, and where they lie is not looked through.
    """
    if config.own.given:
        return open_own(config.own, config, "data.own")
    return open_source(config.source, split=split, config=config, index=index)


def open_own(own: OwnClass, config: DataConfig, key: str) -> "OwnSource":
    """The images of a class of the user's own; ConfigError under `key` where there are none, and under a setting that they do not fit."""
    from autoencoder.data.own import OwnSource

    found = OwnSource(own, config, key)
    found.look()
    _check_fit(found, config, key)
    return found


def open_source(source: str, *, split: str, config: DataConfig, key: str = "data.source", index: Path | None = None) -> Source:
    """Open what `source` names; ConfigError under `key` where it cannot be opened, and under the setting that its images do not fit.

    `split` is one of the source's splits; sources without splits (files, folders that are not split) have one, `train`.
    """
    found = open_files(source, split, config, key, index)
    _check_fit(found, config, key)
    return found


def open_files(source: str, split: str, config: DataConfig, key: str, index: Path | None = None) -> Files:
    """Open what `source` names, whatever its images look like."""
    location = locate(source, key)
    if location.kind == "hub":
        from autoencoder.data.hub import open_hub

        return open_hub(source, split, config, key)
    splits = _splits(source, key) or ["train"]
    if split not in splits:
        raise ConfigError(sibling(key, "split"), split, f"{source} has {' and '.join(splits)}")
    match location.kind:
        case "demo":
            from autoencoder.data.demo import DemoSource

            return DemoSource(split, config)
        case "folder":
            from autoencoder.data.folder import FolderSource

            return FolderSource(location.paths[0], split, config, key, index)
        case "webdataset":
            from autoencoder.data.tars import TarSource

            return TarSource(location, source, config, key, index)
        case _:
            from autoencoder.data.parquet import ParquetSource

            return ParquetSource(location, source, config, key, index)


def _check_fit(source: Source, config: DataConfig, key: str) -> None:
    """Look at three images: ConfigError where most of those that can be read do not fit the settings, as then most of all will not."""
    whole, misfits = 0, []
    for index in spread(len(source), 3).tolist():
        try:
            source.read(index)
            whole += 1
        except BadImage as error:
            misfits += [error] if error.misfit else []
    if len(misfits) > whole:
        first = misfits[0]
        given = None if first.misfit is None else getattr(config, first.misfit)
        raise ConfigError(sibling(key, str(first.misfit)), given, f"{source.name}: {first.id} does not fit: {first.reason}")


def open_train_and_validation(config: DataConfig) -> tuple[Source, Source]:
    """The training and the validation images.

    Validation images come from `validation_own` or `validation_source` if given, else from the source's own validation or test split, else
    they are held out: `validation_images` of them, but at most a tenth. Which images are held out, or are chosen
    from a larger split, depends on the number of images alone, so that runs with other seeds validate on the same.
    """
    train = open_images(config, split=config.split)
    validation: Source
    if config.validation_own.given:
        validation = open_own(config.validation_own, config, "data.validation_own")
    elif config.validation_source is not None:
        own = _validation_split(config.validation_source, "data.validation_source")
        validation = open_source(config.validation_source, split=own or "train", config=config, key="data.validation_source")
    elif not config.own.given and (own := _validation_split(config.source, "data.source", other_than=config.split)) is not None:
        validation = open_source(config.source, split=own, config=config)
    elif len(train) < 2:
        remedy = "it has a single image and none to validate on; give data.validation_source or data.validation_own"
        raise ConfigError(images_key(config.own), config.own.class_path or config.source, remedy)
    else:
        chosen, rest = _choose(len(train), min(config.validation_images, max(1, len(train) // 10)))
        return Subset(train, rest), Subset(train, chosen)
    if len(validation) > config.validation_images:
        validation = Subset(validation, _choose(len(validation), config.validation_images)[0])
    return train, validation


def open_evaluation(config: DataConfig, *, split: str | None, images: int | None) -> Source:
    """The images of `config.own`, or of `config.source`, to measure on: `split`, or its validation or test split, or all; `images` of them
    at most."""
    chosen = None if config.own.given else split or _validation_split(config.source, "data.source")
    source = open_images(config, split=chosen or "train")
    return source if images is None or len(source) <= images else Subset(source, _choose(len(source), images)[0])


def _splits(source: str, key: str) -> list[str]:
    location = locate(source, key)
    match location.kind:
        case "demo":
            return ["train", "validation"]
        case "folder":
            return folder_splits(location.paths[0])
        case "hub":
            from autoencoder.data.hub import hub_splits

            return hub_splits(source, key)
        case _:
            return []


def _validation_split(source: str, key: str, other_than: str | None = None) -> str | None:
    splits = _splits(source, key)
    return next((name for name in VALIDATION_SPLITS if name in splits and name != other_than), None)


def _choose(images: int, chosen: int) -> tuple[np.ndarray, np.ndarray]:
    order = generator(0, "held out", 0).permutation(images)
    return np.sort(order[:chosen]), np.sort(order[chosen:])
