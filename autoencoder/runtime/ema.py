"""A moving average of a network's weights, its length in images seen."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Ema(Generic[M]):
    """Exponential moving average of the parameters of a network, ready to run as `module`.

    The half-life is `halflife` images, or `rampup` of the images seen while that is shorter, so that the random
    start is forgotten (Karras et al. 2022, appendix F).
    """

    def __init__(self, source: M, *, halflife: int, rampup: float) -> None:
        self.module: M = copy.deepcopy(source).eval().requires_grad_(False)
        self.halflife, self.rampup = halflife, rampup
        # A frozen parameter stays as it is to the bit: adding a difference of zero would take the sign off a -0.
        pairs = [pair for pair in zip(self.module.parameters(), source.parameters(), strict=True) if pair[1].requires_grad]
        self._average: list[Tensor] = [average for average, _ in pairs]
        self._source: list[Tensor] = [parameter for _, parameter in pairs]

    def decay(self, images: int, batch: int) -> float:
        """Share of the average that a step of `batch` images keeps once `images` have been seen."""
        return 0.5 ** (batch / max(min(self.halflife, images * self.rampup), 1e-8))

    @torch.no_grad()
    def update(self, images: int, batch: int, found_inf: Tensor) -> None:
        """Move towards the weights; not at all where the device-side `found_inf` is 1."""
        difference = torch._foreach_sub(self._source, self._average)
        torch._foreach_mul_(difference, (1 - self.decay(images, batch)) * (1 - found_inf))
        torch._foreach_add_(self._average, difference)
