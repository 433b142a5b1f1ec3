"""q(z|x) as a Gaussian whose noise a flow has bent."""

import math

import torch
from torch import Tensor

from autoencoder.experimental.coupling import CouplingFlow
from autoencoder.posterior import DiagonalGaussian


class FlowPosterior:
    """z = mean + std * f(noise; mean, logvar): values of one image's latents may depend on each other (Rezende & Mohamed 2015).

    The flow acts on the noise, where correlations are of order one, however narrow the posterior; without a context it would do no more
    than a learned prior does (Chen et al. 2017, sec. 3.2). With f at its start, the identity, it is `base`.
    Log-densities are in nats, summed over all but the batch axis, (B,).

    Args:
        base: the Gaussian over latents (B, c, h, w) that the encoder gives.
        flow: f, with 2c channels of context.
    """

    def __init__(self, base: DiagonalGaussian, flow: CouplingFlow) -> None:
        self.base, self.flow = base, flow
        self._context = torch.cat([base.mean, base.logvar], dim=1)

    @property
    def shape(self) -> torch.Size:
        """Shape of the latents, (B, c, h, w)."""
        return self.base.mean.shape

    def mode(self) -> Tensor:
        """The latents of zero noise: the Gaussian's mode, bent; the flow's own has no closed form."""
        return self.sample(torch.zeros_like(self.base.mean))

    def sample(self, noise: Tensor) -> Tensor:
        """Latents for standard normal `noise` of their shape."""
        return self.sample_with_log_prob(noise)[0]

    def sample_with_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents for `noise` and their log q(z|x), which takes no inverse."""
        noise = noise.to(self.base.mean)
        bent, log_det = self.flow(noise, self._context)
        return self.base.sample(bent), self._log_prob(noise, log_det)

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z|x) by the flow's inverse."""
        bent = (z.to(self.base.mean) - self.base.mean) * (-0.5 * self.base.logvar).exp()
        noise, log_det = self.flow.inverse(bent, self._context)
        return self._log_prob(noise, -log_det)

    def _log_prob(self, noise: Tensor, log_det: Tensor) -> Tensor:
        gaussian = -0.5 * (noise.square() + math.log(2 * math.pi) + self.base.logvar).flatten(1).sum(1)
        return gaussian - log_det
