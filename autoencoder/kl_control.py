"""The KL term over a run: its weight, on a schedule or under a controller, and the groups that free bits leave alone.

State moves once an optimiser step by the step's global means, on the device, and lies in checkpoints.
"""

import math

import torch
from torch import Tensor

from autoencoder.controller import Controller, Gains, RunningMean
from autoencoder.objective_config import KLConfig
from autoencoder.runtime.config import count
from autoencoder.runtime.errors import ConfigError

GROUP_KL = "group_kl_nats"
"""Name of the statistic (B, groups) that free bits follow."""
FREE_BITS_MEMORY = 256
"""Time constant, in images, of the mean that opens and closes a group."""
RATE = Gains(proportional=5.5, integral=6.0, lead=6.0, rise=40.0)
"""For the KL, which answers its weight after two lags: the optimiser's momentum (some 400 images at first, 700 later), and the network's
way to a new balance, so long that ln KL nearly integrates (per image, 0.0005 to 0.003 times what ln weight is off). The lead makes up
for the first; with less of it, or a longer memory, the KL swings with a period of some 1,400 images."""
DISTORTION = Gains(proportional=2.0, integral=6.0, lead=1.0, rise=1.0)
"""For the squared error, whose spread between images is larger and whose exact value matters less: calm, and twice the memory."""


def scheduled_weight(config: KLConfig, images: int, total: int) -> float:
    """Weight after `images` of `total` training images.

    Constant; a linear (Bowman et al. 2016) or half-cosine rise from zero; or cyclical (Fu et al. 2019, eq. 6): in each of M cycles,
    at the share tau of it, min(1, tau / R) of the final weight.
    """
    if config.schedule == "constant":
        return config.weight
    if config.schedule == "cyclical":
        # The end of the run is that of its last cycle, not the beginning of one more.
        tau = min(images, total - 1) * config.cycles % total / total
        return config.weight * min(1.0, tau / config.rise)
    risen = min(1.0, images / count(config.anneal_images, "anneal_images"))
    return config.weight * (risen if config.schedule == "linear" else (1 - math.cos(math.pi * risen)) / 2)


def group_kl(kl_map: Tensor, per: str) -> Tensor:
    """KL of each group in nats, (B, groups), from its map (B, c, h, w): of a channel over all sites, or of a site over all channels."""
    return kl_map.flatten(2).sum(2) if per == "channel" else kl_map.sum(1).flatten(1)


class KLControl:
    """Weight and free bits of the KL over a run of `total` images, for latents of shape (c, h, w).

    Raises:
        ConfigError: free bits that alone cost the target.
    """

    def __init__(self, config: KLConfig, *, total: int, latent_shape: tuple[int, int, int], device: torch.device) -> None:
        self.config, self.total, self.device = config, total, device
        channels, height, width = latent_shape
        groups = channels if config.free_bits_per == "channel" else height * width
        if config.target is not None and groups * config.free_bits >= config.target:
            free, remedy = groups * config.free_bits, f"give below {config.target / groups:g} nats or a higher objective.kl.target"
            raise ConfigError(
                "objective.kl.free_bits",
                config.free_bits,
                f"{groups} groups hold {free:g} nats at no cost, and the target is {config.target:g}: {remedy}",
            )
        self._controller = _controller(config, device)
        self._group_mean = RunningMean((groups,), memory=FREE_BITS_MEMORY, device=device) if config.free_bits else None

    def weight(self, images: int) -> Tensor:
        """The weight in force after `images` training images, a scalar on the device."""
        if self._controller is not None:
            return self._controller.weight
        return torch.full((), scheduled_weight(self.config, images, self.total), device=self.device)

    def charged(self) -> Tensor | None:
        """Which groups the KL term counts, (groups,): those whose running mean exceeds their free bits; None without free bits.

        A gradient needs this before the batch mean over all microbatches and processes is known, so it is the mean of the steps before,
        over `FREE_BITS_MEMORY` images. Before the first step all are counted.
        """
        mean = self._group_mean
        return None if mean is None else ~mean.started | (mean.value > self.config.free_bits)

    def update(self, means: dict[str, Tensor], images: int, found_inf: Tensor) -> None:
        """Take in a step's global means over its `images`; not where `found_inf` is 1."""
        if self._controller is not None:
            followed = "kl_nats" if self.config.control == "target" else "mean_squared_error"
            self._controller.update(means[followed], images, found_inf)
        if self._group_mean is not None:
            self._group_mean.update(means[GROUP_KL], images, found_inf)

    def scalars(self, images: int) -> dict[str, float]:
        """What a log line shows: the weight in force, and what it or the free bits answer to."""
        shown = {"kl_weight": self.weight(images).item()}
        if self._controller is not None and self._controller.mean.started:
            mean = self._controller.mean.value.item()
            shown |= {"running_kl_nats": mean} if self.config.control == "target" else {"running_rmse": math.sqrt(mean)}
        charged = self.charged()
        if charged is not None:
            shown["charged_groups"] = charged.sum().item()
        return shown

    def tensors(self) -> dict[str, Tensor]:
        held: dict[str, Tensor] = {}
        for name, part in self._parts():
            held |= {f"{name}.{key}": value for key, value in part.tensors().items()}
        return held

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name, part in self._parts():
            part.load_tensors({key.removeprefix(f"{name}."): v for key, v in tensors.items() if key.startswith(f"{name}.")})

    def _parts(self) -> list[tuple[str, Controller | RunningMean]]:
        parts = (("controller", self._controller), ("group_mean", self._group_mean))
        return [(name, part) for name, part in parts if part is not None]


def _controller(config: KLConfig, device: torch.device) -> Controller | None:
    """The KL falls as its weight rises; the squared error rises (Rezende & Viola 2018, alg. 1, whose lambda is 1 / weight)."""
    memory = count(config.response_images, "response_images")
    if config.target is not None:
        target, rises, gains = config.target, False, RATE
    elif config.target_rmse is not None:
        target, rises, gains, memory = config.target_rmse**2, True, DISTORTION, 2 * memory
    else:
        return None
    return Controller(config.weight, target=target, rises=rises, bounds=config.bounds, memory=memory, gains=gains, device=device)
