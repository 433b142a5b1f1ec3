"""The noise process: flow matching on straight paths between latents and noise (Lipman et al. 2023; Liu et al. 2023).

t runs from 0 (latents) to 1 (noise); diffusers' flow schedulers call it sigma.
"""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from diffusion.config import ProcessConfig


def noisy(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) latents + t noise, for latents and noise (B, c, h, w) and t (B,)."""
    t = t.view(-1, *[1] * (latents.ndim - 1))
    return (1 - t) * latents + t * noise


def velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """dx_t/dt = noise - latents, what the network is trained to give."""
    return noise - latents


def squared_error(predicted: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the velocity a latent value, (B,), in at least float32; a network that gives 0 has 1 + E[latents**2]."""
    exact = torch.promote_types(predicted.dtype, torch.float32)
    return (predicted.to(exact) - velocity(latents, noise).to(exact)).square().flatten(1).mean(1)


def training_time(config: ProcessConfig, normal: Tensor) -> Tensor:
    """t = sigmoid(mean + std * normal) for standard normal draws (B,): logit-normal (Esser et al. 2024, eq. 19)."""
    return torch.sigmoid(config.t_mean + config.t_std * normal)


def validation_times(config: ProcessConfig, count: int) -> list[float]:
    """The middles of `count` equally probable stretches of the training distribution of t, so that validation measures its loss."""
    quantiles = [NormalDist().inv_cdf((k + 0.5) / count) for k in range(count)]
    return [1 / (1 + math.exp(-(config.t_mean + config.t_std * q))) for q in quantiles]
