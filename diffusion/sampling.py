"""Samplers: plain functions of what is known of latents and noise at a level of noise, a start, and a grid of levels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from autoencoder.runtime.rng import generator
from diffusion.denoiser import NULL_CLASS
from diffusion.process import TIMESTEPS, Process
from diffusion.schedulers import LEAST_LOG_SNR, integrate


@dataclass(frozen=True)
class Level:
    """A level of noise: x = alpha latents + sigma noise."""

    t: float
    """The time that the network is told."""
    alpha: float
    sigma: float
    trained: bool = True
    """Whether a network is trained there: where nothing is left of the noise, none of a variance-preserving process is."""


Output = Callable[[Tensor, float], Tensor]
"""(x, t) to the network's output."""
Estimate = Callable[[Tensor, Level], tuple[Tensor, Tensor]]
"""(x, level) to what is expected of latents and noise there."""


def shifted(t: np.ndarray, shift: float) -> np.ndarray:
    """Times s t / (1 + (s - 1) t), which for s above 1 are noisier: a flow's log SNR is lower by 2 ln s (Esser et al. 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def levels(process: Process, steps: int, time_shift: float = 1.0) -> list[Level]:
    """steps + 1 levels from noise down to latents without noise, evenly in t.

    Flows: the grid of diffusers' flow schedulers, from t = 1 - 1/1000 to 0. Variance-preserving: from the table's last time (of the cosine
    table from `LEAST_LOG_SNR`) to its first, where some noise is left, and none last.
    """
    if process.head == "velocity":
        times = shifted(np.linspace(1 - 1 / TIMESTEPS, 0, steps + 1), time_shift)
        return [level(process, t) for t in times.tolist()]
    first = float(process.path.time(torch.tensor(LEAST_LOG_SNR, dtype=torch.float64)))
    return [*(level(process, t) for t in np.linspace(first, process.path.times[0], steps).tolist()), CLEAN]


def level(process: Process, t: float, told: float | None = None) -> Level:
    """The level of a process at t, of which the network is told t, or another time."""
    alpha, sigma = process.path.scales(torch.tensor(t, dtype=torch.float64))
    return Level(t if told is None else told, float(alpha), float(sigma))


CLEAN = Level(0.0, 1.0, 0.0, trained=False)
"""The end of a variance-preserving sample."""


def euler(estimate: Estimate, x: Tensor, grid: Sequence[Level]) -> Tensor:
    """x' = alpha' latents + sigma' noise by what is expected of both: Euler's step of flows, DDIM's (Song et al. 2021, eq. 12) else.

    First order; one evaluation a step.
    """
    for now, then in pairwise(grid):
        latents, noise = estimate(x, now)
        x = then.alpha * latents + then.sigma * noise
    return x


def heun(estimate: Estimate, x: Tensor, grid: Sequence[Level]) -> Tensor:
    """The same with means of what is expected before and after an Euler step, second order: two evaluations (Karras et al. 2022, alg. 1).

    In x / (alpha + sigma) every process is a flow with t = sigma / (alpha + sigma), and the rule is the trapezoidal of its velocity,
    noise - latents. Where no network is trained it ends with Euler's step.
    """
    for now, then in pairwise(grid):
        latents, noise = estimate(x, now)
        predicted = then.alpha * latents + then.sigma * noise
        if not then.trained:
            x = predicted
            continue
        unit, next_unit = now.alpha + now.sigma, then.alpha + then.sigma
        span = then.sigma / next_unit - now.sigma / unit
        latents_then, noise_then = estimate(predicted, then)
        velocity = 0.5 * (noise - latents + noise_then - latents_then)
        x = next_unit * (x / unit + span * velocity)
    return x


SAMPLERS = {"euler": euler, "heun": heun}
"""Ours; `schedulers.integrate` runs diffusers' own."""


def guided(denoiser: nn.Module, labels: Tensor, guidance: float, interval: tuple[float, float] = (0.0, 1.0)) -> Output:
    """The network's output for labels (B,) with classifier-free guidance: o_null + guidance (o_label - o_null) (Ho & Salimans 2022).

    It is guided at times in `interval`, both ends included (Kynkäänniemi et al. 2024). At other times, at guidance 1, and where no label
    is a class, the network is evaluated once.
    """
    plain = guidance == 1 or bool((labels == NULL_CLASS).all())
    both = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])

    def output(x: Tensor, t: float) -> Tensor:
        alone = plain or not interval[0] <= t <= interval[1]
        asked = labels if alone else both
        at = torch.full((len(asked),), t, dtype=x.dtype, device=x.device)
        if alone:
            return denoiser(x, at, asked).to(x.dtype)
        conditional, null = denoiser(torch.cat([x, x]), at, asked).to(x.dtype).chunk(2)
        return null + guidance * (conditional - null)

    return output


def estimates(process: Process, output: Output) -> Estimate:
    """What a network's output says of latents and noise."""

    def estimate(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        alpha, sigma = (torch.full((), scale, dtype=x.dtype, device=x.device) for scale in (level.alpha, level.sigma))
        return process.solve(x, output(x, level.t), alpha, sigma)

    return estimate


def noise(seed: int, numbers: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal starts (N, *shape) of the samples of these numbers: each a function of seed and number alone."""
    return torch.from_numpy(np.stack([generator(seed, "sample", n).standard_normal(shape, dtype=np.float32) for n in numbers]))


@torch.no_grad()
def sample(
    denoiser: nn.Module,
    start: Tensor,
    labels: Tensor,
    *,
    process: Process,
    sampler: str,
    steps: int,
    guidance: float,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    time_shift: float = 1.0,
) -> Tensor:
    """Latents (B, c, h, w), normalised as in training, from starts of the same shape and labels (B,)."""
    output = guided(denoiser, labels, guidance, guidance_interval)
    if sampler not in SAMPLERS:
        return integrate(sampler, process, output, start, steps=steps, time_shift=time_shift)
    return SAMPLERS[sampler](estimates(process, output), start, levels(process, steps, time_shift))
