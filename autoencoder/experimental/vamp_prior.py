"""p(z) as a mixture of the posteriors of learned pseudo-inputs."""

import math

import torch
from torch import Tensor, nn

from autoencoder.experimental.mixture_prior import log_mixture
from autoencoder.posterior import DiagonalGaussian


class PseudoInputs(nn.Module):
    """K images (K, C, H, W) in (-1, 1) that are trained like weights; noise at the start."""

    def __init__(self, components: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.raw = nn.Parameter(0.5 * torch.randn(components, *shape))

    def forward(self) -> Tensor:
        return self.raw.tanh()


class VampPrior:
    """p(z) = 1/K sum_k q(z|u_k) over whole latent maps (Tomczak & Welling 2018, eq. 9): N(0, I) as far as a fresh encoder gives that.

    Args:
        posteriors: q(z|u_k) of the K pseudo-inputs u_k. A flow is not in them.
    """

    def __init__(self, posteriors: DiagonalGaussian) -> None:
        self.posteriors = posteriors

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) of latents (B, ...) in nats, (B,)."""
        mean, logvar = self.posteriors.mean.flatten(1), self.posteriors.logvar.flatten(1)
        return log_mixture(z.flatten(1), mean, logvar, mean.new_full((len(mean),), -math.log(len(mean))))
