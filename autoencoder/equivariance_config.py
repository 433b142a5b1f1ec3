"""Equivariance regularisation: how much of it, and on which transformations. Torch-free."""

import math
from dataclasses import dataclass

from autoencoder.runtime.errors import require


@dataclass(frozen=True, kw_only=True)
class EquivarianceConfig:
    """Decode scaled and rotated latents of some images beside the latents as they are (EQ-VAE, Kouzelis et al. 2025); off by default."""

    share: float = 0.0
    """Share of the images whose latents are decoded once more, scaled and rotated, and compared with the image transformed alike."""
    weight: float = 1.0
    """Weight of their distortion, in the units of `objective.convention`, summed over the smaller image's values."""
    least_scale: float = 0.25
    """Least scale; a step's is drawn from all at which the latents' side is whole, from this to below 1."""

    def __post_init__(self) -> None:
        require(0 <= self.share <= 1, "share", self.share, "give a share of the images from 0 (off) to 1")
        require(0 < self.weight < math.inf, "weight", self.weight, "give a finite weight above 0; share 0 switches it off")
        require(0 < self.least_scale < 1, "least_scale", self.least_scale, "give a scale above 0 and below 1")

    def sides(self, side: int) -> range:
        """Sides that latents of `side` are scaled to."""
        return range(max(1, math.ceil(self.least_scale * side)), side)


def check_equivariance(config: EquivarianceConfig, *, latent_side: int, factor: int, least_image: int) -> None:
    """Refuse scales that latents of this side do not have, or whose images a perceptual distance cannot take.

    Raises:
        ConfigError: keys are those of `TrainAutoencoderConfig`.
    """
    if not config.share:
        return
    key, sides = "objective.equivariance.least_scale", config.sides(latent_side)
    whole = ", ".join(f"{side}/{latent_side}" for side in range(1, min(latent_side, 9)))
    remedy = f"latents of side {latent_side} have no such scale; give at most {max(1, latent_side - 1)}/{latent_side}, of {whole or 'none'}"
    require(len(sides) > 0, key, config.least_scale, remedy)
    smallest = sides[0] * factor
    needed = math.ceil(least_image / factor) / latent_side
    require(
        smallest >= least_image,
        key,
        config.least_scale,
        f"objective.perceptual takes images of {least_image} pixels and more, and the smallest would have {smallest}: "
        + (f"give at least {needed:.4g}" if needed < 1 else "give a higher data.resolution, or switch one of the two off"),
    )
