"""What is minimised: the only place where weights meet terms.

Terms are per image, (B,): likelihood and divergence in nats, errors and distances as means over pixels. D is the number of
an image's values, C * H * W. The ELBO is reported at beta = 1 whatever is optimised.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoencoder.config import ObjectiveConfig
from autoencoder.likelihood import Likelihood, build_likelihood
from autoencoder.posterior import DiagonalGaussian


@dataclass
class Terms:
    """A batch's loss and the named terms behind it, each (B,)."""

    loss: Tensor
    named: dict[str, Tensor]


class Objective:
    """The configured loss; `perceptual` maps (images, reconstruction) to a distance (B,), or is absent."""

    def __init__(self, config: ObjectiveConfig, perceptual: nn.Module | None) -> None:
        self.config, self.perceptual = config, perceptual

    def likelihood(self, scale: Tensor | float) -> Likelihood:
        """p(x|z) at a scale."""
        return build_likelihood(self.config.likelihood.name, scale, self.config.likelihood.levels)

    def __call__(self, images: Tensor, posterior: DiagonalGaussian, reconstruction: Tensor, *, scale: Tensor, kl_weight: float) -> Terms:
        """Loss and terms for images and reconstruction (B, C, H, W) in [-1, 1]."""
        # Its backbone may run in half precision; nothing else does.
        distance = images.new_zeros(len(images)) if self.perceptual is None else self.perceptual(images, reconstruction)
        with torch.autocast(images.device.type, enabled=False):
            return self._terms(images, posterior, reconstruction, distance, scale, kl_weight)

    def _terms(
        self, images: Tensor, posterior: DiagonalGaussian, reconstruction: Tensor, distance: Tensor, scale: Tensor, kl_weight: float
    ) -> Terms:
        error = images - reconstruction
        absolute, squared = error.abs().flatten(1).sum(1), error.square().flatten(1).sum(1)
        dimensions = images[0].numel()
        likelihood = self.likelihood(scale)
        nll = -likelihood.log_prob(images, reconstruction)
        kl = posterior.kl_to_standard_normal()
        weighted = self.config.perceptual.weight * dimensions * distance

        if self.config.convention == "elbo":
            loss = nll + weighted + kl_weight * kl
        elif self.config.convention == "ldm":
            # LPIPSWithDiscriminator (Rombach et al. 2022): the distance is broadcast over an image's values.
            log_s = self.config.ldm_logvar
            loss = (absolute + weighted) / math.exp(log_s) + dimensions * log_s + kl_weight * kl
        else:
            loss = squared + weighted + kl_weight * kl

        named = {
            "nll_nats": nll,
            "kl_nats": kl,
            "elbo_nats": -nll - kl,
            "mean_absolute_error": absolute / dimensions,
            "mean_squared_error": squared / dimensions,
            "scale_moment": likelihood.moment(error),
        }
        if self.perceptual is not None:
            named["perceptual"] = distance
        return Terms(loss, {name: value.detach() for name, value in named.items()})


def effective_beta(config: ObjectiveConfig, *, mean_absolute_error: float, mean_squared_error: float, scale: float) -> float:
    """The beta of a beta-VAE whose decoder has the best scale for these errors and whose minimum is this objective's.

    For c * sum|e| + w * KL it is w / (c * mean|e|), for c * sum e**2 + w * KL it is w / (2 * c * mean e**2): scaling the loss until
    the error term is a Laplace (Gaussian) log-likelihood at its best scale leaves this before the KL.
    """
    weight, name = config.kl.weight, config.likelihood.name
    if config.convention == "ldm":
        return weight * math.exp(config.ldm_logvar) / mean_absolute_error
    if config.convention == "diffusers":
        return weight / (2 * mean_squared_error)
    if config.likelihood.scale != "fixed":
        return weight
    if name == "laplace":
        return weight * scale / mean_absolute_error
    if name == "discretized_logistic":
        # A logistic of scale s has the mean absolute deviation 2 ln(2) s.
        return weight * 2 * math.log(2) * scale / mean_absolute_error
    return weight * scale**2 / mean_squared_error
