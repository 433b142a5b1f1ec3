"""Batches for training and validation.

What an image looks like in them is a function of seed and position alone: not of process, worker, batch split or resume.
"""

import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autoencoder.config import DataConfig
from autoencoder.data.batch import Batch, Example, stack
from autoencoder.data.order import sample_index
from autoencoder.data.sources import BadImage, Record, Source
from autoencoder.data.transforms import train_crop, validation_crop
from autoencoder.runtime.errors import UsageError
from autoencoder.runtime.rng import generator

__all__ = ["Batch", "TrainLoader", "ValidationSet"]

_MOST_WORKERS = 8


class TrainLoader:
    """This process's microbatches, step by step: iterating gives (step, list of Batch) from `first_step` to `last_step`, exclusive.

    Step s of the run sees positions s * batch_size up to (s + 1) * batch_size, the last step what is left of `images`.
    They are split over `world` processes and each share into microbatches, contiguously and as evenly as possible; all processes
    have the same number of microbatches, and one that would be empty holds a padding image of weight 0.

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
        self.first_step, self.last_step = first_step, math.ceil(images / batch_size)
        self._microbatches = _Microbatches(source, config, seed, batch_size, microbatch, images, latent_shape, rank, world)
        self._workers, self._pin_memory = _workers(source, config), pin_memory

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        counts = [self._microbatches.count(step) for step in range(self.first_step, self.last_step)]
        # Only the last step may have fewer microbatches, so that step and part of a number are a division.
        first = self.first_step * self._microbatches.count(0)
        batches = _batches(self._microbatches, range(first, first + sum(counts)), self._workers, self._pin_memory)
        for step, count in enumerate(counts, self.first_step):
            yield step, [next(batches) for _ in range(count)]


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

    def __len__(self) -> int:
        """Crops of all processes."""
        return self._crops.crops

    def pixels(self, positions: Sequence[int]) -> Tensor:
        """The crops at these positions, (N, C, R, R)."""
        return stack(*self._crops.examples(positions)).pixels

    def __iter__(self) -> Iterator[Batch]:
        return _batches(self._crops, range(len(self._crops)), self._workers, pin_memory=False)


class _Microbatches(Dataset[Batch]):
    def __init__(
        self, source: Source, config: DataConfig, seed: int, batch_size: int, microbatch: int | None, images: int,
        latent_shape: tuple[int, ...], rank: int, world: int,
    ) -> None:  # fmt: skip
        self._source, self._config, self._seed = source, config, seed
        self._batch_size, self._microbatch, self._images = batch_size, microbatch, images
        self._latent_shape, self._rank, self._world = latent_shape, rank, world

    def count(self, step: int) -> int:
        """Microbatches of a process in `step`."""
        largest_share = math.ceil(self._size(step) / self._world)
        return math.ceil(largest_share / self._microbatch) if self._microbatch else 1

    def __getitem__(self, number: int) -> Batch:
        step, part = divmod(number, self.count(0))
        share = _part(range(step * self._batch_size, step * self._batch_size + self._size(step)), self._rank, self._world)
        bad: list[tuple[str, str]] = []
        examples = [self._example(position, bad) for position in _part(share, part, self.count(step))]
        return stack(examples or [_padding(self._config, self._latent_shape)], bad)

    def _size(self, step: int) -> int:
        return min(self._batch_size, self._images - step * self._batch_size)

    def _example(self, position: int, bad: list[tuple[str, str]]) -> Example:
        record, photo = _read_or_next(self._source, sample_index(self._seed, len(self._source), position), self._config.max_bad, bad)
        crop = train_crop(record.pixels, self._config, generator(self._seed, "crop", position))
        noise = generator(self._seed, "noise", position).standard_normal(self._latent_shape, dtype=np.float32)
        return Example(crop, noise, record.label, record.id, position, photo, weight=1.0)


class _ValidationBatches(Dataset[Batch]):
    def __init__(
        self, source: Source, config: DataConfig, seed: int, batch_size: int, latent_shape: tuple[int, ...], rank: int, world: int
    ) -> None:
        self._source, self._config, self._seed, self._latent_shape = source, config, seed, latent_shape
        self._crops_an_image = config.validation_grid**2
        self.crops = len(source) * self._crops_an_image
        self._share, self._batch_size = _part(range(self.crops), rank, world), batch_size
        self._batches = math.ceil(math.ceil(self.crops / world) / batch_size)

    def __len__(self) -> int:
        return self._batches

    def __getitem__(self, number: int) -> Batch:
        examples, bad = self.examples(self._share[number * self._batch_size : (number + 1) * self._batch_size])
        return stack(examples or [_padding(self._config, self._latent_shape)], bad)

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
        return Example(validation_crop(record.pixels, self._config, k), noise, record.label, id, position, photo, weight=1.0)


def _read_or_next(source: Source, index: int, max_bad: int, bad: list[tuple[str, str]]) -> tuple[Record, int]:
    """The image at `index`, or the first readable one after it, and its index; unreadable ones join `bad`."""
    reasons = []
    for photo in ((index + offset) % len(source) for offset in range(min(len(source), max_bad + 1))):
        try:
            return source.read(photo), photo
        except BadImage as error:
            reasons.append(f"{error.id} ({error.reason})")
            bad.append((error.id, error.reason))
    extent = "none of its images" if len(reasons) == len(source) else f"none of {len(reasons)} images in a row (data.max_bad={max_bad})"
    raise UsageError(f"data.source: {source.name}: {extent} can be read: {'; '.join(reasons[:3])}; check that these are image files")


def _padding(config: DataConfig, latent_shape: tuple[int, ...]) -> Example:
    side = config.resolution
    return Example(np.zeros((side, side, config.channels), np.uint8), np.zeros(latent_shape, np.float32))


def _part(whole: range, part: int, parts: int) -> range:
    """Part `part` of `whole` cut into `parts` as evenly as possible."""
    return whole[len(whole) * part // parts : len(whole) * (part + 1) // parts]


def _workers(source: Source, config: DataConfig) -> int:
    """Loader processes: as configured, else none for look-ups, else the cores that this process has beside itself."""
    if config.workers is not None:
        return config.workers
    if source.in_memory:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(_MOST_WORKERS, max(1, cores // processes - 1))


class _Guarded(Dataset["Batch | UsageError"]):
    """Hands a UsageError over as an item: raised in a loader process it would reach the user wrapped in a traceback."""

    def __init__(self, read: Callable[[int], Batch]) -> None:
        self._read = read

    def __getitem__(self, number: int) -> "Batch | UsageError":
        try:
            return self._read(number)
        except UsageError as error:
            return error


def _batches(batches: Dataset[Batch], numbers: range, workers: int, pin_memory: bool) -> Iterator[Batch]:
    # With a generator of its own the loader leaves torch's global one alone.
    loader = DataLoader(
        _Guarded(batches.__getitem__),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        worker_init_fn=_ignore_signals,
    )
    for item in loader:
        if isinstance(item, UsageError):
            raise item
        yield item


def _ignore_signals(_worker: int) -> None:
    """A signal to the process group is the training process's to answer: it needs its loader until the checkpoint is written."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
