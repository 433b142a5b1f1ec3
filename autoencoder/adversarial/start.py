"""When the discriminator begins, and when and how loudly the decoder hears it: functions of images seen, and of the NLL for `plateau`."""

import torch
from torch import Tensor

from autoencoder.adversarial_config import PLATEAU, AdversarialConfig
from autoencoder.runtime.config import count

FLAT = 0.01
"""Fall of the NLL from one window to the next, in nats a value, below which it has stopped falling: an error smaller by a hundredth."""


class Start:
    """The image count where the discriminator begins, `at`; with `plateau` it is None until the NLL has stopped falling.

    The NLL is averaged on the device and read once a window, whatever is logged and when: how a run is watched does not move its weights.

    Args:
        dims: values of an image.
    """

    def __init__(self, config: AdversarialConfig, *, dims: int, device: torch.device) -> None:
        self.dims = dims
        self._waits = config.start == PLATEAU
        self.at: int | None = None if self._waits else count(config.start, "start")
        self._window, self._warmup, self._ramp = (
            count(getattr(config, key), key) for key in ("plateau_images", "warmup_images", "ramp_images")
        )
        self._sum, self._images = torch.zeros((), device=device), torch.zeros((), device=device)
        self._before = torch.full((), torch.inf, device=device)

    def begun(self, images: int) -> bool:
        """Whether the discriminator trains in the step before which `images` were seen."""
        return self.at is not None and images >= self.at

    def loudness(self, images: int) -> float:
        """Share of its weight at which the decoder hears the discriminator: 0 in the warm-up, then rising to 1."""
        heard = images - self._warmup - (images if self.at is None else self.at)
        return 0.0 if heard < 0 else min(1.0, heard / self._ramp) if self._ramp else 1.0

    def update(self, nll: Tensor, seen: int, images: int, found_inf: Tensor) -> None:
        """Take in a step's mean NLL over its `images`, before which `seen` were; not where `found_inf` is 1."""
        if self.at is not None:
            return
        skip = found_inf > 0
        self._sum = torch.where(skip, self._sum, self._sum + nll.float() * images)
        self._images = torch.where(skip, self._images, self._images + images)
        if seen // self._window == (seen + images) // self._window:
            return
        mean = self._sum / self._images
        flat = (self._before - mean) / self.dims < FLAT
        self._before = mean
        self._sum, self._images = torch.zeros_like(self._sum), torch.zeros_like(self._images)
        if flat.item():
            self.at = seen + images

    def tensors(self) -> dict[str, Tensor]:
        if not self._waits:
            return {}
        at = torch.tensor(-1 if self.at is None else self.at)
        return {"at": at, "sum": self._sum, "images": self._images, "before": self._before}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        if not self._waits:
            return
        at = int(tensors["at"])
        self.at = None if at < 0 else at
        self._sum, self._images, self._before = (tensors[k].to(self._sum.device) for k in ("sum", "images", "before"))
