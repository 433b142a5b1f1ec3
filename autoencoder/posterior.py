"""q(z|x): the encoder's distribution over latents."""

import math
from typing import Protocol

import torch
from torch import Tensor


class Posterior(Protocol):
    """Any distribution of latents (B, ...) that can be sampled with its density: what `evaluate_elbo` takes."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the latents and of the noise that makes them, (B, ...)."""
        ...

    def sample(self, noise: Tensor) -> Tensor:
        """Latents for standard normal `noise` of `shape`."""
        ...

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z|x) in nats, (B,)."""
        ...

    def sample_with_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """`sample` and the sample's `log_prob`: a posterior that knows the density of its own samples need not invert them."""
        ...


class DiagonalGaussian:
    """N(mean, diag exp(logvar)) over latents of any shape (B, ...).

    Half-precision inputs are raised to float32; float64 stays float64. Densities and divergences are in
    nats, summed over all but the batch axis: (B,).
    """

    def __init__(self, mean: Tensor, logvar: Tensor) -> None:
        if mean.shape != logvar.shape:
            raise ValueError(f"mean {tuple(mean.shape)} and logvar {tuple(logvar.shape)} differ in shape; give one log-variance a mean")
        if mean.ndim < 2:
            raise ValueError(f"mean has shape {tuple(mean.shape)}; give a batch axis and at least one more")
        dtype = torch.promote_types(torch.promote_types(mean.dtype, logvar.dtype), torch.float32)
        self.mean, self.logvar = mean.to(dtype), logvar.to(dtype)

    @property
    def shape(self) -> torch.Size:
        """Shape of the latents, (B, ...)."""
        return self.mean.shape

    @property
    def std(self) -> Tensor:
        """Standard deviation, the shape of `mean`."""
        return (0.5 * self.logvar).exp()

    def mode(self) -> Tensor:
        """The most probable latents: the mean."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, for standard normal `noise` of the same shape (Kingma & Welling 2013, sec. 2.4)."""
        return self.mean + self.std * noise.to(self.mean)

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z|x) in nats, (B,)."""
        squared = (z.to(self.mean) - self.mean).square() * (-self.logvar).exp()
        return -0.5 * (squared + self.logvar + math.log(2 * math.pi)).flatten(1).sum(1)

    def sample_with_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """`sample` and the sample's `log_prob`."""
        z = self.sample(noise)
        return z, self.log_prob(z)

    def entropy(self) -> Tensor:
        """H(q(z|x)) in nats, (B,)."""
        return 0.5 * (self.logvar + math.log(2 * math.pi) + 1).flatten(1).sum(1)

    def kl_map(self) -> Tensor:
        """KL to the standard normal, element by element in nats, the shape of `mean` (Kingma & Welling 2013, app. B)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar)

    def kl_to_standard_normal(self) -> Tensor:
        """KL(q(z|x) || N(0, I)) in nats, (B,)."""
        return self.kl_map().flatten(1).sum(1)
