"""Images of any channels as pictures: which channels are shown, and what of their range is black and white."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoencoder.data.pixels import to_pixels
from autoencoder.data_config import DataConfig
from autoencoder.report.pictures import GAP

LEAST_SPAN = 1e-3
"""Least part of the range, where images span [-1, 1], that is stretched from black to white: a flat channel is not noise blown up."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """How images of one recipe are shown. What encoders see does not depend on it."""

    channels: tuple[int, ...] | None = None
    """One or three to show; None: the only one of one or two, the first three of more."""
    stretch: tuple[float, float] | None = None
    """Percentiles of each shown channel that become black and white; None shows the range as it is."""

    @classmethod
    def of(cls, data: DataConfig) -> "Preview":
        """As a run's settings have it."""
        return cls(channels=data.preview, stretch=data.stretch)

    @classmethod
    def from_json(cls, preprocessing: dict[str, Any] | None) -> "Preview":
        """As `preprocessing.json` has it under `preview`; without, as it is by default."""
        told = (preprocessing or {}).get("preview", {})
        return cls(**{name: tuple(value) for name, value in told.items() if value is not None})

    def to_json(self) -> dict[str, Any]:
        """What goes under `preview` in `preprocessing.json`; nothing where all is by default."""
        told = {"channels": self.channels, "stretch": self.stretch}
        return {name: list(value) for name, value in told.items() if value is not None}

    def pixels(self, images: Tensor, *others: Tensor, valid: Tensor | None = None) -> list[Tensor]:
        """Pictures, uint8 (N, 1 or 3, H, W) on the CPU, of images (N, C, H, W) in [-1, 1] and of others of their shape.

        The percentiles are those of `images`, over all of them, and stretch the others alike. Missing pixels are grey in all.
        """
        shown = self.channels or ((0,) if images.shape[1] < 3 else (0, 1, 2))
        ends = None if self.stretch is None else _ends(images[:, shown], valid, self.stretch)
        pictures = []
        for stack in (images, *others):
            picked = stack[:, shown].float()
            if ends is not None:
                low, high = (end.to(picked.device)[:, None, None] for end in ends)
                picked = 2 * (picked - low) / (high - low) - 1
            pixels = to_pixels(picked)
            pictures.append((pixels if valid is None else pixels.where(valid.to(pixels.device), GAP)).cpu())
        return pictures

    def each(self, images: Tensor) -> Tensor:
        """Pictures of images (N, C, H, W) that have no originals, each stretched by itself: whatever others it is among."""
        return torch.cat([self.pixels(image[None])[0] for image in images])


def _ends(images: Tensor, valid: Tensor | None, percentiles: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Low and high of each channel (C,), at least `LEAST_SPAN` apart."""
    channels = images.float().clamp(-1, 1).transpose(0, 1)  # (C, N, H, W)
    seen = channels.flatten(1) if valid is None else channels[:, valid.to(images.device)[:, 0]]
    values = seen.cpu().numpy() if seen.shape[1] else np.zeros((len(channels), 1), np.float32)
    low, high = torch.from_numpy(np.percentile(values, percentiles, axis=1)).float()
    return low, torch.maximum(high, low + LEAST_SPAN)
