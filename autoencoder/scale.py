"""The likelihood's one scale: as a controller that follows the training error, or from a learned parameter."""

import torch
from torch import Tensor

from autoencoder.likelihood import LIKELIHOODS, bounded_log_scale
from autoencoder.objective_config import LikelihoodConfig


class AnalyticScale:
    """A likelihood's scale: fixed, or a running estimate from training errors moved once an optimiser step.

    The estimate is the likelihood's best scale for the running mean of its moment (sigma-VAE, Rybkin et al. 2021, with a moving
    average for its batch mean), bias-corrected, so that the first step already replaces the starting value, and within the bounds.
    """

    def __init__(self, config: LikelihoodConfig, device: torch.device) -> None:
        self.config = config
        self.value = torch.tensor(config.value, device=device)
        self._moment = torch.zeros((), device=device)
        self._mass = torch.zeros((), device=device)

    def update(self, moment: Tensor, found_inf: Tensor, share: Tensor | None = None) -> None:
        """Take in a step's global mean of the likelihood's moment; not where `found_inf` is 1.

        With missing values, whose errors are 0, `share` is the step's share of observed ones: it is what the step counts for.
        """
        if self.config.scale != "analytic":
            return
        skip, keep = found_inf > 0, self.config.decay
        self._moment = torch.where(skip, self._moment, keep * self._moment + (1 - keep) * moment.float())
        counted = 1 - keep if share is None else (1 - keep) * share.float()
        self._mass = torch.where(skip, self._mass, keep * self._mass + counted)
        estimate = LIKELIHOODS[self.config.name].scale_from_moment(self._moment / self._mass)
        # An error of exactly zero has no density at its best scale.
        self.value = torch.where(skip | (self._mass == 0), self.value, estimate.clamp(*self.config.bounds))

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.value, "moment": self._moment, "mass": self._mass}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        device = self.value.device
        self.value, self._moment, self._mass = (tensors[k].to(device) for k in ("scale", "moment", "mass"))


def learned_scale(log_scale: Tensor, config: LikelihoodConfig) -> Tensor:
    """The scale that a learned log scale stands for, within the bounds; at least float32."""
    return bounded_log_scale(log_scale.to(torch.promote_types(log_scale.dtype, torch.float32)), config.bounds).exp()
