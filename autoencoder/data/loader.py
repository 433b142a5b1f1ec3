"""Batches for training and validation.

What an image looks like in them is a function of seed and position alone: not of process, worker, batch split or resume.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from autoencoder.data.batch import Batch, Example, stack
from autoencoder.data.order import sample_index
from autoencoder.data.sources import BadImage, Record, Source, blocks_of
from autoencoder.data.steps import Steps, part
from autoencoder.data.transforms import train_crop, validation_crop
from autoencoder.data.workers import load, spare_cores
from autoencoder.data_config import DataConfig, images_key
from autoencoder.pixel_recipe import recipe_of
from autoencoder.runtime.errors import UsageError
from autoencoder.runtime.rng import generator

__all__ = ["Batch", "TrainLoader", "ValidationSet"]


class TrainLoader:
    """This process's microbatches, step by step: iterating gives (step, list of Batch) from `first_step` to the last.

    `Steps` says which positions they hold; one that would be empty holds a padding image of weight 0.

    A bad image is replaced by the next readable one of the source. UsageError where more than `max_bad` follow each other,
    or none can be read.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        *,
        seed: int,
        batch_size: int,
        microbatch: int | None,
        images: int,
        latent_shape: tuple[int, ...],
        first_step: int,
        rank: int,
        world: int,
        pin_memory: bool,
    ) -> None:
        self.first_step = first_step
        self._steps = Steps(images=images, batch_size=batch_size, microbatch=microbatch, rank=rank, world=world)
        self._microbatches = _Microbatches(source, config, seed, self._steps, latent_shape)
        self._workers, self._pin_memory = _workers(source, config), pin_memory

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        batches = load(self._microbatches, self._steps.numbers(self.first_step), self._workers, self._pin_memory)
        for step in range(self.first_step, len(self._steps)):
            yield step, [next(batches) for _ in range(self._steps.microbatches(step))]


class ValidationSet:
    """The fixed crops of all images of `source`, with fixed noise; iterating gives this process's batches.

    Processes have contiguous shares and the same number of batches, of at most `batch_size` crops. Crops of a bad image keep their
    place, black and with weight 0; a batch that would be empty holds a padding image of weight 0.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        *,
        seed: int,
        batch_size: int,
        latent_shape: tuple[int, ...],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._crops = _ValidationBatches(source, config, seed, batch_size, latent_shape, rank, world)
        self._workers = _workers(source, config)
        self.photos, self.side = len(source), config.resolution

    def __len__(self) -> int:
        """Crops of all processes."""
        return self._crops.crops

    def batch(self, positions: Sequence[int]) -> Batch:
        """The crops at these positions."""
        return stack(*self._crops.examples(positions), self._crops.recipe)

    def pixels(self, positions: Sequence[int]) -> Tensor:
        """The crops at these positions, (N, C, R, R)."""
        return self.batch(positions).pixels

    def __iter__(self) -> Iterator[Batch]:
        return load(self._crops, range(len(self._crops)), self._workers, pin_memory=False)


class _Microbatches:
    def __init__(self, source: Source, config: DataConfig, seed: int, steps: Steps, latent_shape: tuple[int, ...]) -> None:
        self._source, self._config, self._seed = source, config, seed
        self._steps, self._latent_shape, self._recipe, self._blocks = steps, latent_shape, recipe_of(config), blocks_of(source)

    def __getitem__(self, number: int) -> Batch:
        bad: list[tuple[str, str]] = []
        examples = [self._example(position, bad) for position in self._steps.positions(number)]
        return stack(examples or [_padding(self._config, self._latent_shape)], bad, self._recipe)

    def _example(self, position: int, bad: list[tuple[str, str]]) -> Example:
        index = sample_index(self._seed, len(self._source), position, self._blocks)
        record, photo = _read_or_next(self._source, index, self._config, bad)
        crop = train_crop(record.pixels, self._config, generator(self._seed, "crop", position), record.valid)
        noise = generator(self._seed, "noise", position).standard_normal(self._latent_shape, dtype=np.float32)
        return _example(crop, noise, record, record.id, position, photo)


class _ValidationBatches:
    def __init__(
        self, source: Source, config: DataConfig, seed: int, batch_size: int, latent_shape: tuple[int, ...], rank: int, world: int
    ) -> None:
        self._source, self._config, self._seed, self._latent_shape = source, config, seed, latent_shape
        self.recipe = recipe_of(config)
        self._crops_an_image = config.validation_grid**2
        self.crops = len(source) * self._crops_an_image
        self._share, self._batch_size = part(range(self.crops), rank, world), batch_size
        self._batches = math.ceil(math.ceil(self.crops / world) / batch_size)

    def __len__(self) -> int:
        return self._batches

    def __getitem__(self, number: int) -> Batch:
        examples, bad = self.examples(self._share[number * self._batch_size : (number + 1) * self._batch_size])
        return stack(examples or [_padding(self._config, self._latent_shape)], bad, self.recipe)

    def examples(self, positions: Sequence[int]) -> tuple[list[Example], list[tuple[str, str]]]:
        """The crops at these positions, each image read once, and the bad images among them."""
        records: dict[int, Record | None] = {}
        bad: list[tuple[str, str]] = []
        for photo in dict.fromkeys(position // self._crops_an_image for position in positions):
            try:
                records[photo] = self._source.read(photo)
            except BadImage as error:
                records[photo] = None
                bad.append((error.id, error.reason))
        return [self._example(position, records[position // self._crops_an_image]) for position in positions], bad

    def _example(self, position: int, record: Record | None) -> Example:
        if record is None:
            return _padding(self._config, self._latent_shape)
        photo, k = divmod(position, self._crops_an_image)
        noise = generator(self._seed, "validation", position).standard_normal(self._latent_shape, dtype=np.float32)
        id = record.id if self._crops_an_image == 1 else f"{record.id}#{k}"
        return _example(validation_crop(record.pixels, self._config, k, record.valid), noise, record, id, position, photo)


def _example(crop: tuple[np.ndarray, np.ndarray | None], noise: np.ndarray, record: Record, id: str, position: int, photo: int) -> Example:
    """A crop of a record; one whose every pixel is missing weighs nothing."""
    pixels, valid = crop
    return Example(pixels, noise, record.label, id, position, photo, weight=1.0 if valid is None or valid.any() else 0.0, valid=valid)


def _read_or_next(source: Source, index: int, config: DataConfig, bad: list[tuple[str, str]]) -> tuple[Record, int]:
    """The image at `index`, or the first readable one after it, and its index; unreadable ones join `bad`."""
    reasons, max_bad = [], config.max_bad
    for photo in ((index + offset) % len(source) for offset in range(min(len(source), max_bad + 1))):
        try:
            return source.read(photo), photo
        except BadImage as error:
            reasons.append(f"{error.id} ({error.reason})")
            bad.append((error.id, error.reason))
    extent = "none of its images" if len(reasons) == len(source) else f"none of {len(reasons)} images in a row (data.max_bad={max_bad})"
    remedy = "mend what its __getitem__ gives" if config.own.given else "check that these are image files"
    raise UsageError(f"{images_key(config.own)}: {source.name}: {extent} can be read: {'; '.join(reasons[:3])}; {remedy}")


def _padding(config: DataConfig, latent_shape: tuple[int, ...]) -> Example:
    side = config.resolution
    return Example(np.zeros((side, side, config.channels), np.uint8), np.zeros(latent_shape, np.float32))


def _workers(source: Source, config: DataConfig) -> int:
    """Loader processes: as configured, else none for look-ups, else the cores that this process has beside itself."""
    if config.workers is not None:
        return config.workers
    return 0 if source.in_memory else spare_cores()
