"""One microbatch of one process."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoencoder.pixel_recipe import PixelRecipe

_DTYPES = (np.uint8, np.uint16, np.int16, np.float32)


@dataclass(frozen=True)
class Example:
    """One image of a batch before it is stacked."""

    pixels: np.ndarray
    """(R, R, C), of a dtype that records have."""
    noise: np.ndarray
    """(latent channels, h, w) float32."""
    label: int = -1
    id: str = ""
    position: int = -1
    photo: int = -1
    weight: float = 0.0
    valid: np.ndarray | None = None
    """(R, R) bool; None where no pixel is missing."""


@dataclass
class Batch:
    """Images that go through the network together, with all that is random about them."""

    pixels: Tensor
    """(B, C, R, R), uint8, or uint16 where any image has 16 bits; of a stated range also int16 and float32. 0 where missing."""
    labels: Tensor
    """(B,) int64; -1 where there is none."""
    ids: list[str]
    """Names of the images within their source."""
    noise: Tensor
    """(B, *latent_shape) float32, standard normal: a function of seed and position."""
    position: Tensor
    """(B,) int64: the image's place in the run, or the crop's among the validation crops; -1 for padding."""
    photo: Tensor
    """(B,) int64: index in the source of the photo that the crop is from; -1 for padding."""
    weight: Tensor
    """(B,) float32: 1, or 0 for padding, for crops of a bad image and for those whose every pixel is missing."""
    bad: list[tuple[str, str]]
    """(id, reason) of images that could not be read while this batch was."""
    valid: Tensor | None = None
    """(B, 1, R, R) bool, false where pixels are missing and in padding; None where the recipe lets none be missing."""
    transformed: Tensor | None = None
    """(2, n) int64: rows whose latents are also decoded transformed, and the quarter turns of each, where that is asked for."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on `device`; copies from pinned memory overlap with computation."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch with its tensors in page-locked memory."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)


def stack(examples: list[Example], bad: list[tuple[str, str]], recipe: PixelRecipe) -> Batch:
    """Stack at least one example.

    At full range 8-bit pixels beside 16-bit ones become 257 k, which is the same image value; of a stated range values stay what they are.
    """
    height, width, channels = examples[0].pixels.shape
    dtype = np.result_type(*(example.pixels.dtype for example in examples))
    pixels = np.empty((len(examples), channels, height, width), dtype=dtype if dtype in _DTYPES else np.float32)
    for row, example in zip(pixels, examples, strict=True):
        row[:] = example.pixels.transpose(2, 0, 1)
        if not recipe.ranged and dtype == np.uint16 and example.pixels.dtype == np.uint8:
            row *= 257
    return Batch(
        pixels=torch.from_numpy(pixels),
        labels=torch.tensor([example.label for example in examples]),
        ids=[example.id for example in examples],
        noise=torch.from_numpy(np.stack([example.noise for example in examples])),
        position=torch.tensor([example.position for example in examples]),
        photo=torch.tensor([example.photo for example in examples]),
        weight=torch.tensor([example.weight for example in examples], dtype=torch.float32),
        bad=bad,
        valid=torch.from_numpy(np.stack([_valid(example) for example in examples])) if recipe.may_miss else None,
    )


def _valid(example: Example) -> np.ndarray:
    """(1, R, R): what is said, else everything, of padding nothing."""
    if example.valid is not None:
        return example.valid[None]
    return np.full((1, *example.pixels.shape[:2]), example.weight > 0)
