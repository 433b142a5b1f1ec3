"""The noise process: noisy latents z_t = alpha(t) z + sigma(t) noise, what a network is asked for, and what its answer says of z.

Two paths: flow matching on straight lines (Lipman et al. 2023; Liu et al. 2023), alpha = 1 - t and sigma = t; and variance-preserving
diffusion (Ho et al. 2020), alpha**2 + sigma**2 = 1, with the table of a diffusers scheduler. Time t counts from latents to noise; a
network is told t x 1000, as diffusers' schedulers count.

Three heads, each a p noise - q z: the velocity dz_t/dt of the straight path (1, 1), v (alpha, sigma) of Salimans & Ho 2022, and the noise
(1, 0). All conversions are the solution of these two linear equations.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import autoencoder.runtime.torchvision_operators  # noqa: F401  (before diffusers)
from diffusion.config import ProcessConfig

from diffusers import DDIMScheduler  # isort: skip

TIMESTEPS = 1000
"""t = 1 is this timestep of the network, as diffusers' schedulers count."""
BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
"""First and last beta of the tables that have them: of Ho et al. 2020, and of Rombach et al. 2022."""
Head = Literal["velocity", "v", "epsilon"]
Curve = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Path:
    """alpha and sigma over time, by the log signal-to-noise ratio ln(alpha**2 / sigma**2), which falls with t."""

    log_snr: Curve
    """t to log SNR, of any shape, in the precision of t."""
    time: Curve
    """log SNR to t, its inverse; log SNRs beyond an end of the path go to that end."""
    scales: Callable[[Tensor], tuple[Tensor, Tensor]]
    """t to alpha and sigma."""
    times: tuple[float, float]
    """The first and last t at which the path has both signal and noise, as far as it is defined; open for flows."""


@dataclass(frozen=True)
class Process:
    """A path, and the head that the network has on it."""

    path: Path
    head: Head

    def noisy(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = alpha latents + sigma noise, for latents and noise (B, ...) and t (B,)."""
        alpha, sigma = self._scales(t, latents)
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is trained to give, (B, ...)."""
        p, q = self._head(*self._scales(t, latents))
        return p * noise - q * latents

    def denoised(self, noisy: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """What a network's output at z_t says of the latents: E[z | z_t], (B, ...), where it is exact."""
        return self.solve(noisy, output, *self._scales(t, noisy))[0]

    def noise(self, noisy: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """What it says of the noise: E[noise | z_t], (B, ...)."""
        return self.solve(noisy, output, *self._scales(t, noisy))[1]

    def solve(self, noisy: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and noise by a network's output at z_t, at scales that broadcast: z_t = alpha z + sigma noise, output = p noise - q z."""
        p, q = self._head(alpha, sigma)
        unit = p * alpha + q * sigma
        return (p * noisy - sigma * output) / unit, (q * noisy + alpha * output) / unit

    def output(self, noisy: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        """What a network with this head would have to give at z_t to say `denoised` of the latents: the inverse of `denoised`."""
        alpha, sigma = self._scales(t, noisy)
        p, q = self._head(alpha, sigma)
        return (p * noisy - (p * alpha + q * sigma) * denoised) / sigma

    def squared_error(self, output: Tensor, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mean squared error of the output a latent value, (B,), in at least float32."""
        exact = torch.promote_types(output.dtype, torch.float32)
        return (output.to(exact) - self.target(latents.to(exact), noise.to(exact), t)).square().flatten(1).mean(1)

    def nats_per_log_snr(self, t: Tensor) -> Tensor:
        """What a unit of `squared_error` costs in the variational bound a latent value and unit of log SNR, in nats, of the shape of t.

        The bound's integrand is 0.5 |noise - predicted noise|**2 (Kingma et al. 2021, eq. 17), and with z_t given an error of the noise is
        alpha / (p alpha + q sigma) times that of the output.
        """
        alpha, sigma = self.path.scales(t)
        p, q = self._head(alpha, sigma)
        return 0.5 * (alpha / (p * alpha + q * sigma)) ** 2

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.path.scales(t.to(torch.promote_types(t.dtype, like.dtype)).view(-1, *[1] * (like.ndim - 1)))
        return alpha, sigma

    def _head(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The head's p and q."""
        match self.head:
            case "velocity":
                return torch.ones_like(alpha), torch.ones_like(sigma)
            case "v":
                return alpha, sigma
            case "epsilon":
                return torch.ones_like(alpha), torch.zeros_like(sigma)


def build(config: ProcessConfig) -> Process:
    """The process of a configuration."""
    if config.name == "flow":
        return flow()
    return variance_preserving(config.head, alphas_cumprod(config.schedule))


def flow() -> Process:
    """Flow matching: straight paths, and the velocity."""
    path = Path(
        log_snr=lambda t: -2 * torch.logit(t),
        time=lambda log_snr: torch.sigmoid(-0.5 * log_snr),
        scales=lambda t: (1 - t, t),
        times=(0.0, 1.0),
    )
    return Process(path, "velocity")


def variance_preserving(head: Head, alphas_cumprod: np.ndarray) -> Process:
    """Variance-preserving diffusion with a scheduler's table of alpha**2 at the timesteps 0, 1, ..., (T,).

    Between them the log SNR is linear in t, so that training in continuous time meets the scheduler's own values where it samples.
    """
    squares = alphas_cumprod.astype(np.float64)
    table = torch.from_numpy(np.log(squares) - np.log1p(-squares))
    grid = torch.arange(len(table), dtype=torch.float64) / TIMESTEPS

    @functools.cache
    def tables(device: torch.device) -> tuple[Tensor, Tensor]:
        # Kept there: a copy to a device in each training step would make the host wait for it.
        precision = torch.float32 if device.type == "mps" else torch.float64
        return grid.to(device, precision), table.to(device, precision)

    def log_snr(t: Tensor) -> Tensor:
        return _interpolated(t, *tables(t.device))

    def time(wanted: Tensor) -> Tensor:
        # Ascending, as a search in a table needs it.
        times, ratios = tables(wanted.device)
        return _interpolated(wanted, ratios.flip(0), times.flip(0))

    def scales(t: Tensor) -> tuple[Tensor, Tensor]:
        ratio = log_snr(t)
        return torch.sigmoid(ratio).sqrt(), torch.sigmoid(-ratio).sqrt()

    return Process(Path(log_snr, time, scales, times=(0.0, float(grid[-1]))), head)


def alphas_cumprod(schedule: str) -> np.ndarray:
    """alpha**2 at the timesteps of diffusers' schedulers by this `beta_schedule`, (TIMESTEPS,) float64."""
    first, last = BETAS.get(schedule, (0.0, 0.0))
    return DDIMScheduler(TIMESTEPS, beta_start=first, beta_end=last, beta_schedule=schedule).alphas_cumprod.double().numpy()


def _interpolated(x: Tensor, points: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation of (points ascending, values) at x, constant beyond the ends; in their precision, to that of x."""
    at = x.to(points.dtype).clamp(points[0], points[-1])
    right = torch.searchsorted(points, at.contiguous()).clamp(1, len(points) - 1)
    share = (at - points[right - 1]) / (points[right] - points[right - 1])
    return (values[right - 1] + share * (values[right] - values[right - 1])).to(x.dtype)
