"""The KL term's weight over a run."""

from autoencoder.config import KLConfig
from autoencoder.runtime.config import count


def kl_weight(config: KLConfig, images: int) -> float:
    """Weight of the KL after `images` training images: constant, or a linear rise from zero (Bowman et al. 2016)."""
    if config.schedule == "constant":
        return config.weight
    return config.weight * min(1.0, images / count(config.anneal_images, "anneal_images"))
