"""-log p(z) of what a diffusion model samples, by its probability-flow ODE (Song et al. 2021, sec. 4.3): for small sets of latents.

With x = alpha z + sigma noise scaled to alpha**2 + sigma**2 = 1, whatever the path, the flow over the log SNR is

    dx/d(log SNR) = 0.5 alpha sigma (sigma z^ - alpha noise^),    d log p(x)/d(log SNR) = -divergence of this,

and p = N(0, I) at its lowest. The value is the density, exact but for the solver and the estimated trace, of latents that the ODE makes
of noise, down to the highest log SNR, at which it ends.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from autoencoder.runtime.errors import TrainingError
from autoencoder.runtime.rng import generator
from diffusion.likelihood import Denoise, Latents
from diffusion.process import Process

MOST_EXACT = 64
"""Most latent values of a row whose divergence is taken exactly, by one backward pass each."""
PROBES = 8
"""Rademacher probes of the trace, where there are more (Hutchinson 1990)."""


@dataclass(frozen=True)
class OdeValues:
    """-log p(z) in nats."""

    nats: Tensor
    """(N,) float64."""
    errors: Tensor
    """Standard error of each from the probes of the trace, (N,); 0 where it is exact."""
    evaluations: int
    """Evaluations of the network and of its gradient that the solver took."""


def ode_values(
    denoiser: Denoise,
    rows: Latents,
    process: Process,
    *,
    low: float,
    high: float,
    probes: int | None = None,
    method: str = "RK45",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    seed: int = 0,
) -> OdeValues:
    """Integrate all rows together between two log SNRs, by scipy's `solve_ivp`.

    `probes` of the trace a row, the same all along (Grathwohl et al. 2019); 0: the exact one; None: exact up to `MOST_EXACT` values a row.

    Raises:
        TrainingError: the solver came to no end.
    """
    values, dims = rows.values, rows.values[0].numel()
    if probes is None:
        probes = 0 if dims <= MOST_EXACT else PROBES
    directions = (
        _probes(rows, probes, seed) if probes else torch.eye(dims).view(dims, 1, *values.shape[1:]).expand(-1, len(rows), -1, -1, -1)
    )
    directions = directions.to(values.device, torch.float64)
    size = values.numel()

    def slope(log_snr: float, state: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(state[:size]).view(values.shape).to(values.device).requires_grad_()
        with torch.enable_grad():
            velocity = _velocity(denoiser, x, log_snr, rows, process)
            traces = [
                (torch.autograd.grad(velocity, x, direction, retain_graph=True)[0] * direction).flatten(1).sum(1)
                for direction in directions
            ]
        divergence = torch.stack(traces) if probes else torch.stack(traces).sum(0, keepdim=True)
        return np.concatenate([part.detach().cpu().flatten().numpy() for part in (velocity, divergence)])

    start = np.zeros(size + max(1, probes) * len(rows))
    start[:size] = (_alpha(high) * values.double()).cpu().flatten().numpy()
    solved = solve_ivp(slope, (high, low), start, method=method, rtol=rtol, atol=atol, t_eval=[low])
    if not solved.success:
        raise TrainingError(f"the probability-flow ODE came to no end: {solved.message}; give larger tolerances")
    end = torch.from_numpy(solved.y[:, -1])
    squares = end[:size].view(len(rows), dims).square().sum(1)
    found = 0.5 * (squares + dims * math.log(2 * math.pi)) - end[size:].view(-1, len(rows)) - dims * math.log(_alpha(high))
    errors = found.std(0) / math.sqrt(probes) if probes > 1 else torch.full((len(rows),), math.nan if probes else 0.0).double()
    return OdeValues(found.mean(0), errors, int(solved.nfev))


def _velocity(denoiser: Denoise, x: Tensor, log_snr: float, rows: Latents, process: Process) -> Tensor:
    """dx/d(log SNR) at x (N, c, h, w) float64."""
    alpha, sigma = _alpha(log_snr), _alpha(-log_snr)
    t = process.path.time(torch.full((len(x),), log_snr, dtype=torch.float64, device=x.device))
    noisy = x * (process.path.scales(t)[1] / sigma).view(-1, 1, 1, 1)
    dtype = rows.values.dtype
    output = denoiser(noisy.to(dtype), t.to(dtype), rows.labels).double()
    return 0.5 * alpha * sigma * (sigma * process.denoised(noisy, output, t) - alpha * process.noise(noisy, output, t))


def _alpha(log_snr: float) -> float:
    return 1 / math.sqrt(1 + math.exp(-log_snr))


def _probes(rows: Latents, number: int, seed: int) -> Tensor:
    """Rademacher probes, (P, N, c, h, w)."""
    shape = (number, *rows.values.shape[1:])
    drawn = [generator(seed, "divergence", row).integers(0, 2, shape) * 2 - 1 for row in rows.numbers]
    return torch.from_numpy(np.stack(drawn, axis=1))
