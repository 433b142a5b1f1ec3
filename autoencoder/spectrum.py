"""Spectra of latents and images: how much of their energy lies at which frequency.

By the discrete cosine transform, which has no edge where a map ends (an FFT sees a jump there, and energy at high frequencies that
is not in the map). Frequencies are in units of the grid's own Nyquist frequency: 1 is a wave of two sites.
"""

import math

import torch
from torch import Tensor

MOST_BANDS = 16
"""Bands of a spectrum that is drawn; a map of fewer sites a side has as many bands as sites."""


def cosine_power(maps: Tensor) -> Tensor:
    """Power of each coefficient of the orthonormal two-dimensional DCT-II, the shape of `maps` (..., h, w); its sum is that of squares."""
    power = maps
    for axis in (-1, -2):
        n = maps.shape[axis]
        k, i = torch.arange(n, dtype=maps.dtype)[:, None], torch.arange(n, dtype=maps.dtype)[None]
        basis = torch.cos(math.pi * (i + 0.5) * k / n) * math.sqrt(2 / n)
        basis[0] /= math.sqrt(2)
        power = torch.movedim(torch.movedim(power, axis, -1) @ basis.to(maps.device).mT, -1, axis)
    return power.square()


def frequency(height: int, width: int) -> Tensor:
    """Radial frequency of each coefficient, (h, w) float64, 0 for the mean and 1 for a wave of two sites along an axis (sqrt 2 both)."""
    across, down = torch.arange(width, dtype=torch.float64) / width, torch.arange(height, dtype=torch.float64) / height
    return torch.hypot(down[:, None], across[None])


class Spectrum:
    """Power by frequency of maps (N, C, h, w), mean over maps and channels; each channel counts alike, whatever its variance."""

    def __init__(self) -> None:
        self._power: Tensor | None = None

    def add(self, maps: Tensor) -> None:
        """Add maps; the mean of each is left out."""
        power = cosine_power(maps.detach().double().cpu()).sum(0)  # (C, h, w)
        self._power = power if self._power is None else self._power + power

    @property
    def power(self) -> Tensor:
        """Share of the energy at each coefficient, (h, w)."""
        if self._power is None:
            raise ValueError("a spectrum of no maps; add some first")
        power = self._power.clone()
        power[:, 0, 0] = 0
        energy = power.sum((1, 2))
        # A constant channel has what rounding leaves of one.
        varied = energy > 1e-20 * self._power.sum((1, 2))
        if not varied.any():
            return power[0]
        return (power[varied] / energy[varied, None, None]).mean(0)

    def octaves(self) -> list[dict[str, float]]:
        """Share of the energy in each octave, the highest first: above 1/2 (corners included), from 1/4 to 1/2, and so on to the lowest."""
        power = self.power
        where, bands = frequency(*power.shape), []
        low, high = 0.5, math.inf
        while (inside := (where > low) & (where <= high) & (where > 0)).any():
            bands.append({"above": low, "share": power[inside].sum().item()})
            low, high = low / 2, low
        return bands

    def radial(self) -> list[dict[str, float]]:
        """Mean power of a coefficient in rings of equal width up to 1, in units of white noise's, at each ring's middle."""
        power = self.power
        where, side = frequency(*power.shape), min(*power.shape, MOST_BANDS)
        white = 1 / (power.numel() - 1)
        rings = []
        for i in range(side):
            inside = (where > i / side) & (where <= (i + 1) / side)
            if inside.any():
                rings.append({"frequency": (i + 0.5) / side, "power": power[inside].mean().item() / white})
        return rings
