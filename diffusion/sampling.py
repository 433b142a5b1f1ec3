"""Samplers of the flow: plain functions of a velocity, a start and a grid of times."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from autoencoder.runtime.rng import generator
from diffusion.denoiser import NULL_CLASS
from diffusion.process import TIMESTEPS

Velocity = Callable[[Tensor, float], Tensor]
"""(x, t) to dx/dt."""


def times(steps: int) -> list[float]:
    """steps + 1 times from 1 - 1/1000 down to 0, evenly: the grid of diffusers' flow schedulers."""
    return [float(t) for t in np.linspace(1 - 1 / TIMESTEPS, 0, steps + 1)]


def euler(velocity: Velocity, x: Tensor, grid: Sequence[float]) -> Tensor:
    """x along dx/dt = velocity(x, t) from grid[0] to grid[-1], first order: one evaluation a step."""
    for now, then in pairwise(grid):
        x = x + (then - now) * velocity(x, now)
    return x


def heun(velocity: Velocity, x: Tensor, grid: Sequence[float]) -> Tensor:
    """The same by the trapezoidal rule on an Euler step, second order: two evaluations a step (Karras et al. 2022, alg. 1)."""
    for now, then in pairwise(grid):
        slope = velocity(x, now)
        predicted = x + (then - now) * slope
        x = x + (then - now) * 0.5 * (slope + velocity(predicted, then))
    return x


SAMPLERS = {"euler": euler, "heun": heun}


def guided(denoiser: nn.Module, labels: Tensor, guidance: float) -> Velocity:
    """The network's velocity for labels (B,) with classifier-free guidance: v_null + guidance (v_label - v_null) (Ho & Salimans 2022).

    At guidance 1, and where no label is a class, the network is evaluated once.
    """
    plain = guidance == 1 or bool((labels == NULL_CLASS).all())
    asked = labels if plain else torch.cat([labels, torch.full_like(labels, NULL_CLASS)])

    def velocity(x: Tensor, t: float) -> Tensor:
        at = torch.full((len(asked),), t, dtype=x.dtype, device=x.device)
        if plain:
            return denoiser(x, at, asked).to(x.dtype)
        conditional, null = denoiser(torch.cat([x, x]), at, asked).to(x.dtype).chunk(2)
        return null + guidance * (conditional - null)

    return velocity


def noise(seed: int, numbers: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal starts (N, *shape) of the samples of these numbers: each a function of seed and number alone."""
    return torch.from_numpy(np.stack([generator(seed, "sample", n).standard_normal(shape, dtype=np.float32) for n in numbers]))


@torch.no_grad()
def sample(denoiser: nn.Module, start: Tensor, labels: Tensor, *, sampler: str, steps: int, guidance: float) -> Tensor:
    """Latents (B, c, h, w), normalised as in training, from starts of the same shape and labels (B,)."""
    return SAMPLERS[sampler](guided(denoiser, labels, guidance), start, times(steps))
