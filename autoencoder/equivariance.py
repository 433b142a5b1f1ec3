"""Equivariance: decoding transformed latents gives the transformed image (EQ-VAE, Kouzelis et al. 2025, eq. 6).

A transformation scales a square map and turns it by quarters. Scaling is linear interpolation with an antialiasing filter, the same
for latents and images, as a product with a matrix: deterministic on every device.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from autoencoder.equivariance_config import EquivarianceConfig
from autoencoder.runtime.rng import generator


class Transformation(NamedTuple):
    """What is done to some rows of a batch."""

    rows: Tensor
    """(n,) int64: rows of the batch."""
    turns: Tensor
    """(n,) int64: quarter turns of each."""
    side: int
    """Side of the latents afterwards."""


@functools.cache
def _weights(size: int, to: int) -> tuple[tuple[float, ...], ...]:
    """Row j has the weights with which `size` values make value j of `to`: a triangle as wide as the coarser of the two grids."""
    step = size / to
    width = max(step, 1.0)
    rows = []
    for j in range(to):
        centre = (j + 0.5) * step
        triangle = [max(0.0, 1 - abs(i + 0.5 - centre) / width) for i in range(size)]
        rows.append(tuple(value / sum(triangle) for value in triangle))
    return tuple(rows)


@functools.lru_cache(maxsize=256)
def _matrix(size: int, to: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Once for each size: a copy from the host waits for the device.
    return torch.tensor(_weights(size, to), dtype=dtype, device=device)


def resize(maps: Tensor, side: int) -> Tensor:
    """Square maps (B, C, h, h) at (B, C, side, side): torch's bilinear interpolation with antialiasing, at least fp32."""
    with torch.autocast(maps.device.type, enabled=False):
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        if maps.shape[-1] == side:
            return maps
        matrix = _matrix(maps.shape[-1], side, maps.dtype, maps.device)
        return matrix @ maps @ matrix.mT


def turn(maps: Tensor, turns: Tensor) -> Tensor:
    """Square maps (n, C, h, h), each turned by its number of quarter turns (n,)."""
    every = torch.stack([torch.rot90(maps, k, (-2, -1)) for k in range(4)])  # (4, n, C, h, h)
    return every[turns, torch.arange(len(maps), device=maps.device)]


def transform(maps: Tensor, how: Transformation, factor: int = 1) -> Tensor:
    """The rows of (B, C, h, h) that are transformed, (n, C, h', h'); `factor` is the size of the maps in units of the latents'."""
    return turn(resize(maps.index_select(0, how.rows), how.side * factor), how.turns)


class Equivariance:
    """Which images of a run are transformed, and how: functions of seed and progress alone.

    Images are taken by systematic sampling of their positions, so that any n in a row, of a microbatch say, hold `share` n of them but
    for one, and a run's cost is even. Quarter turns (0 to 3) are each image's own. The scale is a step's own, as decoders normalise
    over an image and so cannot decode latents of several sizes as one batch.
    """

    def __init__(self, config: EquivarianceConfig, *, seed: int, latent_side: int) -> None:
        self.config, self.seed, self.sides = config, seed, config.sides(latent_side)
        self._offset = generator(seed, "equivariance", 0).random()

    def taken(self, position: int) -> bool:
        """Whether the image at this position of the run is transformed."""
        share = self.config.share
        return math.floor((position + 1) * share + self._offset) > math.floor(position * share + self._offset)

    def choose(self, positions: Sequence[int]) -> Tensor:
        """(2, n) int64: rows of a microbatch that are transformed, and the quarter turns of each; a position of -1 is padding."""
        rows = [row for row, position in enumerate(positions) if position >= 0 and self.taken(position)]
        turns = [int(generator(self.seed, "quarter turns", positions[row]).integers(4)) for row in rows]
        return torch.tensor([rows, turns], dtype=torch.int64)

    def side(self, step: int) -> int:
        """The side that a step's latents are scaled to."""
        return self.sides[int(generator(self.seed, "scale", step).integers(len(self.sides)))]

    def transformation(self, chosen: Tensor, step: int) -> Transformation | None:
        """What is done in a step to what `choose` chose; None where that is nothing."""
        return Transformation(chosen[0], chosen[1], self.side(step)) if chosen.shape[1] else None
