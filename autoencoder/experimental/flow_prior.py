"""p(z) as a learned flow to N(0, I)."""

from torch import Tensor

from autoencoder.experimental.coupling import CouplingFlow
from autoencoder.prior import StandardNormal


class FlowPrior:
    """log p(z) = log N(f(z); 0, I) + ln |det df/dz| (Dinh et al. 2017, eq. 2); N(0, I) at its start, where f is the identity."""

    def __init__(self, flow: CouplingFlow) -> None:
        self.flow = flow

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) of latents (B, c, h, w) in nats, (B,)."""
        normal, log_det = self.flow(z)
        return StandardNormal().log_prob(normal) + log_det

    def sample(self, noise: Tensor) -> Tensor:
        """Latents for standard normal `noise` of their shape."""
        latents: Tensor = self.flow.inverse(noise)[0]
        return latents
