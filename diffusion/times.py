"""At which times a network is trained and validated, and how its squared error counts there.

The variational bound's diffusion term is the integral over log SNR of `Process.nats_per_log_snr` times the squared error (Kingma et al.
2021). As an expectation over t, its integrand is a density times a constant, `nats_per_loss`: draw t by that density, or weight other
draws by the ratio of the two (importance sampling), and the mean loss is the bound's term in units of that constant.
"""

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from autoencoder.runtime.errors import ConfigError
from diffusion import process
from diffusion.config import ProcessConfig

BOUND = (-10.0, 10.0)
"""Log SNRs between which the bound is taken where none are given."""
_POINTS = 10_001
"""Of the table of its integrand: the trapezoidal rule is exact to 1e-6 on these."""

_EPSILON = float(np.finfo(np.float32).eps)


def training_time(config: ProcessConfig, normal: Tensor) -> Tensor:
    """Training times t for standard normal draws (B,) on the CPU; t grows with the draw."""
    if config.times == "logit_normal":
        return _of_share(config, torch.sigmoid(config.t_mean + config.t_std * normal))
    return torch.from_numpy(_quantile(config, torch.special.ndtr(-normal.double()).numpy())).to(normal.dtype)


def validation_times(config: ProcessConfig, count: int) -> list[float]:
    """The middles of `count` equally probable stretches of the training distribution of t, so that validation measures its loss."""
    middles = [(k + 0.5) / count for k in range(count)]
    if config.times == "logit_normal":
        normal = [NormalDist().inv_cdf(p) for p in middles]
        shares = torch.tensor([1 / (1 + math.exp(-(config.t_mean + config.t_std * z))) for z in normal], dtype=torch.float64)
        return [float(t) for t in _of_share(config, shares)]
    return [float(t) for t in _quantile(config, 1 - np.array(middles))]


def weight(config: ProcessConfig, t: Tensor) -> Tensor:
    """What the squared error of the network's output counts at t, of its shape and precision."""
    path = _process(config).path
    nats = _process(config).nats_per_log_snr(t)
    match config.weight:
        case "unit":
            return torch.ones_like(t)
        case "min_snr":
            # An error of the latents is (2 nats / SNR)**0.5 times that of the output.
            return 2 * nats * (config.min_snr_gamma * torch.exp(-path.log_snr(t))).clamp(max=1)
        case "likelihood":
            bound, log_snr = _bound(config), path.log_snr(t)
            wanted = nats * _slope(path, t) / bound.nats
            inside = (log_snr >= bound.log_snr[0]) & (log_snr <= bound.log_snr[-1])
            return torch.where(inside, wanted / _density(config, t), 0.0)


def nats_per_loss(config: ProcessConfig) -> float:
    """Nats a latent value of the bound's diffusion term that a mean loss of 1 is, where times or weight are `likelihood`."""
    return _bound(config).nats


def described(config: ProcessConfig) -> str:
    """Times and weight in words."""
    times = {
        "logit_normal": f"logit(t) normal with mean {config.t_mean:g} and standard deviation {config.t_std:g}",
        "uniform": "t uniform",
        "likelihood": "t as the bound counts it",
    }[config.times]
    weighted = {"unit": "", "min_snr": f", min-SNR weight of gamma {config.min_snr_gamma:g}", "likelihood": ", weighted as in the bound"}
    if "likelihood" not in (config.times, config.weight):
        return times + weighted[config.weight]
    bound = _bound(config)
    ends = f"from log SNR {bound.log_snr[0]:.3g} to {bound.log_snr[-1]:.3g}"
    if config.weight == "min_snr":
        # The bound's times under another weight: the loss is not in its units.
        return f"{times}, {ends}{weighted[config.weight]}"
    return f"{times}{weighted[config.weight]}: a loss of 1 is {bound.nats:.4g} nats a latent value of it, {ends}"


@dataclass(frozen=True)
class _Bound:
    """The bound's integrand over log SNR, tabulated."""

    log_snr: np.ndarray
    """Evenly, ascending."""
    below: np.ndarray
    """Share of the integral below each of them."""
    nats: float
    """The integral at a squared error of 1."""


@functools.cache
def _process(config: ProcessConfig) -> process.Process:
    return process.build(config)


@functools.cache
def _bound(config: ProcessConfig) -> _Bound:
    path = _process(config).path
    ends = [float(path.log_snr(torch.tensor(t, dtype=torch.float64))) for t in reversed(path.times)]
    asked = config.log_snr or BOUND
    low, high = max(asked[0], ends[0]), min(asked[1], ends[1])
    if low >= high:
        remedy = f"{config.meaning} goes from {ends[0]:.3g} to {ends[1]:.3g}; give ends within that, or null"
        raise ConfigError("process.log_snr", asked, remedy)
    grid = np.linspace(low, high, _POINTS)
    nats = _process(config).nats_per_log_snr(path.time(torch.from_numpy(grid))).numpy()
    integral = np.concatenate([[0.0], np.cumsum((nats[1:] + nats[:-1]) / 2 * np.diff(grid))])
    return _Bound(grid, integral / integral[-1], float(integral[-1]))


def _quantile(config: ProcessConfig, above: np.ndarray) -> np.ndarray:
    """The t that are exceeded with these probabilities, in float64, of `uniform` and `likelihood` times."""
    if config.times == "uniform":
        first, last = _process(config).path.times
        return last - (last - first) * above
    bound = _bound(config)
    # Later is noisier.
    log_snr = np.interp(above, bound.below, bound.log_snr)
    found: np.ndarray = _process(config).path.time(torch.from_numpy(log_snr)).numpy()
    return found


def _of_share(config: ProcessConfig, share: Tensor) -> Tensor:
    """Shares of the path's times, in (0, 1), to t."""
    first, last = _process(config).path.times
    return first + (last - first) * share


def _density(config: ProcessConfig, t: Tensor) -> Tensor:
    """The density that t is drawn by, `logit_normal` or `uniform`."""
    first, last = _process(config).path.times
    if config.times == "uniform":
        return torch.full_like(t, 1 / (last - first))
    # A share that was rounded to an end has no logit.
    share = ((t - first) / (last - first)).clamp(_EPSILON, 1 - _EPSILON)
    z = (torch.logit(share) - config.t_mean) / config.t_std
    of_logit = torch.exp(-0.5 * z.square()) / (config.t_std * math.sqrt(2 * math.pi))
    return of_logit / (share * (1 - share) * (last - first))


def _slope(path: process.Path, t: Tensor) -> Tensor:
    """|d log SNR / dt|."""
    with torch.enable_grad():
        at = t.detach().requires_grad_()
        return torch.autograd.grad(path.log_snr(at).sum(), at)[0].abs()
