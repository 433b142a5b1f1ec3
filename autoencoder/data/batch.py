"""One microbatch of one process."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One image of a batch before it is stacked."""

    pixels: np.ndarray
    """(R, R, C), uint8 or uint16."""
    noise: np.ndarray
    """(latent channels, h, w) float32."""
    label: int = -1
    id: str = ""
    position: int = -1
    photo: int = -1
    weight: float = 0.0


@dataclass
class Batch:
    """Images that go through the network together, with all that is random about them."""

    pixels: Tensor
    """(B, C, R, R), uint8, or uint16 where any image has 16 bits."""
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
    """(B,) float32: 1, or 0 for padding and for validation crops of a bad image."""
    bad: list[tuple[str, str]]
    """(id, reason) of images that could not be read while this batch was."""
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


def stack(examples: list[Example], bad: list[tuple[str, str]]) -> Batch:
    """Stack at least one example; 8-bit pixels beside 16-bit ones become 257 k, which is the same image value."""
    height, width, channels = examples[0].pixels.shape
    deep = any(example.pixels.dtype == np.uint16 for example in examples)
    pixels = np.empty((len(examples), channels, height, width), dtype=np.uint16 if deep else np.uint8)
    for row, example in zip(pixels, examples, strict=True):
        row[:] = example.pixels.transpose(2, 0, 1)
        if deep and example.pixels.dtype == np.uint8:
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
    )
