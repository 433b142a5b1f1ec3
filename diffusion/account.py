"""The account of both stages: the bound on -log p(x) with a diffusion model as the prior, beside the same with the standard normal.

    -log p(x) <= E_q[-log p(x|z)]  +  E_q[-log p(z)] - H(q(z|x))            nats per image
                 ╰──── NLL ────╯     ╰───────── rate ──────────╯

With N(0, I) for p(z) the rate is the KL, in closed form. Of the diffusion model -log p(z) is bounded (`likelihood`) at samples of the
posterior; there its difference to -log N(z; 0, I) is taken, which is less noisy than either.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoencoder.data.sources import fingerprints
from autoencoder.latents.progress import Progress
from autoencoder.measuring import Opened, Report
from autoencoder.missing import observed_values
from autoencoder.model import decode_parameters, decoded_at_once, encode
from autoencoder.posterior import DiagonalGaussian
from autoencoder.probing import spread_batches
from autoencoder.runtime.errors import ConfigError, UsageError
from autoencoder.runtime.rng import generator
from diffusion.denoiser import NULL_CLASS
from diffusion.evaluate import EvaluatePairConfig
from diffusion.learned_prior import LearnedPrior, images_of, open_prior, pilot_latents
from diffusion.likelihood import Estimate, Latents, Terms, gaussian_levels
from diffusion.ode_likelihood import ode_values
from diffusion.pilot import Plan, plan, planned_bounds
from diffusion.pipeline_path import network_hash, pipeline_folder
from diffusion.price import Rates, Slopes

REPLICATES = 2
"""Posterior samples a crop, each with draws of its own: what tells the error of the estimation."""
STEP = 0.25 * math.log(2)
"""Change of the logarithm of the posterior's standard deviation, down and up, over which the price is a difference."""


def prepare(config: EvaluatePairConfig, opened: Opened) -> Callable[[Report], Report]:
    """Open the pipeline and refuse what has no account; what comes back measures it.

    Raises:
        UsageError: no likelihood, a posterior or prior that is not Gaussian, another encoder's pipeline, or latents of another shape.
    """
    path, folder = str(config.pipeline), pipeline_folder(str(config.pipeline))
    assert folder is not None
    if opened.likelihood is None:
        raise ConfigError("pipeline", path, "the account needs the model's likelihood: give likelihood.name and likelihood.scale")
    if opened.family is not None:
        raise ConfigError("pipeline", path, "this model has a posterior or prior of an experimental family; give a plain KL-VAE")
    prior = open_prior(path, opened.device)
    if prior.encoder_hash != opened.encoder_hash:
        raise UsageError(
            f"pipeline: a prior over the latents of another encoder\n  {path}: encoder_hash {prior.encoder_hash}\n  {config.model}: "
            f"encoder_hash {opened.encoder_hash}\ngive the autoencoder that its latents are of, or the pipeline that was trained on this "
            "one's"
        )
    if prior.shape != opened.latent_shape:
        factor = opened.crops.side // opened.latent_shape[1]
        raise ConfigError("data.resolution", opened.crops.side, f"the pipeline's latents are {prior.shape}; give {prior.shape[1] * factor}")
    settings = config.account
    pilot, stored = pilot_latents(
        prior, path, settings.latents, most=settings.pilot_rows, seed=config.seed, labelled=settings.labels == "auto", device=opened.device
    )
    encoded = {segment["source"]["fingerprint"] for segment in stored.manifest["segments"]} | images_of(path)
    told = {
        "pipeline": path,
        "network_hash": network_hash(folder),
        "process": prior.process.head,
        "pilot": {"latents": str(stored.folder), "rows": len(pilot)},
        "same_images": not encoded.isdisjoint(fingerprints(opened.source)),
    }
    return lambda report: told | _Account(config, opened, prior, pilot).measure(report)


@dataclass(frozen=True)
class _Crops:
    """What is measured of a batch of n crops; replicates R, levels K, channels c."""

    photo: Tensor
    """(n,)."""
    labels: Tensor
    """(n,)."""
    dims: Tensor
    """Observed values, (n,)."""
    rates: dict[float, Rates]
    """By the logarithm of what the posterior's standard deviation is multiplied with; at 0 the model's own."""
    calibrated: Tensor
    """The rate with the calibrated prior, (R, n)."""
    normal: Tensor
    """-log N(z; 0, I), (R, n, c)."""
    saved: Tensor
    """The same less that of the learned prior, (R, n, c)."""
    normal_levels: Tensor
    """The part of the first by level, (R, n, K)."""
    saved_levels: Tensor
    """The part of the second, (R, n, K)."""
    latents: Tensor
    """Of the first replicate, normalised, (n, c, h, w) on the CPU."""
    bound: Tensor
    """On -log p(z) of these, (n,)."""


class _Account:
    def __init__(self, config: EvaluatePairConfig, opened: Opened, prior: LearnedPrior, pilot: Latents) -> None:
        self.config, self.opened, self.prior, self.settings = config, opened, prior, config.account
        self.plan: Plan = plan(prior.denoiser, pilot, prior.process, seed=config.seed, batch_size=self.settings.batch_size)
        # The standard normal in the network's units.
        self.mean, self.std = -prior.mean / prior.std, 1 / prior.std
        self.steps = (0.0, -STEP, STEP) if self.settings.price else (0.0,)

    def measure(self, report: Report) -> Report:
        crops = self._crops()
        photo, dims = (torch.cat([getattr(part, name) for part in crops]) for name in ("photo", "dims"))
        rates = {step: Rates.joined([part.rates[step] for part in crops]) for step in self.steps}
        calibrated, normal, saved, normal_levels, saved_levels = (
            torch.cat([getattr(part, name) for part in crops], dim=1)
            for name in ("calibrated", "normal", "saved", "normal_levels", "saved_levels")
        )
        own = rates[0.0]

        def told(values: Tensor) -> dict[str, Any]:
            return _finite(asdict(Estimate.of(values, photo)))

        def total(rate: Tensor) -> dict[str, Any]:
            both = {"rate_nats": told(rate), "total_nats": told(own.nll + rate)}
            discrete = self.opened.likelihood is not None and self.opened.likelihood.discrete
            return both | ({"bits_per_dim": told((own.nll + rate) / (dims * math.log(2)))} if discrete else {})

        labels, edges = torch.cat([part.labels for part in crops]), self.plan.sampler.edges.tolist()
        found: Report = {
            "crops": len(photo),
            "images": len(photo.unique()),
            "draws": self.settings.draws,
            "labelled": int((labels != NULL_CLASS).sum()),
            "log_snr": [edges[0], edges[self.plan.levels]],
            "calibrated_log_snr": [edges[0], edges[self.plan.calibrated_levels]],
            "nll_nats": told(own.nll),
            "standard_normal": total(own.normal),
            "learned": total(own.learned),
            "calibrated": total(calibrated),
            "saved_nats": told(saved.sum(2)),
            "calibrated_saved_nats": told(own.normal - calibrated),
            "channels": [
                {"normal_nats": told(normal[..., c]), "saved_nats": told(saved[..., c])} for c in range(normal.shape[2])
            ],
            "levels": [
                {"log_snr": edges[k : k + 2], "normal_nats": told(normal_levels[..., k]), "saved_nats": told(saved_levels[..., k])}
                for k in range(self.plan.levels)
            ],
            "ends": {
                "normal_nats": told(normal.sum(2) - normal_levels.sum(2)),
                "saved_nats": told(saved.sum(2) - saved_levels.sum(2)),
            },
        }  # fmt: skip
        if self.settings.price:
            found["price"] = self._price(rates, photo, report)
        if self.settings.ode_rows:
            found["ode"] = self._ode(crops)
        return found

    def _crops(self) -> list[_Crops]:
        opened, measured = self.opened, []
        at_once = min(self.config.batch_size, decoded_at_once(opened.crops.side))
        progress = Progress(min(self.settings.images, len(opened.crops)), 0, verb="account measured on", unit="crop")
        for batch, images, valid in spread_batches(opened.crops, opened.pixels, self.settings.images, at_once, opened.device):
            readable = batch.weight > 0
            position, photo, label = (of[readable] for of in (batch.position, batch.photo, batch.labels))
            measured.append(self._measure(position, photo, label, images, valid))
            progress.advance(len(batch.ids))
        progress.close(finished=True)
        if sum(len(part.photo) for part in measured) < 2:
            raise UsageError("fewer than two of the crops for the account can be read; give more images")
        return measured

    @torch.no_grad()
    def _measure(self, positions: Tensor, photo: Tensor, classes: Tensor, images: Tensor, valid: Tensor | None) -> _Crops:
        opened, prior, posterior = self.opened, self.prior, encode(self.opened.vae, images)
        assert opened.likelihood is not None
        likelihood = opened.likelihood.observed(valid)
        labels = prior.labels(classes, opened.source.labels, asked=self.settings.labels == "auto").to(images.device)
        noise = self._noise(positions.tolist()).to(images.device)
        nll: dict[float, list[Tensor]] = {step: [] for step in self.steps}
        learned: dict[float, list[Tensor]] = {step: [] for step in self.steps}
        parts: dict[str, list[Tensor]] = {name: [] for name in ("calibrated", "normal", "saved", "normal_levels", "saved_levels")}
        kls = {step: _widened(posterior, step).kl_to_standard_normal().double().cpu() for step in self.steps}
        kept: tuple[Tensor, Tensor] | None = None
        for replicate in range(REPLICATES):
            numbers = [position * REPLICATES + replicate for position in positions.tolist()]
            for step in self.steps:
                z = _widened(posterior, step).sample(noise[replicate])
                nll[step].append(-likelihood.log_prob(images, decode_parameters(opened.vae, z)).double().cpu())
                rows = Latents(prior.normalize(z), labels, numbers)
                own, calibrated = self._bounds(rows)
                normal = self._normal(z)
                learned[step].append(kls[step] + own.nats - normal.sum(1))
                if step == 0:
                    levels = gaussian_levels(rows.values, self.mean, self.std, self.plan.sampler.edges[: self.plan.levels + 1]).sum(2)
                    parts["calibrated"].append(kls[step] + calibrated.nats - normal.sum(1))
                    parts["normal"].append(normal)
                    parts["saved"].append(normal - own.channels)
                    parts["normal_levels"].append(levels)
                    parts["saved_levels"].append(levels - own.levels.sum(2))
                    kept = kept or (rows.values.cpu(), own.nats)
        assert kept is not None
        rates = {step: Rates(torch.stack(nll[step]), kls[step].expand(REPLICATES, -1), torch.stack(learned[step])) for step in self.steps}
        dims = torch.as_tensor(observed_values(images, valid)).double().cpu().expand(len(images))
        return _Crops(
            photo,
            labels.cpu(),
            dims,
            rates,
            **{name: torch.stack(values) for name, values in parts.items()},
            latents=kept[0],
            bound=kept[1],
        )

    def _bounds(self, rows: Latents) -> tuple[Terms, Terms]:
        """The bounds on -log p(z) of normalised latents."""
        return planned_bounds(
            self.prior.denoiser, rows, self.prior.process, self.plan, draws=self.settings.draws // REPLICATES, seed=self.config.seed,
            batch_size=self.settings.batch_size,
        )  # fmt: skip

    def _normal(self, z: Tensor) -> Tensor:
        """-log N(z; 0, I) by channel, (n, c), as a density of the normalised latents: these have 1 / std of the volume."""
        nats = 0.5 * (z.double().square() + math.log(2 * math.pi)).flatten(2).sum(2).cpu()
        return nats - z[0, 0].numel() * self.prior.std.log()

    def _noise(self, positions: list[int]) -> Tensor:
        """Noise of the posterior samples, (R, n, c, h, w)."""
        shape = (REPLICATES, *self.opened.latent_shape)
        streams = [generator(self.config.seed, "account", position) for position in positions]
        return torch.from_numpy(np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams], axis=1))

    def _price(self, rates: dict[float, Rates], photo: Tensor, report: Report) -> Report:
        slopes = Slopes.between(rates[-STEP], rates[STEP])
        return {
            "learned": _finite(asdict(slopes.price_of_learned(photo))),
            "standard_normal": _finite(asdict(slopes.price_of_normal(photo))),
            "best_beta": _finite(asdict(slopes.learned_for_normal(photo))),
            "effective_beta": report["objective"]["beta"] if report["objective"]["convention"] is not None else None,
        }

    def _ode(self, crops: list[_Crops]) -> Report:
        """The ODE's -log p(z) of the first crops, and the bound at the same latents."""
        most, edges, device = self.settings.ode_rows, self.plan.sampler.edges, self.opened.device
        names = ("latents", "bound", "labels", "photo")
        values, bounds, labels, photo = (torch.cat([getattr(part, name) for part in crops])[:most] for name in names)
        print(f"account: probability-flow ODE of {len(values)} crops", file=sys.stderr)
        found = ode_values(
            self.prior.denoiser, Latents(values.to(device), labels.to(device), range(len(values))), self.prior.process, low=float(edges[0]),
            high=float(edges[self.plan.levels]), rtol=self.settings.ode_tolerance, atol=self.settings.ode_tolerance, seed=self.config.seed,
        )  # fmt: skip
        difference = Estimate.of((bounds - found.nats)[None], photo)
        return _finite({
            "rows": len(values),
            "nats": float(found.nats.mean()),
            "trace_error": float(found.errors.square().sum().sqrt() / len(values)),
            "bound_less_ode_nats": difference.mean,
            "standard_error": difference.standard_error,
            "evaluations": found.evaluations,
        })  # fmt: skip


def _widened(posterior: DiagonalGaussian, step: float) -> DiagonalGaussian:
    """With its standard deviation exp(step) times as large."""
    return DiagonalGaussian(posterior.mean, posterior.logvar + 2 * step)


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    """Null for what JSON has no number for: the standard error of one image."""
    return {name: value if not isinstance(value, float) or math.isfinite(value) else None for name, value in figures.items()}
