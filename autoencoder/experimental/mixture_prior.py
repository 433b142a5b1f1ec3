"""p(z) as a learned mixture of Gaussians over the channels of a site."""

import math

import torch
from torch import Tensor, nn

SPREAD = 0.3
"""Standard deviation of the component means at the start. With all in one place no component would ever leave the others."""


class Mixture(nn.Module):
    """Parameters of K diagonal Gaussians over the c channels of a site, and of their weights.

    The start is near N(0, I): means are drawn with variance `SPREAD`**2 and each component has what is left of a variance of 1.
    """

    def __init__(self, channels: int, components: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(SPREAD * torch.randn(components, channels))
        self.logvar = nn.Parameter(torch.full((components, channels), math.log(1 - SPREAD**2)))
        self.logit = nn.Parameter(torch.zeros(components))

    def forward(self, sites: Tensor) -> Tensor:
        """log p of sites (N, c) in nats, (N,)."""
        return log_mixture(sites, self.mean, self.logvar, self.logit.log_softmax(0))


class MixturePrior:
    """The same mixture at every site of a map, sites independent: (B, c, h, w) has log p = sum over sites of ln sum_k w_k N(.; m_k, s_k).

    One mixture over whole maps would gain at most ln K nats an image; this one gains up to ln K nats a site.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, (B,)."""
        sites = z.movedim(1, -1).reshape(-1, z.shape[1])  # (B h w, c)
        log_prob: Tensor = self.mixture(sites).view(len(z), -1).sum(1)
        return log_prob


def log_mixture(x: Tensor, mean: Tensor, logvar: Tensor, log_weight: Tensor) -> Tensor:
    """ln sum_k w_k N(x; mean_k, diag exp(logvar_k)) in nats, (N,), for x (N, d), mean and logvar (K, d), normalised log_weight (K,).

    Distances are taken from differences, not from expanded squares, which cancel where components are narrow.
    """
    scaled = (x[:, None] - mean) * (-0.5 * logvar).exp()  # (N, K, d)
    constant = log_weight - 0.5 * (logvar + math.log(2 * math.pi)).sum(1)
    return (constant - 0.5 * scaled.square().sum(2)).logsumexp(1)
