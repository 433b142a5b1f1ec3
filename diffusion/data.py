"""Training and validation batches of latents; everything random is a function of seed and position."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autoencoder.data.order import sample_index
from autoencoder.data.steps import Steps
from autoencoder.data.workers import load
from autoencoder.latents.reader import Latents, LatentsError, Rows
from autoencoder.runtime.errors import ConfigError, UsageError
from autoencoder.runtime.rng import generator
from diffusion import times
from diffusion.config import TrainDiffusionConfig
from diffusion.denoiser import NULL_CLASS
from diffusion.space import LatentSpace

FEW_IMAGES = 100
"""Data sets of fewer images hold out rows, not images."""


@dataclass
class LatentBatch:
    """Rows that go through the network together."""

    latents: Tensor
    """(B, c, h, w) float32, normalised."""
    noise: Tensor
    """(B, c, h, w) float32, standard normal."""
    t: Tensor
    """(B,) float32 in (0, 1)."""
    labels: Tensor
    """(B,) int64; `NULL_CLASS` where there is none or it was dropped."""
    weight: Tensor
    """(B,) float32: 1, or 0 for padding."""

    def to(self, device: torch.device) -> "LatentBatch":
        return LatentBatch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})

    def pin_memory(self) -> "LatentBatch":
        return LatentBatch(**{name: value.pin_memory() for name, value in vars(self).items()})


def hold_out(latents: Latents, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers to train on and to validate on, both sorted.

    Held out are `most` rows, at most a tenth; which, depends on the data set alone. All rows of an image stay together (at
    least one image's), but in data sets of fewer than `FEW_IMAGES` images.
    """
    images = latents.ids // latents.rows_per_image
    # Rows by image; sorting takes no time where they are in this order already.
    rows = np.argsort(images, kind="stable")
    starts = np.flatnonzero(np.diff(images[rows], prepend=-1))
    counts = np.diff(starts, append=len(rows))
    wanted = max(1, min(most, len(latents) // 10))
    order = generator(0, "held out latents", 0)
    held = np.zeros(len(latents), dtype=bool)
    if len(starts) < FEW_IMAGES:
        held[order.permutation(len(latents))[:wanted]] = True
    else:
        shuffled = order.permutation(len(starts))
        # As many images as have `wanted` rows at most: no more of them than that need be looked at.
        few = shuffled[: wanted + 1]
        chosen = few[: max(1, int(np.searchsorted(np.cumsum(counts[few]), wanted, side="right")))]
        for image in chosen:
            held[rows[starts[image] : starts[image] + counts[image]]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


class LatentLoader:
    """This process's microbatches, step by step: iterating gives (step, list of LatentBatch) from `first_step` to the last."""

    def __init__(self, rows: "TrainRows", steps: Steps, *, first_step: int, workers: int | None, pin_memory: bool) -> None:
        self._rows, self._steps, self._first_step = rows, steps, first_step
        self._workers = (2 if pin_memory else 0) if workers is None else workers
        self._pin_memory = pin_memory

    def __iter__(self) -> Iterator[tuple[int, list[LatentBatch]]]:
        batches = load(_Microbatches(self._rows, self._steps), self._steps.numbers(self._first_step), self._workers, self._pin_memory)
        for step in range(self._first_step, len(self._steps)):
            yield step, [next(batches) for _ in range(self._steps.microbatches(step))]


class TrainRows:
    """The training rows of a data set, and what a position of the run makes of one."""

    def __init__(self, latents: Latents, rows: np.ndarray, space: LatentSpace, config: TrainDiffusionConfig) -> None:
        self.latents, self.rows, self.space, self.config = latents, rows, space, config
        self.seed = config.train.seed

    def batch(self, positions: range) -> LatentBatch:
        """The batch of these positions; an empty range gives a padding row of weight 0."""
        asked = positions or range(1)
        read = gather(self.latents, self.rows[[sample_index(self.seed, len(self.rows), p) for p in asked]])
        draws = [generator(self.seed, "diffusion", p) for p in asked]
        shape = self.space.shape
        # One stream a position, its draws in this order: time, label drop, posterior noise, process noise.
        normal = torch.tensor([g.standard_normal() for g in draws], dtype=torch.float32)
        dropped = np.array([g.random() < self.config.conditioning.dropout for g in draws])
        posterior_noise, noise = (np.stack([g.standard_normal(shape, dtype=np.float32) for g in draws]) for _ in range(2))
        labels = torch.from_numpy(np.where(dropped, NULL_CLASS, conditioning_labels(read, self.space)))
        return LatentBatch(
            latents=draw(read, posterior_noise, self.space, self.config.data.draw),
            noise=torch.from_numpy(noise),
            t=times.training_time(self.config.process, normal),
            labels=labels,
            weight=torch.full((len(draws),), float(bool(positions))),
        )


class _Microbatches:
    def __init__(self, rows: TrainRows, steps: Steps) -> None:
        self._rows, self._steps = rows, steps

    def __getitem__(self, number: int) -> LatentBatch:
        return self._rows.batch(self._steps.positions(number))


class ValidationRows:
    """Held-out rows with their draws of posterior and noise, the same at every validation and in every process."""

    def __init__(self, latents: Latents, rows: np.ndarray, space: LatentSpace, config: TrainDiffusionConfig) -> None:
        self.latents, self.rows, self.space, self.config = latents, rows, space, config

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, places: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised latents, noise, both (N, c, h, w), and labels (N,) of the held-out rows of these places."""
        read = gather(self.latents, self.rows[list(places)])
        streams = [generator(self.config.train.seed, "diffusion validation", place) for place in places]
        posterior_noise, noise = (np.stack([g.standard_normal(self.space.shape, dtype=np.float32) for g in streams]) for _ in range(2))
        latents = draw(read, posterior_noise, self.space, self.config.data.draw)
        return latents, torch.from_numpy(noise), torch.from_numpy(conditioning_labels(read, self.space))


def gather(latents: Latents, rows: np.ndarray) -> Rows:
    """The rows, or a UsageError that names the one that cannot be used."""
    try:
        return latents.gather(rows)
    except LatentsError as error:
        raise UsageError(f"latents: {error}") from error


def draw(rows: Rows, noise: np.ndarray, space: LatentSpace, how: str) -> Tensor:
    """Normalised latents (N, c, h, w) from stored moments: a draw of the posterior, or its mean."""
    if how == "mean" or rows.logvar is None:
        return space.normalize(torch.from_numpy(rows.mean))
    return space.normalize(torch.from_numpy(rows.mean + np.exp(0.5 * rows.logvar) * noise))


def conditioning_labels(rows: Rows, space: LatentSpace) -> np.ndarray:
    """Labels (N,) for the network: `NULL_CLASS` for a run without classes and for rows without a label."""
    return np.where((rows.label < 0) | (space.labels is None), NULL_CLASS, rows.label)


def check(latents: Latents, training: int, config: TrainDiffusionConfig) -> None:
    """Refuse a data set, of whose rows `training` are left to train on, that cannot be used as configured.

    Raises:
        ConfigError: fewer training rows than a batch, or draws of a posterior that was not stored.
    """
    if config.data.draw == "sample" and not latents.has_logvar:
        raise ConfigError("data.draw", "sample", f"{latents.folder} holds means only; give data.draw=mean, or encode with moments")
    if training < config.train.batch_size:
        raise ConfigError(
            "train.batch_size", config.train.batch_size,
            f"the latents have {len(latents)} rows, {training} of them to train on, less than a batch; "
            + (f"give at most {training}" if training else "encode more images"),
        )  # fmt: skip
