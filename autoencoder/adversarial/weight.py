"""How much the decoder listens to the discriminator: the ratio of two gradients at its last layer (Esser et al. 2021, eq. 7)."""

import math

import torch
from torch import Tensor

from autoencoder.controller import RunningMean

EPSILON = 1e-4
"""Beside the norm of the adversarial gradient, as in LDM: the weight stays finite where there is none."""


def adaptive_weight(gradients: Tensor, bound: float | None = None) -> Tensor:
    """min(|fidelity| / (|adversarial| + 1e-4), bound), from the gradients (2, ...) of the two mean losses to one layer."""
    fidelity, adversarial = gradients
    return (fidelity.norm() / (adversarial.norm() + EPSILON)).clamp(max=math.inf if bound is None else bound)


class RunningWeight:
    """The geometric mean of the adaptive weights of the steps before, bias-corrected; zero before the first.

    A step's own weight is known only once all processes and microbatches have brought their gradients; the mean of the steps before is
    the same however the batch is split, and less noisy.

    Args:
        memory: time constant in images.
    """

    def __init__(self, memory: float, device: torch.device) -> None:
        self._log = RunningMean((), memory=memory, device=device)

    @property
    def value(self) -> Tensor:
        """The weight for the step at hand."""
        return torch.where(self._log.started, self._log.value.exp(), 0.0)

    def update(self, weight: Tensor, images: int, found_inf: Tensor) -> None:
        """Take in a step's adaptive weight over its `images`; not where `found_inf` is 1 or the weight itself is not finite."""
        log = weight.clamp(min=1e-8).log()
        self._log.update(log, images, torch.maximum(found_inf, (~log.isfinite()).to(found_inf)))

    def tensors(self) -> dict[str, Tensor]:
        return self._log.tensors()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._log.load_tensors(tensors)
