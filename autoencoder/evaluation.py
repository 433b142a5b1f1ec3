"""Measuring an autoencoder: per-image rate, distortion and quality over a fixed set of crops."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from autoencoder.data.loader import Batch
from autoencoder.data.pixels import levels_of, to_images
from autoencoder.diagnostics import LatentStatistics, share_outside, sharpness
from autoencoder.elbo import bits_per_dim
from autoencoder.likelihood import Likelihood, PixelScale
from autoencoder.metrics import bootstrap_interval, psnr, ssim
from autoencoder.missing import filled, observed_mean, observed_values
from autoencoder.model import AutoencoderKL, decode, decode_parameters, decoded_at_once, encode
from autoencoder.objective_config import AT_BOUND
from autoencoder.pixel_recipe import PixelRecipe
from autoencoder.posterior import DiagonalGaussian
from autoencoder.runtime.errors import UsageError
from autoencoder.shuffling import LatentShuffle, Shuffled

UNITS = {
    "nll_nats": "nats per image",
    "kl_nats": "nats per image",
    "elbo_nats": "nats per image",
    "bits_per_dim": "bits per dimension",
    "kl_nats_per_latent": "nats per latent value",
    "psnr_db": "dB",  # of 8-bit pixels
    "ssim": "1",
    "lpips": "1",
    "sharpness": "share of the image's edge energy",
    "scales_at_low_bound": "share of values",
    "scales_at_high_bound": "share of values",
    "mean_absolute_error": "of images in [-1, 1]",
    "mean_squared_error": "of images in [-1, 1]",
    "valid_share": "share of pixels",
}


PSNR_OF_RANGE = "dB, the peak of each band its high - low"
"""Unit of the PSNR of other images than 8-bit ones."""


class Family(Protocol):
    """A posterior or a prior without a closed-form KL."""

    def sample(self, posterior: DiagonalGaussian, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, c, h, w) to decode, and their log q(z|x) - log p(z) in nats, (B,)."""

    def mode(self, posterior: DiagonalGaussian) -> Tensor:
        """Latents (B, c, h, w) that a reconstruction without noise is decoded from."""


@dataclass
class Evaluation:
    """Per-crop values, (N,) each, and what the latents carry."""

    values: dict[str, Tensor]
    photos: Tensor
    """Index of the image that each crop is from, (N,)."""
    ids: list[str]
    latents: LatentStatistics
    shuffled: Shuffled | None
    """The NLL with latents shuffled between images, where there is a likelihood and more than one image."""
    bad: dict[str, str]
    """Images that could not be read, with the reason."""
    eight_bit: bool
    """Whether quality is of 8-bit pixels, or of values on the recipe's range."""

    def scalars(self) -> dict[str, float]:
        """Mean of every value over the crops, and what the latents carry: what a log line shows."""
        sites, units = self.latents.active_sites(), self.latents.active_units()
        means = {name: value.mean().item() for name, value in self.values.items()}
        shuffled = {} if self.shuffled is None else {f"shuffled_{name}": value for name, value in asdict(self.shuffled).items()}
        return means | shuffled | {
            "active_channels": sum(channel.active for channel in self.latents.channels()),
            "active_sites": int(sites.sum()),
            "active_units": int(units.sum()),
            "share_near_prior": self.latents.share_near_prior(),
            "share_at_clamp": self.latents.share_at_clamp(),
        }  # fmt: skip

    def report(self, *, seed: int = 0) -> dict[str, Any]:
        """Means with 95% bootstrap intervals and standard deviations over images, per-image means and what the latents carry, for JSON."""
        _, member, crops = self.photos.unique(return_inverse=True, return_counts=True)
        sums = {k: v.new_zeros(len(crops)).index_add_(0, member, v) for k, v in self.values.items()}
        of_images = {k: v / crops for k, v in sums.items()}
        names = dict(zip(member.tolist(), (name.split("#")[0] for name in self.ids), strict=True))
        metrics = {}
        for name, value in self.values.items():
            low, high = bootstrap_interval(value, groups=self.photos, seed=seed)
            spread = of_images[name].std().item() if len(crops) > 1 else math.nan
            figures = {"mean": value.mean().item(), "low": low, "high": high, "spread": spread}
            unit = PSNR_OF_RANGE if name == "psnr_db" and not self.eight_bit else UNITS[name]
            metrics[name] = {**_finite(figures), "unit": unit}
        photos = [
            {"id": names[i], "crops": int(crops[i]), **_finite({k: v[i].item() for k, v in of_images.items()})} for i in range(len(crops))
        ]
        return {
            "metrics": metrics,
            "photos": photos,
            "channels": [asdict(c) for c in self.latents.channels()],
            "site_kl_nats": _short(self.latents.site_kl()),
            "sites": self.latents.active_sites().numel(),
            "units": self.latents.active_units().numel(),
            **_finite({name: value for name, value in self.scalars().items() if name not in self.values}),
            "latent_std": self.latents.sample_mean_and_std()[1],
            "bad_images": self.bad,
        }


def _short(values: Tensor) -> Any:
    """Nested lists of numbers of six digits; null for what JSON has no number for."""
    if values.ndim:
        return [_short(part) for part in values]
    return float(f"{values:.6g}") if values.isfinite() else None


def _finite(figures: dict[str, float]) -> dict[str, float | None]:
    """Null for what JSON has no number for: the PSNR of an exact copy, the interval and spread of a single image."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


@torch.no_grad()
def evaluate(
    vae: AutoencoderKL,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    recipe: PixelRecipe,
    likelihood: Likelihood | None,
    lpips: nn.Module | None = None,
    family: Family | None = None,
) -> Evaluation:
    """Measure `vae` on fixed crops with fixed noise; with several processes each brings its share and gets the whole.

    NLL is that of one posterior sample, and so is the KL where a `family` leaves it no closed form (nats per image, at beta = 1);
    PSNR, SSIM, LPIPS, errors and sharpness are those of the posterior's mode. Missing pixels count in none of them; LPIPS is shown the
    image's own values there. Bits/dim are for each value that was observed.
    """
    vae = vae.to(device).eval()
    rows: dict[str, list[Tensor]] = {}
    photos: list[Tensor] = []
    ids: list[str] = []
    bad: dict[str, str] = {}
    statistics, shuffle = LatentStatistics(), LatentShuffle(recipe)
    for loaded in batches:
        bad |= dict(loaded.bad)
        real = loaded.weight > 0
        if likelihood is not None and likelihood.discrete and real.any():
            _check_levels(likelihood, levels_of(loaded.pixels, recipe), loaded.ids[real.tolist().index(True)])
        batch = loaded.to(device)
        valid = batch.valid
        images = to_images(batch.pixels, recipe, valid)
        posterior = encode(vae, images)
        statistics.add(posterior, batch.weight)
        if family is None:
            latents, rate = posterior.sample(batch.noise), posterior.kl_to_standard_normal()
        else:
            latents, rate = family.sample(posterior, batch.noise)
        values = {"kl_nats": rate}
        if likelihood is not None:
            decoded = decode_parameters(vae, latents)
            values["nll_nats"] = -likelihood.observed(valid).log_prob(images, decoded)
            shuffle.add(loaded, latents, values["nll_nats"])
            values["elbo_nats"] = -values["nll_nats"] - values["kl_nats"]
            if likelihood.discrete:
                values["bits_per_dim"] = bits_per_dim(values["elbo_nats"], observed_values(images, valid))
            if isinstance(likelihood, PixelScale):
                low, high = likelihood.bounds
                shares = share_outside(likelihood.split(decoded)[1], low * AT_BOUND, high / AT_BOUND, valid)
                values |= dict(zip(("scales_at_low_bound", "scales_at_high_bound"), shares, strict=True))
        values["kl_nats_per_latent"] = values["kl_nats"] / posterior.mean[0].numel()
        reconstruction = decode(vae, posterior.mode() if family is None else family.mode(posterior))
        error = images - reconstruction
        values |= {
            "psnr_db": psnr(images, reconstruction, eight_bit=recipe.eight_bit, valid=valid),
            "ssim": ssim(images, reconstruction, eight_bit=recipe.eight_bit, valid=valid),
            "mean_absolute_error": observed_mean(error.abs(), valid),
            "mean_squared_error": observed_mean(error.square(), valid),
            "sharpness": sharpness(images, reconstruction, valid),
        }
        if valid is not None:
            values["valid_share"] = valid.flatten(1).float().mean(1)
        if lpips is not None:
            values["lpips"] = lpips(images, filled(reconstruction.clamp(-1, 1), images, valid))
        for name, value in values.items():
            rows.setdefault(name, []).append(value.double().cpu()[real])
        photos.append(loaded.photo[real])
        ids += [i for i, r in zip(loaded.ids, real.tolist(), strict=True) if r]
    evaluation = _gather({k: torch.cat(v) for k, v in rows.items()}, torch.cat(photos), ids, statistics, bad, recipe)
    if likelihood is not None:
        at_once = decoded_at_once(loaded.pixels.shape[-1])
        evaluation.shuffled = shuffle.measure(lambda latents: decode_parameters(vae, latents), likelihood, device, at_once)
    return evaluation


def _check_levels(likelihood: Likelihood, levels: int, id: str) -> None:
    """Refuse images whose values are not those that a likelihood over levels is over."""
    if levels == 0:
        raise UsageError(
            f"a likelihood over {likelihood.levels:,} levels gives no probability to continuous values ({id}): give "
            "likelihood.name=laplace or gaussian, with its scale"
        )
    if levels != likelihood.levels:
        raise UsageError(
            f"a likelihood over {likelihood.levels:,} levels gives no probability to images of {levels:,} ({id}): give "
            f"likelihood.levels={levels}, or images of its levels"
        )


def _gather(
    values: dict[str, Tensor], photos: Tensor, ids: list[str], statistics: LatentStatistics, bad: dict[str, str], recipe: PixelRecipe
) -> Evaluation:
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
        if not bad:
            raise UsageError("every pixel of the images to measure on is missing; give others, or mend data.nodata if that is not so")
        raise UsageError(f"none of the images to measure on can be read: {'; '.join(f'{k}: {v}' for k, v in list(bad.items())[:3])}")
    return Evaluation(values, photos, ids, statistics, None, bad, recipe.eight_bit)
