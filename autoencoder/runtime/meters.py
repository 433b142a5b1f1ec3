"""Running means of named terms, kept on the device and equal in every process."""

import torch
from torch import Tensor

SKIPPED = "skipped_steps"


class Meters:
    """Means over the images of all steps since the last reading; non-finite steps are left out and named.

    Each name has a mean over the images of the steps that had it. Nothing here waits for the device but `read`.
    """

    def __init__(self, device: torch.device) -> None:
        # MPS has no float64.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._device = device
        self.names: list[str] = []
        self._sums = self._bad = self._images = self._zeros(0)
        self._skipped = self._zeros()

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def _grow(self, names: list[str]) -> None:
        """Take in names that a step is the first to have."""
        self.names = [*self.names, *names]
        self._sums, self._bad, self._images = (torch.cat((v, self._zeros(len(names)))) for v in (self._sums, self._bad, self._images))

    def add(self, means: dict[str, Tensor], images: int) -> Tensor:
        """Add a step's means over its `images`; returns the flag `found_inf`: 1.0 where any is not finite, else 0.0."""
        unknown = [name for name in means if name not in self.names]
        if unknown:
            self._grow(unknown)
        absent, one = self._zeros(), torch.ones((), dtype=self._dtype, device=self._device)
        values = torch.stack([means[name].to(self._dtype) if name in means else absent for name in self.names])
        present = torch.stack([one if name in means else absent for name in self.names])
        bad = ~values.isfinite()
        found = bad.any().to(self._dtype)
        self._sums += torch.where(found > 0, torch.zeros_like(values), values * images)
        self._bad += bad
        self._images += present * images * (1 - found)
        self._skipped += found
        return found.float()

    def pending(self) -> list[str]:
        """Names that were not finite in a step since the last reading."""
        return [name for name, bad in zip(self.names, self._bad.tolist(), strict=True) if bad]

    def read(self) -> tuple[dict[str, float], list[str]]:
        """Means since the last reading, with the count of skipped steps if any, and the names that were not finite."""
        count = len(self.names)
        flat = torch.cat([self._sums, self._bad, self._images, self._skipped[None]]).tolist()
        sums, bad, images, skipped = flat[:count], flat[count : 2 * count], flat[2 * count : 3 * count], flat[-1]
        means = {name: total / over for name, total, over in zip(self.names, sums, images, strict=True) if over}
        if skipped:
            means[SKIPPED] = skipped
        nonfinite = [name for name, times in zip(self.names, bad, strict=True) if times]
        self._sums, self._bad, self._images, self._skipped = self._zeros(count), self._zeros(count), self._zeros(count), self._zeros()
        return means, nonfinite

    def tensors(self) -> dict[str, Tensor]:
        return {"sums": self._sums, "bad": self._bad, "images": self._images, "skipped": self._skipped}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._sums, self._bad, self._images, self._skipped = (tensors[k].to(self._device) for k in ("sums", "bad", "images", "skipped"))


class LossScale:
    """Dynamic loss scale for fp16, updated on the device: halved at an overflow, doubled after `patience` good steps."""

    def __init__(self, device: torch.device, *, enabled: bool, initial: float = 2.0**16, patience: int = 2000) -> None:
        self.enabled, self.patience = enabled, patience
        self.value = torch.tensor(initial if enabled else 1.0, device=device)
        self._good = torch.zeros((), device=device)

    def update(self, found_inf: Tensor) -> None:
        """Take note of a step; `found_inf` is 1 where it overflowed."""
        if not self.enabled:
            return
        self._good = torch.where(found_inf > 0, 0, self._good + 1)
        grown = self._good >= self.patience
        self.value = self.value * torch.where(found_inf > 0, 0.5, torch.where(grown, 2.0, 1.0))
        self._good = torch.where(grown, 0, self._good)

    def tensors(self) -> dict[str, Tensor]:
        return {"value": self.value, "good": self._good}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.value, self._good = tensors["value"].to(self.value.device), tensors["good"].to(self.value.device)
