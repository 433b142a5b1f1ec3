"""A controller that holds a training statistic at a target by moving a weight. All of its state is on the device and moves without a
host synchronisation; durations count images, so that a batch size does not change how it answers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_ERROR = 0.5
"""Beyond it (a factor of 1.65 from the target) a controller moves no faster: the network cannot follow, and would overshoot."""


class RunningMean:
    """Exponential mean of a statistic's global means over steps, bias-corrected: the first step's is its own mean.

    Args:
        shape: of the statistic.
        memory: time constant in images.
    """

    def __init__(self, shape: tuple[int, ...], *, memory: float, device: torch.device) -> None:
        self.memory = memory
        self._sum = torch.zeros(shape, device=device)
        self._mass = torch.zeros((), device=device)

    @property
    def started(self) -> Tensor:
        """Whether a step has been taken in, a boolean on the device."""
        return self._mass > 0

    @property
    def value(self) -> Tensor:
        """The mean; NaN before the first step."""
        return self._sum / self._mass

    def update(self, mean: Tensor, images: int, found_inf: Tensor) -> None:
        """Take in a step's mean over its `images`; not where `found_inf` is 1."""
        skip, keep = found_inf > 0, math.exp(-images / self.memory)
        self._sum = torch.where(skip, self._sum, keep * self._sum + (1 - keep) * mean.float())
        self._mass = torch.where(skip, self._mass, keep * self._mass + (1 - keep))

    def tensors(self) -> dict[str, Tensor]:
        return {"sum": self._sum, "mass": self._mass}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._sum, self._mass = (tensors[k].to(self._mass.device) for k in ("sum", "mass"))


@dataclass(frozen=True, kw_only=True)
class Gains:
    """How a controller answers. Durations are in units of its memory, so that one length adapts it to a slower plant."""

    proportional: float
    """The logarithm of the weight moves at once by the error times this,"""
    integral: float
    """by as much again in each such time that the error lasts,"""
    lead: float
    """and for where the error will be after this time, as it now moves."""
    rise: float
    """All three grow from a fifth to the whole over this time from the start: a young network answers faster, and would swing."""


class Controller:
    """Holds the running mean m of a positive statistic at a target by moving a weight between bounds.

    With e = ln(m / target) for a statistic that falls as the weight rises, its negative for one that rises, and e' its smoothed slope:

        ln weight = P (e + lead e') + I,    I <- I + P e images / integral,    P = proportional min(1, 1/5 + 4/5 images seen / rise)

    Neither the statistic's unit nor the weight's enters, so that one set of gains serves all. As I is a sum of errors, their mean over
    a window is small wherever the weight comes to rest, however noisy a batch is. I stands still where the weight is at a bound and
    the error pushes it on: when the error turns, the weight leaves the bound at once.

    Args:
        memory: time constant in images of the running mean and of its slope.
    """

    def __init__(
        self, weight: float, *, target: float, rises: bool, bounds: tuple[float, float], memory: float, gains: Gains, device: torch.device
    ) -> None:
        self.target, self.memory, self.gains, self._sign = target, memory, gains, -1.0 if rises else 1.0
        self._low, self._high = math.log(bounds[0]), math.log(bounds[1])
        self.mean = RunningMean((), memory=memory, device=device)
        self._error = RunningMean((), memory=memory, device=device)
        self.weight = torch.tensor(weight, device=device)
        self._integral = self.weight.log()
        self._seen = torch.zeros((), device=device)

    def update(self, statistic: Tensor, images: int, found_inf: Tensor) -> None:
        """Take in a step's global mean of the statistic over its `images`; not where `found_inf` is 1."""
        self.mean.update(statistic, images, found_inf)
        # A rate that is estimated from samples may be negative where the true one is near zero.
        ratio = (self.mean.value / self.target).clamp(min=1e-6)
        error = self._sign * ratio.log().clamp(-LARGEST_ERROR, LARGEST_ERROR)
        self._error.update(error, images, found_inf)
        seen = self._seen + images
        gain = self.gains.proportional * (0.2 + 0.8 * seen / (self.gains.rise * self.memory)).clamp(max=1)
        # Over its memory, e has moved by as much as it is ahead of its own running mean.
        at_once = gain * (error + self.gains.lead * (error - self._error.value))
        moved = self._integral + gain * error * (images / (self.gains.integral * self.memory))
        # An error moves I its own way, and no further than where the weight meets the bound.
        up = torch.minimum(moved, torch.maximum(self._integral, self._high - at_once))
        down = torch.maximum(moved, torch.minimum(self._integral, self._low - at_once))
        integral = torch.where(error > 0, up, down).clamp(self._low, self._high)
        weight = (integral + at_once).clamp(self._low, self._high).exp()
        self._integral = torch.where(found_inf > 0, self._integral, integral)
        self.weight = torch.where(found_inf > 0, self.weight, weight)
        self._seen = torch.where(found_inf > 0, self._seen, seen)

    def tensors(self) -> dict[str, Tensor]:
        means = {"mean": self.mean, "error": self._error}
        held = {f"{name}_{key}": value for name, mean in means.items() for key, value in mean.tensors().items()}
        return {"weight": self.weight, "integral": self._integral, "seen": self._seen, **held}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.weight, self._integral, self._seen = (tensors[k].to(self.weight.device) for k in ("weight", "integral", "seen"))
        for name, mean in (("mean", self.mean), ("error", self._error)):
            mean.load_tensors({key: tensors[f"{name}_{key}"] for key in mean.tensors()})
