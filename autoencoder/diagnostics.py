"""What the latents carry: rate, activity and spread of each channel."""

from dataclasses import dataclass

from torch import Tensor

from autoencoder.posterior import DiagonalGaussian

ACTIVE_VARIANCE = 0.01
"""A unit is active where the variance of its posterior mean over images exceeds this (Burda et al. 2015)."""


@dataclass
class Channel:
    """One latent channel over a set of images."""

    kl_nats: float
    """Its share of the KL, nats an image."""
    mean_variance: float
    """Variance of its posterior mean over images and sites."""
    posterior_std: float
    """Root mean posterior variance."""
    active: bool


class LatentStatistics:
    """Moments of posteriors (B, c, h, w), summed in float64 so that batches and processes merge exactly."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, posterior: DiagonalGaussian, weight: Tensor) -> None:
        """Add a batch; images of weight 0 are padding."""
        weight = weight.double().cpu()

        def total(values: Tensor) -> Tensor:
            per_image = values.flatten(2).sum(2).cpu().double()  # (B, c)
            return (per_image * weight[:, None]).sum(0)

        sites = posterior.mean[0, 0].numel()
        added = {
            "images": weight.sum(),
            "sites": weight.sum() * sites,
            "kl": total(posterior.kl_map()),
            "mean": total(posterior.mean),
            "square": total(posterior.mean.double().square()),
            "variance": total(posterior.logvar.exp()),
        }
        self.merge(added)

    def merge(self, sums: dict[str, Tensor]) -> None:
        """Add the sums of another set of images."""
        self.sums = {k: self.sums[k] + v for k, v in sums.items()} if self.sums else sums

    def channels(self) -> list[Channel]:
        """A description of each channel."""
        s = self.sums
        mean = s["mean"] / s["sites"]
        spread = s["square"] / s["sites"] - mean.square()
        return [
            Channel(kl_nats=kl, mean_variance=v, posterior_std=variance**0.5, active=v > ACTIVE_VARIANCE)
            for kl, v, variance in zip(
                (s["kl"] / s["images"]).tolist(), spread.tolist(), (s["variance"] / s["sites"]).tolist(), strict=True
            )
        ]

    def sample_mean_and_std(self) -> tuple[float, float]:
        """Mean and standard deviation of posterior samples over images, channels and sites (law of total variance)."""
        s = self.sums
        count = s["sites"] * len(s["mean"])
        mean = s["mean"].sum() / count
        return float(mean), float((s["square"].sum() / count - mean.square() + s["variance"].sum() / count).sqrt())
