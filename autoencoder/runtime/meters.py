"""Running means of named terms, kept on the device and equal in every process."""

import torch
from torch import Tensor

SKIPPED = "skipped_steps"


class Meters:
    """Means over the images of all steps since the last reading; non-finite steps are left out and named.

    Nothing here waits for the device but `read`.
    """

    def __init__(self, device: torch.device) -> None:
        # MPS has no float64.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._device = device
        self._start([])

    def _start(self, names: list[str]) -> None:
        self.names: list[str] = names
        self._sums = torch.zeros(len(names), dtype=self._dtype, device=self._device)
        self._bad = torch.zeros(len(names), dtype=self._dtype, device=self._device)
        self._images = torch.zeros((), dtype=self._dtype, device=self._device)
        self._skipped = torch.zeros((), dtype=self._dtype, device=self._device)

    def add(self, means: dict[str, Tensor], images: int) -> Tensor:
        """Add a step's means over its `images`; returns the flag `found_inf`: 1.0 where any is not finite, else 0.0."""
        if not self.names:
            self._start(list(means))
        values = torch.stack([means[name].to(self._dtype) for name in self.names])
        bad = ~values.isfinite()
        found = bad.any().to(self._dtype)
        self._sums += torch.where(found > 0, torch.zeros_like(values), values * images)
        self._bad += bad
        self._images += images * (1 - found)
        self._skipped += found
        return found.float()

    def pending(self) -> list[str]:
        """Names that were not finite in a step since the last reading."""
        return [name for name, bad in zip(self.names, self._bad.tolist(), strict=True) if bad]

    def read(self) -> tuple[dict[str, float], list[str]]:
        """Means since the last reading, with the count of skipped steps if any, and the names that were not finite."""
        flat = torch.cat([self._sums, self._bad, self._images[None], self._skipped[None]]).tolist()
        count = len(self.names)
        images, skipped = flat[-2:]
        means = {name: flat[i] / images for i, name in enumerate(self.names)} if images else {}
        if skipped:
            means[SKIPPED] = skipped
        nonfinite = [name for i, name in enumerate(self.names) if flat[count + i]]
        self._start(self.names)
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
