"""Do the latents matter to the decoder? Images decoded from other images' latents."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from autoencoder.data.batch import Batch
from autoencoder.data.pixels import to_images
from autoencoder.likelihood import Likelihood
from autoencoder.pixel_recipe import PixelRecipe

T = TypeVar("T")

MOST_IMAGES = 64
"""Images that are decoded once more."""


@dataclass(frozen=True)
class Shuffled:
    """What images cost when each is decoded from another one's latents."""

    nll_nats: float
    """-log p(x|z) with z of another image, mean nats an image."""
    delta_nats: float
    """By how much that exceeds the NLL of the same images from their own latents; near 0 where the decoder ignores its latents."""


@dataclass(frozen=True)
class _Kept:
    """One image as it is kept until all have been seen."""

    key: int
    photo: int
    position: int
    pixels: np.ndarray
    """An array: torch does not pickle 16-bit pixels for other processes."""
    valid: Tensor | None
    latents: Tensor
    nll: float


class LatentShuffle:
    """Keeps a few spread images with a posterior sample each, and pairs them anew when all have been seen.

    Which images and which pairs is a function of the positions alone: not of processes, batches or their order. Golden-ratio steps spread
    the choice evenly over any number of positions (Knuth 1973, sec. 6.4).
    """

    def __init__(self, recipe: PixelRecipe, most: int = MOST_IMAGES) -> None:
        self.recipe, self.most = recipe, most
        self._kept: list[_Kept] = []

    def add(self, batch: Batch, latents: Tensor, nll: Tensor) -> None:
        """A batch with the sample (B, ...) that each image was decoded from, and -log p(x|z) of each, (B,)."""
        limit = self._kept[-1].key if len(self._kept) == self.most else 2**32
        keys = (batch.position * 2654435769) % 2**32
        chosen = [i for i, (key, real) in enumerate(zip(keys.tolist(), (batch.weight > 0).tolist(), strict=True)) if real and key < limit]
        rows = [
            _Kept(
                key=int(keys[i]),
                photo=int(batch.photo[i]),
                position=int(batch.position[i]),
                pixels=batch.pixels[i].cpu().numpy(),
                valid=None if batch.valid is None else batch.valid[i].cpu(),
                latents=latents[i].cpu(),
                nll=float(nll[i]),
            )
            for i in chosen
        ]
        self._keep(self._kept + rows)

    def _keep(self, rows: list[_Kept]) -> None:
        self._kept = sorted(rows, key=lambda row: row.key)[: self.most]

    def measure(self, decode: Callable[[Tensor], Tensor], likelihood: Likelihood, device: torch.device, at_once: int) -> Shuffled | None:
        """The NLL with latents shuffled; None for fewer than two images. Every process calls it and gets the whole.

        Images go by photo, each with the latents of the one as many places on as any photo has crops: another photo's, unless one photo
        has more than half of them.
        """
        self._keep([row for part in _of_all_processes(self._kept) for row in part])
        images = sorted(self._kept, key=lambda row: (row.photo, row.position))
        if len(images) < 2:
            return None
        photos = [row.photo for row in images]
        shift = min(max(photos.count(photo) for photo in photos), len(images) // 2)
        pairs = [(row, images[(i + shift) % len(images)]) for i, row in enumerate(images)]
        rank, world = _place()
        mine = range(rank, len(pairs), world)
        nll: dict[int, float] = {}
        for start in range(0, len(mine), at_once):
            share = mine[start : start + at_once]
            pixels = torch.from_numpy(np.stack([pairs[i][0].pixels for i in share])).to(device)
            known = [pairs[i][0].valid for i in share]
            valid = torch.stack([v for v in known if v is not None]).to(device) if known[0] is not None else None
            latents = torch.stack([pairs[i][1].latents for i in share]).to(device)
            values = -likelihood.observed(valid).log_prob(to_images(pixels, self.recipe, valid), decode(latents))
            nll |= dict(zip(share, values.tolist(), strict=True))
        for part in _of_all_processes(nll):
            nll |= part
        shuffled = sum(nll[i] for i in range(len(pairs))) / len(pairs)
        return Shuffled(shuffled, shuffled - sum(row.nll for row in images) / len(images))


def _place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _of_all_processes(mine: T) -> list[T]:
    parts = [mine] * _place()[1]
    if len(parts) > 1:
        torch.distributed.all_gather_object(parts, mine)
    return parts
