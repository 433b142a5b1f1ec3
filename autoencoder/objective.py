"""What is minimised: the only place where weights meet terms.

Terms are per image, (B,): likelihood and divergence in nats, errors and distances as means over pixels. D is the number of
an image's values, C * H * W. The ELBO is reported at beta = 1 whatever is optimised.

Missing pixels (`autoencoder.missing`) are left out of likelihood and errors, and shown to the perceptual distance as if reproduced; so
they are to any other critic of whole images. The ELBO is then a bound on log p of the values that were observed.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from autoencoder.adversarial.game import Opponent
from autoencoder.kl_control import GROUP_KL, group_kl
from autoencoder.likelihood import Likelihood, PixelScale, build_likelihood
from autoencoder.missing import filled, observed_mean, observed_values
from autoencoder.objective_config import ObjectiveConfig
from autoencoder.posterior import DiagonalGaussian


@dataclass
class Terms:
    """A batch's loss and the named terms behind it, each (B,)."""

    loss: Tensor
    named: dict[str, Tensor]
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """(B, ...): for controllers alone, not for the log."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """The weighted terms that `loss` is the sum of, (B,), with their gradients; empty where it is no sum of terms."""


class Objective:
    """The configured loss; `perceptual` maps (images, reconstruction) to a distance (B,), or is absent."""

    def __init__(self, config: ObjectiveConfig, perceptual: nn.Module | None) -> None:
        self.config, self.perceptual = config, perceptual

    def likelihood(self, scale: Tensor | float) -> Likelihood:
        """p(x|z) at a scale, or with the decoder's own."""
        config = self.config.likelihood
        if config.scale == "pixel":
            return PixelScale(config.name, config.levels, config.bounds)
        return build_likelihood(config.name, scale, config.levels)

    def __call__(
        self,
        images: Tensor,
        posterior: DiagonalGaussian,
        decoded: Tensor,
        *,
        scale: Tensor,
        kl_weight: Tensor | float,
        charged: Tensor | None = None,
        rate: Tensor | None = None,
        valid: Tensor | None = None,
        opponent: Opponent | None = None,
    ) -> Terms:
        """Loss and terms for images (B, C, H, W) in [-1, 1] and what the decoder made of their latents.

        `charged` (groups,) says which groups of latents the KL counts beyond their free bits (`KLControl.charged`); without it, all.
        `rate` (B,) stands in for the KL where that has no closed form. `valid` (B, 1, H, W): pixels that are not missing; without it, all.
        `opponent` adds the adversarial term to all but the KL.
        """
        reconstruction = filled(self.likelihood(scale).reconstruction(decoded), images, valid)
        # Its backbone may run in half precision; nothing else does.
        distance = images.new_zeros(len(images)) if self.perceptual is None else self.perceptual(images, reconstruction)
        with torch.autocast(images.device.type, enabled=False):
            return self._terms(images, posterior, decoded, distance, scale, kl_weight, charged, rate, valid, opponent)

    def _terms(
        self,
        images: Tensor,
        posterior: DiagonalGaussian,
        decoded: Tensor,
        distance: Tensor,
        scale: Tensor,
        kl_weight: Tensor | float,
        charged: Tensor | None,
        rate: Tensor | None,
        valid: Tensor | None,
        opponent: Opponent | None,
    ) -> Terms:
        likelihood = self.likelihood(scale).observed(valid)
        error = images - filled(likelihood.reconstruction(decoded), images, valid)
        absolute, squared = error.abs().flatten(1).sum(1), error.square().flatten(1).sum(1)
        # A missing value has no error but a place in the distance, which is a mean over all of them.
        dimensions, observed = images[0].numel(), observed_values(images, valid)
        nll = -likelihood.log_prob(images, decoded)
        kl = posterior.kl_to_standard_normal() if rate is None else rate
        minimised, statistics = kl, dict[str, Tensor]()
        if charged is not None:
            groups = group_kl(posterior.kl_map(), self.config.kl.free_bits_per)
            minimised = torch.where(charged, groups, self.config.kl.free_bits).sum(1)
            statistics[GROUP_KL] = groups.detach()
        weighted = self.config.perceptual.weight * dimensions * distance
        name, pixels, unit, constant = self._pixel_term(nll, absolute, squared, dimensions, observed)
        fidelity = (pixels + weighted) / unit + constant
        parts = {name: pixels / unit + constant, "kl": kl_weight * minimised}
        played = dict[str, Tensor]()
        if opponent is not None:
            fidelity, played, against = opponent(images, decoded, fidelity, valid)
            if against is not None:
                parts["adversarial"] = against
            if scale.requires_grad:
                # The opponent's gradient goes to what was decoded; that to a learned scale is taken beside it.
                again = -likelihood.log_prob(images, decoded.detach())
                fidelity = fidelity + (again - again.detach())
        loss = fidelity + kl_weight * minimised

        named = {
            "nll_nats": nll,
            "kl_nats": kl,
            "elbo_nats": -nll - kl,
            "mean_absolute_error": absolute / observed,
            "mean_squared_error": squared / observed,
            "scale_moment": likelihood.moment(error),
        }
        if isinstance(likelihood, PixelScale):
            named["log_scale"] = observed_mean(likelihood.split(decoded)[1].log(), valid)
        if valid is not None:
            named["valid_share"] = valid.flatten(1).float().mean(1)
        if self.perceptual is not None:
            named["perceptual"] = distance
            parts["perceptual"] = weighted / unit
        if charged is not None:
            named["free_bits_kl_nats"] = minimised
        return Terms(loss, {name: value.detach() for name, value in (named | played).items()}, statistics, parts)

    def _pixel_term(
        self, nll: Tensor, absolute: Tensor, squared: Tensor, dimensions: int, observed: Tensor | int
    ) -> tuple[str, Tensor, float, Tensor | float]:
        """What the convention charges for pixels: a name, a term (B,), what that and the perceptual term are divided by, and a constant."""
        if self.config.convention == "elbo":
            return "nll", nll, 1.0, 0.0
        if self.config.convention == "ldm":
            # LPIPSWithDiscriminator (Rombach et al. 2022): the distance is broadcast over an image's values.
            log_s = self.config.ldm_logvar
            return "reconstruction", absolute, math.exp(log_s), observed * log_s
        if self.config.convention == "monai":
            # Means over values beside a summed KL: the tutorials' loss, whose balance changes with the resolution.
            return "reconstruction", absolute, dimensions, 0.0
        return "reconstruction", squared, 1.0, 0.0

    def distortion(self, images: Tensor, decoded: Tensor, *, scale: Tensor) -> Tensor:
        """What the convention charges for a reconstruction, pixels and perceptual distance, of images of any size; (B,)."""
        reconstruction = self.likelihood(scale).reconstruction(decoded)
        distance = images.new_zeros(len(images)) if self.perceptual is None else self.perceptual(images, reconstruction)
        with torch.autocast(images.device.type, enabled=False):
            error, dimensions = images - reconstruction, images[0].numel()
            nll = -self.likelihood(scale).log_prob(images, decoded)
            absolute, squared = error.abs().flatten(1).sum(1), error.square().flatten(1).sum(1)
            _, pixels, unit, constant = self._pixel_term(nll, absolute, squared, dimensions, dimensions)
            return (pixels + self.config.perceptual.weight * dimensions * distance) / unit + constant
