"""Measuring an autoencoder: per-image rate, distortion and quality over a fixed set of crops."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder.data.loader import Batch
from autoencoder.data.pixels import to_images
from autoencoder.diagnostics import Channel, LatentStatistics
from autoencoder.elbo import bits_per_dim
from autoencoder.likelihood import Likelihood
from autoencoder.metrics import bootstrap_interval, psnr, ssim
from autoencoder.model import AutoencoderKL, decode, encode
from autoencoder.runtime.errors import UsageError

UNITS = {
    "nll_nats": "nats per image",
    "kl_nats": "nats per image",
    "elbo_nats": "nats per image",
    "bits_per_dim": "bits per dimension",
    "kl_nats_per_latent": "nats per latent value",
    "psnr_db": "dB",
    "ssim": "1",
    "lpips": "1",
    "mean_absolute_error": "of images in [-1, 1]",
    "mean_squared_error": "of images in [-1, 1]",
}


@dataclass
class Evaluation:
    """Per-crop values, (N,) each, and what the latents carry."""

    values: dict[str, Tensor]
    photos: Tensor
    """Index of the image that each crop is from, (N,)."""
    ids: list[str]
    channels: list[Channel]
    latent_std: float
    bad: dict[str, str]
    """Images that could not be read, with the reason."""

    def means(self) -> dict[str, float]:
        """Mean of every value over the crops."""
        return {name: value.mean().item() for name, value in self.values.items()}

    def report(self, *, seed: int = 0) -> dict[str, Any]:
        """Means with 95% bootstrap intervals and standard deviations over images, per-image means and per-channel rates, for JSON."""
        _, member, crops = self.photos.unique(return_inverse=True, return_counts=True)
        sums = {k: v.new_zeros(len(crops)).index_add_(0, member, v) for k, v in self.values.items()}
        of_images = {k: v / crops for k, v in sums.items()}
        names = dict(zip(member.tolist(), (name.split("#")[0] for name in self.ids), strict=True))
        metrics = {}
        for name, value in self.values.items():
            low, high = bootstrap_interval(value, groups=self.photos, seed=seed)
            spread = of_images[name].std().item() if len(crops) > 1 else math.nan
            figures = {"mean": value.mean().item(), "low": low, "high": high, "spread": spread}
            metrics[name] = {**_finite(figures), "unit": UNITS[name]}
        photos = [
            {"id": names[i], "crops": int(crops[i]), **_finite({k: v[i].item() for k, v in of_images.items()})} for i in range(len(crops))
        ]
        return {
            "metrics": metrics,
            "photos": photos,
            "channels": [asdict(c) for c in self.channels],
            "active_channels": sum(c.active for c in self.channels),
            "latent_std": self.latent_std,
            "bad_images": self.bad,
        }


def _finite(figures: dict[str, float]) -> dict[str, float | None]:
    """Null for what JSON has no number for: the PSNR of an exact copy, the interval and spread of a single image."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


@torch.no_grad()
def evaluate(
    vae: AutoencoderKL,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    likelihood: Likelihood | None,
    lpips: nn.Module | None = None,
) -> Evaluation:
    """Measure `vae` on fixed crops with fixed noise; with several processes each brings its share and gets the whole.

    NLL and KL are those of one posterior sample (nats per image, at beta = 1); PSNR, SSIM and LPIPS those of the posterior's mode.
    """
    vae = vae.to(device).eval()
    rows: dict[str, list[Tensor]] = {}
    photos: list[Tensor] = []
    ids: list[str] = []
    bad: dict[str, str] = {}
    statistics = LatentStatistics()
    for batch in batches:
        bad |= dict(batch.bad)
        real = batch.weight > 0
        batch = batch.to(device)
        images = to_images(batch.pixels)
        posterior = encode(vae, images)
        statistics.add(posterior, batch.weight)
        values = {"kl_nats": posterior.kl_to_standard_normal()}
        if likelihood is not None:
            values["nll_nats"] = -likelihood.log_prob(images, decode(vae, posterior.sample(batch.noise)))
            values["elbo_nats"] = -values["nll_nats"] - values["kl_nats"]
            if likelihood.discrete:
                values["bits_per_dim"] = bits_per_dim(values["elbo_nats"], images[0].numel())
        values["kl_nats_per_latent"] = values["kl_nats"] / posterior.mean[0].numel()
        reconstruction = decode(vae, posterior.mode())
        error = (images - reconstruction).flatten(1)
        values |= {
            "psnr_db": psnr(images, reconstruction),
            "ssim": ssim(images, reconstruction),
            "mean_absolute_error": error.abs().mean(1),
            "mean_squared_error": error.square().mean(1),
        }
        if lpips is not None:
            values["lpips"] = lpips(images, reconstruction.clamp(-1, 1))
        for name, value in values.items():
            rows.setdefault(name, []).append(value.double().cpu()[real])
        photos.append(batch.photo.cpu()[real])
        ids += [i for i, r in zip(batch.ids, real.tolist(), strict=True) if r]
    return _gather({k: torch.cat(v) for k, v in rows.items()}, torch.cat(photos), ids, statistics, bad)


def _gather(values: dict[str, Tensor], photos: Tensor, ids: list[str], statistics: LatentStatistics, bad: dict[str, str]) -> Evaluation:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (values, photos, ids, statistics.sums, bad))
        values = {k: torch.cat([p[0][k] for p in parts]) for k in values}
        photos = torch.cat([p[1] for p in parts])
        ids = [i for p in parts for i in p[2]]
        bad = {name: reason for p in parts for name, reason in p[4].items()}
        statistics = LatentStatistics()
        for part in parts:
            statistics.merge(part[3])
    if not ids:
        raise UsageError(f"none of the images to measure on can be read: {'; '.join(f'{k}: {v}' for k, v in list(bad.items())[:3])}")
    return Evaluation(values, photos, ids, statistics.channels(), statistics.sample_mean_and_std()[1], bad)
