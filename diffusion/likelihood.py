"""A diffusion model's variational bound on -log p(z) in nats, its integral over noise levels by importance sampling.

    -log p(z) <= KL(q(z_1|z) || N(0, I))  +  integral of 0.5 E|noise - noise^|**2 over the log SNR  +  E[-log p(z|z_0)]

(Kingma et al. 2021, eqs. 11-18), from the lowest log SNR to the highest, for any path and head, and for any two ends: what the ends leave
out, the first and the last term pay for. Any function of z_t may stand for the network.

What is drawn is only the difference to the integral that the prior N(0, I) has with its own best denoiser: that one has a closed form for
each row, and its integrand at the same draws goes up and down with the network's (a control variate).

Axes: N rows, m draws a row, K levels (bins of log SNR), c channels. Sums are in float64.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autoencoder.runtime.rng import generator
from diffusion.process import Process

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(noisy (B, c, h, w), t (B,), labels (B,)) to the output of the process's head, (B, c, h, w)."""

LOWEST, HIGHEST = -12.0, 18.0
"""Log SNRs where a path without ends of its own is cut: at -12 the first term is 3e-6 nats a value of unit variance; at 18, noise has
1e-4 of its standard deviation."""


@dataclass(frozen=True)
class Latents:
    """Rows whose probability is asked for."""

    values: Tensor
    """(N, c, h, w), normalised as the network knows them."""
    labels: Tensor
    """(N,) int64, the null class for none."""
    numbers: Sequence[int]
    """(N,): what a row draws is a function of the seed and its number."""

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class LevelSampler:
    """A density over the log SNR that is constant within levels."""

    edges: Tensor
    """(K + 1,) float64, ascending."""
    probabilities: Tensor
    """(K,) float64."""

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Uniform numbers in [0, 1) to log SNRs, 1 / their density, and their levels, all of the same shape."""
        ends = self.probabilities.cumsum(0)
        level = torch.searchsorted(ends, uniform.contiguous(), right=True).clamp(max=len(self.probabilities) - 1)
        width, probability = self.edges.diff()[level], self.probabilities[level]
        share = ((uniform - (ends[level] - probability)) / probability).clamp(0, 1)
        return self.edges[level] + share * width, width / probability, level


@dataclass(frozen=True)
class Terms:
    """The bound on -log p(z) of rows in nats, by its parts, on the CPU."""

    first: Tensor
    """KL(q(z_1|z) || N(0, I)), (N, c)."""
    levels: Tensor
    """The integral over each level, (N, K, c)."""
    last: Tensor
    """E[-log p(z|z_0)], (N, c)."""

    @property
    def nats(self) -> Tensor:
        """The bound, (N,)."""
        return self.channels.sum(1)

    @property
    def channels(self) -> Tensor:
        """The bound by channel, (N, c)."""
        return self.first + self.levels.sum(1) + self.last


@dataclass(frozen=True)
class Evaluated:
    """What a network says of rows n at m noise levels each, float64."""

    rows: slice
    level: Tensor
    """(n, m)."""
    weight: Tensor
    """1 / the density of the draw, (n, m)."""
    noise: Tensor
    """(n, m, c, h, w)."""
    noise_hat: Tensor
    """The noise that the network sees, (n, m, c, h, w)."""
    denoised: Tensor
    """The latents that it sees, (n, m, c, h, w)."""
    control: Tensor
    """The squared error of the noise that the prior N(0, I) sees, summed by channel, (n, m, c)."""


NoiseEstimate = Callable[[Evaluated], Tensor]
"""The estimate of the noise (n, m, c, h, w) that is held against it."""


def plain(evaluated: Evaluated) -> Tensor:
    """The network's own."""
    return evaluated.noise_hat


def log_snr_ends(process: Process) -> tuple[float, float]:
    """The log SNRs between which a process can be measured: the ends of its path, no further than `LOWEST` and `HIGHEST`."""
    first, last = process.path.log_snr(torch.tensor(process.path.times, dtype=torch.float64)).tolist()
    return max(last, LOWEST), min(first, HIGHEST)


def level_edges(process: Process, levels: int | None = None) -> Tensor:
    """Edges (K + 1,) of even levels between these ends, each about 1 wide unless their number is given."""
    low, high = log_snr_ends(process)
    return torch.linspace(low, high, (levels or round(high - low)) + 1, dtype=torch.float64)


def evenly(edges: Tensor) -> LevelSampler:
    """The uniform density."""
    widths = edges.diff()
    return LevelSampler(edges, widths / widths.sum())


def bound(
    denoiser: Denoise,
    rows: Latents,
    process: Process,
    sampler: LevelSampler,
    *,
    draws: int,
    seed: int,
    batch_size: int = 256,
    estimate: NoiseEstimate = plain,
) -> Terms:
    """The bound between the sampler's ends by `draws` evaluations of the network a row, about `batch_size` at once; unbiased."""
    levels = rows.values.new_zeros((len(rows), len(sampler.probabilities), rows.values.shape[1]), dtype=torch.float64, device="cpu")
    for evaluated in evaluations(denoiser, rows, process, sampler, draws=draws, seed=seed, batch_size=batch_size):
        levels[evaluated.rows] = level_differences(evaluated, estimate(evaluated), len(sampler.probabilities))
    return assemble(rows.values, process, sampler.edges, levels)


@torch.no_grad()
def evaluations(
    denoiser: Denoise,
    rows: Latents,
    process: Process,
    sampler: LevelSampler,
    *,
    draws: int,
    seed: int,
    batch_size: int,
    stream: str = "likelihood",
) -> Iterator[Evaluated]:
    """The network at systematic draws of the sampler, (u + j) / m for a row's u in [0, 1) and j < m: about `batch_size` at once.

    u and the noise are functions of (seed, stream, the row's number).
    """
    device, at_once = rows.values.device, max(1, batch_size // draws)
    for start in range(0, len(rows), at_once):
        part = slice(start, min(start + at_once, len(rows)))
        streams = [generator(seed, stream, number) for number in rows.numbers[part]]
        offsets = torch.tensor([stream.random() for stream in streams], dtype=torch.float64)
        shape = (draws, *rows.values.shape[1:])
        noise = torch.from_numpy(np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])).to(device).double()
        log_snr, weight, level = sampler.draw((offsets[:, None] + torch.arange(draws)) / draws)
        t = process.path.time(log_snr).to(device).flatten()
        latents = rows.values[part].double()[:, None].expand_as(noise).flatten(0, 1)
        noisy = process.noisy(latents, noise.flatten(0, 1), t)
        output = denoiser(noisy.to(rows.values.dtype), t.to(rows.values.dtype), rows.labels[part].repeat_interleave(draws)).double()
        noise_hat, denoised = (f(noisy, output, t).view_as(noise) for f in (process.noise, process.denoised))
        alpha, sigma = (scale.view(*log_snr.shape, 1, 1, 1) for scale in process.path.scales(t))
        # E[noise | z_t] = sigma z_t / (alpha**2 + sigma**2) for z of unit variance.
        control = noise - sigma / (alpha**2 + sigma**2) * noisy.view_as(noise)
        yield Evaluated(part, level.to(device), weight.to(device), noise, noise_hat, denoised, control.square().flatten(3).sum(3))


def level_differences(evaluated: Evaluated, noise_hat: Tensor, levels: int) -> Tensor:
    """By how much this estimate's integral of 0.5 |noise - noise^|**2 over each level is above that of N(0, I), (n, K, c), on the CPU."""
    errors = (evaluated.noise - noise_hat).square().flatten(3).sum(3)  # (n, m, c)
    weighted = 0.5 * (errors - evaluated.control) * evaluated.weight[..., None] / errors.shape[1]
    at = torch.nn.functional.one_hot(evaluated.level, levels).to(weighted)  # (n, m, K)
    return torch.einsum("nmk,nmc->nkc", at, weighted).cpu()


def assemble(latents: Tensor, process: Process, edges: Tensor, differences: Tensor) -> Terms:
    """The bound of latents (N, c, h, w) from `level_differences` (N, K, c) between these edges, with the rest, which has closed forms."""
    zero, one = torch.zeros(latents.shape[1]), torch.ones(latents.shape[1])
    levels = differences + gaussian_levels(latents, zero, one, edges)
    return Terms(first_term(latents, process, float(edges[0])), levels, last_term(latents, float(edges[-1])))


def first_term(latents: Tensor, process: Process, log_snr: float) -> Tensor:
    """KL(N(alpha z, sigma**2) || N(0, 1)) = 0.5 (alpha**2 z**2 + sigma**2 - 1 - ln sigma**2), summed by channel, (N, c) on the CPU."""
    alpha, sigma = (float(x) for x in process.path.scales(process.path.time(torch.tensor(log_snr, dtype=torch.float64))))
    values = latents.double().flatten(2).cpu()
    return 0.5 * (alpha**2 * values.square().sum(2) + values.shape[2] * (sigma**2 - 1 - 2 * math.log(sigma)))


def last_term(latents: Tensor, log_snr: float) -> Tensor:
    """E[-log N(z; z_0 / alpha, sigma**2 / alpha**2)] = 0.5 (ln(2 pi e) - log SNR) a value, summed by channel, (N, c) on the CPU."""
    rows, channels, *sides = latents.shape
    return torch.full((rows, channels), 0.5 * math.prod(sides) * (math.log(2 * math.pi * math.e) - log_snr), dtype=torch.float64)


def gaussian_levels(latents: Tensor, mean: Tensor, std: Tensor, edges: Tensor) -> Tensor:
    """The same integrals, (N, K, c) on the CPU, of the prior N(mean, diag std**2) a channel with its own best denoiser, in closed form.

    With s**2 the variance, r = exp(log SNR) and y the distance to the mean, the integrand of a value is
    0.5 (r y**2 + (s**2 r)**2) / (1 + s**2 r)**2, and its integral 0.5 (ln(1 + s**2 r) + (1 - y**2 / s**2) / (1 + s**2 r)).
    """
    variance = std.double().cpu().square()[:, None]
    deviations = (latents.double().cpu() - mean.double().cpu().view(-1, 1, 1)).flatten(2)
    count, squares = deviations.shape[2], deviations.square().sum(2)[..., None]  # (N, c, 1)
    grown = 1 + variance * edges.exp()  # (c, K + 1)
    return (0.5 * (count * grown.log() + (count - squares / variance) / grown)).diff(dim=2).transpose(1, 2)


@dataclass(frozen=True)
class Estimate:
    """A mean over rows, with what is uncertain about it."""

    mean: float
    standard_error: float
    """Over images, of everything: they are a sample, and their values are estimates. Not a number for one image."""
    monte_carlo: float
    """Of the estimation alone, these images given: from replicates with draws of their own. Not a number without replicates."""

    @classmethod
    def of(cls, values: Tensor, images: Tensor | None = None) -> "Estimate":
        """Of replicates (R, N); `images` (N,) tells which image a row is of, each its own unless given."""
        replicates, rows = values.shape
        mean, per_row = values.mean(), values.mean(0)
        monte_carlo = (values.var(0).sum() / replicates).sqrt() / rows if replicates > 1 else torch.tensor(math.nan)
        return cls(float(mean), float(standard_error(per_row - mean, images)), float(monte_carlo))


def standard_error(deviations: Tensor, images: Tensor | None = None) -> Tensor:
    """Standard error of a mean over rows from their deviations (N,) of it, rows of one image together."""
    rows = len(deviations)
    if images is not None:
        member = images.unique(return_inverse=True)[1].to(deviations.device)
        deviations = deviations.new_zeros(int(member.max()) + 1).index_add_(0, member, deviations)
    clusters = len(deviations)
    return (deviations.square().sum() * clusters / (clusters - 1)).sqrt() / rows if clusters > 1 else deviations.new_tensor(math.nan)
