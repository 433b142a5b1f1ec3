"""At which times a network is trained and validated: t is logit-normal (Esser et al. 2024, eq. 19)."""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from diffusion.config import ProcessConfig


def training_time(config: ProcessConfig, normal: Tensor) -> Tensor:
    """t = sigmoid(mean + std * normal) for standard normal draws (B,)."""
    return torch.sigmoid(config.t_mean + config.t_std * normal)


def validation_times(config: ProcessConfig, count: int) -> list[float]:
    """The middles of `count` equally probable stretches of the training distribution of t, so that validation measures its loss."""
    quantiles = [NormalDist().inv_cdf((k + 0.5) / count) for k in range(count)]
    return [1 / (1 + math.exp(-(config.t_mean + config.t_std * q))) for q in quantiles]
