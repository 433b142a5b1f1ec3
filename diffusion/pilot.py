"""What is settled before a bound is measured, on rows that are not the measured ones: where to draw, where to end, and a calibration.

The bound holds for each highest log SNR, but one that is chosen on the rows it is then measured on would flatter the figure.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.likelihood import (
    Denoise,
    Evaluated,
    Latents,
    LevelSampler,
    Terms,
    assemble,
    evaluations,
    evenly,
    gaussian_levels,
    level_differences,
    level_edges,
)
from diffusion.process import Process

SLACK = 1e-4
"""Nats a value by which a bound may be above the least over all ends: among these ends, the lowest one is taken."""
FLOOR = 0.25
"""Share of the draws that is spread evenly: no draw weighs more than four times what it would alone (Hesterberg 1995), also not for the
calibrated bound, which lies elsewhere."""


@dataclass(frozen=True)
class Plan:
    """Where to draw, and how far up each bound goes."""

    sampler: LevelSampler
    levels: int
    """Of the sampler's levels, those under the highest log SNR of the network's own bound."""
    calibration: "Calibration"
    calibrated_levels: int
    """Likewise, of the calibrated bound."""


@dataclass(frozen=True)
class Calibration:
    """Least-squares coefficients that make an estimate of the noise out of what the network says of noise and latents.

    noise^' = a noise^ + b z^, for each level and channel; as z_t = alpha z^ + sigma noise^, these are the combinations of the network's
    answer with its input. They mend what training has starved, the ends above all.
    """

    coefficients: Tensor
    """(K, c, 2)."""
    differences: Tensor
    """0.5 |noise - noise^'|**2 less that of N(0, I), summed over the rows of the fit, (K, c), as is to be expected on other rows."""

    def __call__(self, evaluated: Evaluated) -> Tensor:
        """The calibrated estimate of the noise."""
        a, b = self.coefficients.to(evaluated.level.device)[evaluated.level][..., None, None].unbind(3)  # (n, m, c, 1, 1) each
        return a * evaluated.noise_hat + b * evaluated.denoised


def plan(denoiser: Denoise, rows: Latents, process: Process, *, seed: int, batch_size: int = 256) -> Plan:
    """Evaluate the network once a row and level, and choose: ends, a calibration, and a density proportional to the root mean square of
    what is drawn, which has the least variance of one draw.
    """
    edges = level_edges(process)
    number, channels, dims = len(edges) - 1, rows.values.shape[1], rows.values[0].numel()
    differences, squares = torch.zeros(number, channels, dtype=torch.float64), torch.zeros(number, dtype=torch.float64)
    fit = _Fit(number, channels)
    for evaluated in evaluations(
        denoiser, rows, process, evenly(edges), draws=number, seed=seed, batch_size=batch_size, stream="likelihood pilot"
    ):
        nats = level_differences(evaluated, evaluated.noise_hat, number)  # of one draw in each level
        differences += nats.sum(0)
        squares += nats.sum(2).square().sum(0)
        fit.add(evaluated)
    normal = gaussian_levels(rows.values, torch.zeros(channels), torch.ones(channels), edges).mean(0)  # (K, c)
    calibration = fit.solve()
    better = normal + calibration.differences * edges.diff()[:, None] / len(rows)
    own, calibrated = (highest_level(nats.sum(1), edges, dims) for nats in (normal + differences / len(rows), better))
    kept = max(own, calibrated)
    return Plan(sampler_of(edges[: kept + 1], squares[:kept].sqrt()), own, calibration, calibrated)


def planned_bounds(
    denoiser: Denoise, rows: Latents, process: Process, chosen: Plan, *, draws: int, seed: int, batch_size: int = 256
) -> tuple[Terms, Terms]:
    """The network's own bound and the calibrated one, from the same `draws` evaluations of it a row."""
    number, edges = len(chosen.sampler.probabilities), chosen.sampler.edges
    levels = [torch.zeros((len(rows), number, rows.values.shape[1]), dtype=torch.float64) for _ in range(2)]
    for evaluated in evaluations(denoiser, rows, process, chosen.sampler, draws=draws, seed=seed, batch_size=batch_size):
        for sums, estimate in zip(levels, (evaluated.noise_hat, chosen.calibration(evaluated)), strict=True):
            sums[evaluated.rows] = level_differences(evaluated, estimate, number)
    own, calibrated = (
        assemble(rows.values, process, edges[: kept + 1], sums[:, :kept])
        for sums, kept in zip(levels, (chosen.levels, chosen.calibrated_levels), strict=True)
    )
    return own, calibrated


def highest_level(nats: Tensor, edges: Tensor, dims: int) -> int:
    """How many levels to keep from below, where the integral over each costs `nats` (K,) a row: a level that tells less than it costs
    is left out, for the last term pays 0.5 nats a value and unit of log SNR in its place.
    """
    heights = (nats - 0.5 * dims * edges.diff()).cumsum(0)
    return int((heights <= heights.min() + SLACK * dims).nonzero()[0]) + 1


def sampler_of(edges: Tensor, roots: Tensor) -> LevelSampler:
    """The density proportional to `roots` (K,), the integral over each level, for the most part."""
    even = evenly(edges).probabilities
    total = roots.sum()
    return LevelSampler(edges, even if total == 0 else (1 - FLOOR) * roots / total + FLOOR * even)


class _Fit:
    """Normal equations of the noise on (noise^, z^), by level and channel."""

    def __init__(self, levels: int, channels: int) -> None:
        self.gram = torch.zeros(levels, channels, 2, 2, dtype=torch.float64)
        self.moment = torch.zeros(levels, channels, 2, dtype=torch.float64)
        self.noise, self.control = torch.zeros(2, levels, channels, dtype=torch.float64)
        self.values = 0

    def add(self, evaluated: Evaluated) -> None:
        """Rows with one draw in each level, in order."""
        basis = torch.stack((evaluated.noise_hat, evaluated.denoised), dim=-1).flatten(3, 4)  # (n, K, c, h w, 2)
        noise = evaluated.noise.flatten(3)
        self.gram += torch.einsum("nkcxi,nkcxj->kcij", basis, basis).cpu()
        self.moment += torch.einsum("nkcxi,nkcx->kci", basis, noise).cpu()
        self.noise += noise.square().sum((0, 3)).cpu()
        self.control += evaluated.control.sum(0).cpu()
        self.values += noise.shape[0] * noise.shape[3]

    def solve(self) -> Calibration:
        # Where the network says nothing, both are the input but for a factor: the pseudo-inverse shares the work out.
        coefficients = (torch.linalg.pinv(self.gram, rtol=1e-8, hermitian=True) @ self.moment[..., None])[..., 0]
        left = self.noise - (coefficients * self.moment).sum(-1)
        # Two coefficients fit some of the noise of these very rows (the final prediction error of Akaike 1970).
        expected = left * (self.values + 2) / (self.values - 2)
        return Calibration(coefficients, 0.5 * (expected - self.control))
