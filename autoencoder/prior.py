"""p(z): the distribution of latents that the posterior is held against."""

import math
from typing import Protocol

import torch
from torch import Tensor

from autoencoder.posterior import DiagonalGaussian, Posterior


class Prior(Protocol):
    """Anything with a density over latents. One that also has `kl(posterior) -> (B,)` has its divergence taken in closed form."""

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, (B,)."""
        ...


def closed_form_kl(posterior: Posterior, prior: Prior) -> Tensor | None:
    """KL(posterior || prior) in nats, (B,), where the prior has it in closed form for a Gaussian q; else None."""
    closed_form = getattr(prior, "kl", None)
    if closed_form is None or not isinstance(posterior, DiagonalGaussian):
        return None
    kl: Tensor = closed_form(posterior)
    return kl


class StandardNormal:
    """N(0, I) over latents of any shape (B, ...)."""

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, summed over all but the batch axis, (B,); at least float32."""
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)

    def kl(self, posterior: DiagonalGaussian) -> Tensor:
        """KL(posterior || N(0, I)) in nats, (B,)."""
        return posterior.kl_to_standard_normal()
