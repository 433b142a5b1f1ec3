"""What one more nat of rate buys: whether an autoencoder spends on its latents what its learned prior makes worth while."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.likelihood import standard_error


@dataclass(frozen=True)
class Rates:
    """Distortion and rates of N crops in R replicates, nats, (R, N) each."""

    nll: Tensor
    normal: Tensor
    """The KL to N(0, I)."""
    learned: Tensor
    """The rate with the diffusion model for a prior."""

    @classmethod
    def joined(cls, parts: Sequence["Rates"]) -> "Rates":
        """Of all crops."""
        return cls(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("nll", "normal", "learned")))


@dataclass(frozen=True)
class Ratio:
    """Of two means over crops."""

    value: float
    standard_error: float
    """Over images, by the delta method."""

    @classmethod
    def of(cls, above: Tensor, below: Tensor, images: Tensor | None) -> "Ratio":
        """Of values (N,) of the same crops."""
        ratio = above.mean() / below.mean()
        return cls(float(ratio), float(standard_error(above - ratio * below, images) / below.mean().abs()))


@dataclass(frozen=True)
class Slopes:
    """Changes of each crop as the posterior's standard deviations all grow by one factor, (N,): central differences in its logarithm."""

    nll: Tensor
    normal: Tensor
    learned: Tensor

    @classmethod
    def between(cls, narrower: Rates, wider: Rates) -> "Slopes":
        """From the account at a narrower and a wider posterior."""
        return cls(*((getattr(wider, name) - getattr(narrower, name)).mean(0) for name in ("nll", "normal", "learned")))

    def price_of_normal(self, images: Tensor | None = None) -> Ratio:
        """-dNLL/dKL: nats of NLL that one more nat of KL to N(0, I) buys. At its own minimum a beta-VAE has beta (Alemi et al. 2018)."""
        return Ratio.of(-self.nll, self.normal, images)

    def price_of_learned(self, images: Tensor | None = None) -> Ratio:
        """-dNLL/dR: nats of NLL that one more nat of the learned rate buys. Above 1, the total falls with more rate."""
        return Ratio.of(-self.nll, self.learned, images)

    def learned_for_normal(self, images: Tensor | None = None) -> Ratio:
        """dR/dKL, nats of the learned rate that come with a nat of the KL: the beta whose penalty on the KL has the learned rate's slope.

        Where a beta-VAE is at its minimum, that is its beta over `price_of_learned`.
        """
        return Ratio.of(self.learned, self.normal, images)
