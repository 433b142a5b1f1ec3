"""What the latents carry: rate and activity of each channel and site, and variances that lie where they should not."""

from dataclasses import dataclass

import torch
from torch import Tensor

from autoencoder.missing import observed_mean
from autoencoder.model import LOGVAR_RANGE
from autoencoder.posterior import DiagonalGaussian

ACTIVE_VARIANCE = 0.01
"""A unit is active where the variance of its posterior mean over images exceeds this (Burda et al. 2016, sec. 5)."""
NEAR_PRIOR_VARIANCE = 0.9
"""A posterior variance above this is near the prior's, 1: such a unit carries -ln(0.9) / 2 = 0.05 nats or, by a mean alone, noise."""


@dataclass
class Channel:
    """One latent channel over a set of images."""

    kl_nats: float
    """Its share of the KL, nats an image."""
    mean_variance: float
    """Variance of its posterior mean over images, mean over sites."""
    posterior_std: float
    """Root mean posterior variance."""
    active: bool
    """Whether `mean_variance` exceeds `ACTIVE_VARIANCE`."""


class LatentStatistics:
    """Moments of posteriors (B, c, *sites) for each unit, a channel at a site; summed in float64 so that batches and processes merge.

    Posteriors (B, c) have one site.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, posterior: DiagonalGaussian, weight: Tensor) -> None:
        """Add a batch; images of weight 0 are padding."""
        real = weight.cpu() > 0
        # MPS has no float64.
        mean, logvar = posterior.mean.cpu().double()[real], posterior.logvar.cpu().double()[real]
        variance = logvar.exp()
        low, high = LOGVAR_RANGE
        self.merge(
            {
                "images": real.sum().double(),
                "kl": DiagonalGaussian(mean, logvar).kl_map().sum(0),
                "mean": mean.sum(0),
                "square": mean.square().sum(0),
                "variance": variance.sum(0),
                "near_prior": (variance > NEAR_PRIOR_VARIANCE).sum().double(),
                "at_clamp": ((logvar <= low) | (logvar >= high)).sum().double(),
            }
        )

    def merge(self, sums: dict[str, Tensor]) -> None:
        """Add the sums of another set of images."""
        self.sums = {k: self.sums[k] + v for k, v in sums.items()} if self.sums else sums

    def channels(self) -> list[Channel]:
        """A description of each channel."""
        images = self.sums["images"]
        kl = _by_channel(self.sums["kl"] / images).sum(1)
        spread = _by_channel(self.mean_variance()).mean(1)
        std = _by_channel(self.sums["variance"] / images).mean(1).sqrt()
        return [
            Channel(kl_nats=k, mean_variance=v, posterior_std=s, active=v > ACTIVE_VARIANCE)
            for k, v, s in zip(kl.tolist(), spread.tolist(), std.tolist(), strict=True)
        ]

    def mean_variance(self) -> Tensor:
        """Var_x(E_q[u|x]) of each unit over images, (c, *sites)."""
        mean = self.sums["mean"] / self.sums["images"]
        return (self.sums["square"] / self.sums["images"] - mean.square()).clamp(min=0)

    def active_units(self) -> Tensor:
        """Which units are active, (c, *sites)."""
        return self.mean_variance() > ACTIVE_VARIANCE

    def active_sites(self) -> Tensor:
        """Which sites are active, (*sites): those where a unit of any channel is."""
        return self.active_units().any(0)

    def site_kl(self) -> Tensor:
        """Each site's share of the KL, nats an image, (*sites)."""
        return (self.sums["kl"] / self.sums["images"]).sum(0)

    def share_near_prior(self) -> float:
        """Share of posterior variances, over images and units, that exceed `NEAR_PRIOR_VARIANCE`."""
        return float(self.sums["near_prior"] / self._values())

    def share_at_clamp(self) -> float:
        """Share of posterior log-variances, over images and units, at an end of `LOGVAR_RANGE`: no gradient moves them."""
        return float(self.sums["at_clamp"] / self._values())

    def sample_mean_and_std(self) -> tuple[float, float]:
        """Mean and standard deviation of posterior samples over images, channels and sites (law of total variance)."""
        s, count = self.sums, self._values()
        mean = s["mean"].sum() / count
        return float(mean), float((s["square"].sum() / count - mean.square() + s["variance"].sum() / count).sqrt())

    def _values(self) -> Tensor:
        """Latent values that were added."""
        return self.sums["images"] * self.sums["mean"].numel()


def _by_channel(units: Tensor) -> Tensor:
    """(c, sites) of (c, *sites)."""
    return units.reshape(len(units), -1)


def share_outside(values: Tensor, low: float, high: float, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Shares of each image's values (B, ...) that are not missing at or below `low` and at or above `high`, (B,) each."""
    return observed_mean((values <= low).double(), valid), observed_mean((values >= high).double(), valid)


def sharpness(images: Tensor, reconstruction: Tensor, valid: Tensor | None = None) -> Tensor:
    """Energy of the differences between neighbouring pixels of a reconstruction over that of its image, (B,); (B, C, H, W) each.

    1 where edges are as strong as the image's, near 0 where all is blurred; 1 for an image without any edge. With `valid` (B, 1, H, W),
    between neighbours neither of which is missing.
    """
    energy, wanted = _edge_energy(reconstruction, valid), _edge_energy(images, valid)
    return torch.where(wanted > 0, energy / wanted, 1.0)


def _edge_energy(images: Tensor, valid: Tensor | None) -> Tensor:
    """Sum of the squared differences between neighbouring pixels, (B,)."""
    across, down = (_squared_differences(images, valid, axis).flatten(1).sum(1) for axis in (-1, -2))
    return across + down


def _squared_differences(images: Tensor, valid: Tensor | None, axis: int) -> Tensor:
    squared = torch.diff(images, dim=axis).square()
    if valid is None:
        return squared
    length = valid.shape[axis] - 1
    return torch.where(valid.narrow(axis, 0, length) & valid.narrow(axis, 1, length), squared, 0.0)
