"""A moving average of a network's weights whose length is a share of the run so far (Karras et al. 2024, arXiv 2312.02696, sec. 3.1)."""

import copy
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def exponent(length: float) -> float:
    """The gamma >= 0 at which the density of t**gamma on [0, 1] has the standard deviation `length`, below 12**-0.5.

    It is the largest root of length**2 = (gamma + 1) / ((gamma + 2)**2 (gamma + 3)).
    """
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class PowerEma(Generic[M]):
    """Average of the parameters of a network over the whole run, ready to run as `module`.

    After n images it is the integral of w(tau) tau**gamma over [0, n] by that of tau**gamma, where w(tau) are the weights after the step
    that image tau was in. That is exact for steps of any number of images, so that batch size does not change the average, and gives the
    random start no part in it, unless the first steps are skipped (not finite): it then stands for what came of them.

    Args:
        length: standard deviation of the profile tau**gamma, as a share of n.
    """

    def __init__(self, source: M, *, length: float) -> None:
        self.module: M = copy.deepcopy(source).eval().requires_grad_(False)
        self.power = exponent(length) + 1
        pairs = [pair for pair in zip(self.module.parameters(), source.parameters(), strict=True) if pair[1].requires_grad]
        self._average: list[Tensor] = [average for average, _ in pairs]
        self._source: list[Tensor] = [parameter for _, parameter in pairs]

    def decay(self, images: int, batch: int) -> float:
        """Share of the average that a step of `batch` images keeps once `images` have been seen, those of the step among them."""
        return float((1 - batch / images) ** self.power)

    @torch.no_grad()
    def update(self, images: int, batch: int, found_inf: Tensor) -> None:
        """Move towards the weights; not at all where the device-side `found_inf` is 1."""
        share = (1 - self.decay(images, batch)) * (1 - found_inf)
        # In one pass, without memory for the differences: several averages are kept.
        torch._foreach_lerp_(self._average, self._source, [share] * len(self._average))
