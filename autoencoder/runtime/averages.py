"""The moving averages that a run keeps of its network, and which of them is used."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from autoencoder.runtime.checkpoint import HasTensors, ModuleTensors
from autoencoder.runtime.config import TrainConfig, count
from autoencoder.runtime.ema import Ema
from autoencoder.runtime.power_ema import PowerEma

M = TypeVar("M", bound=nn.Module)


def average_name(length: float) -> str:
    """What the average of a length is called in checkpoints: `ema-0.050`."""
    return f"ema-{length:.3f}"


def described(train: TrainConfig, report: Mapping[str, Any]) -> str:
    """Which weights are evaluated and exported at the end, in words; `report` is that of `Averages`, or what holds it."""
    if train.ema_halflife_images is not None:
        return f"moving average, half-life {train.ema_halflife_images} images"
    if not train.ema_lengths:
        return "of the last step, not averaged"
    told = report.get("averages")
    name, losses = (average_name(train.ema_lengths[0]), {}) if told is None else (told["chosen"], told["losses"])
    others = ", ".join(f"{other.removeprefix('ema-')} {loss:.5g}" for other, loss in losses.items())
    best = f"; the best of these by validation loss: {others}" if others else ""
    return f"moving average of length {name.removeprefix('ema-')} (sigma_rel, share of the run){best}"


class Averages(Generic[M]):
    """None, one of a half-life, or several whose lengths are shares of the run (`train.ema_lengths`).

    Of several, the one with the least loss at the last validation is used, and before the first one the longest.
    """

    def __init__(self, source: M, train: TrainConfig) -> None:
        self.source = source
        self.each: dict[str, Ema[M] | PowerEma[M]] = {}
        if train.ema_halflife_images is not None:
            halflife = count(train.ema_halflife_images, "ema_halflife_images")
            self.each["ema"] = Ema(source, halflife=halflife, rampup=train.ema_rampup)
        for length in sorted(train.ema_lengths or ()):
            self.each[average_name(length)] = PowerEma(source, length=length)
        self.losses: dict[str, float] = {}

    @property
    def chosen(self) -> str | None:
        """Name of the average in use; None where none is kept."""
        return _best(self.losses) if self.losses else next(reversed(self.each), None)

    @property
    def module(self) -> M:
        """The network to validate and export: the average in use, or the weights themselves."""
        return self.source if self.chosen is None else self.each[self.chosen].module

    def update(self, images: int, batch: int, found_inf: Tensor) -> None:
        """Take in a step of `batch` images, after which `images` have been seen; nothing where the device-side `found_inf` is 1."""
        for average in self.each.values():
            average.update(images, batch, found_inf)

    def validate(self, measure: Callable[[M], dict[str, float]], loss: Callable[[dict[str, float]], float]) -> dict[str, float]:
        """Scalars of the average in use; of several, all are measured, and the best by `loss` is in use from here on.

        The losses of all are then among the scalars, as `loss_ema_0.050`.
        """
        if len(self.each) < 2:
            return measure(self.module)
        measured = {name: measure(average.module) for name, average in self.each.items()}
        self.losses = {name: loss(scalars) for name, scalars in measured.items()}
        return measured[_best(self.losses)] | {f"loss_{name.replace('-', '_')}": value for name, value in self.losses.items()}

    def held(self) -> dict[str, HasTensors]:
        """Every average, for the checkpoint."""
        return {name: ModuleTensors(average.module) for name, average in self.each.items()}

    def report(self) -> dict[str, Any]:
        """`averages`: which of several was chosen, by which losses; empty where there was nothing to choose from."""
        return {"averages": {"chosen": self.chosen, "losses": dict(self.losses)}} if len(self.each) > 1 else {}

    def load_report(self, state: dict[str, Any]) -> None:
        """Take back what `report` gave."""
        self.losses = dict(state.get("averages", {}).get("losses", {}))


def _best(losses: dict[str, float]) -> str:
    """The name with the least loss; one that is not a number is above all others."""
    return min(losses, key=lambda name: (math.isnan(losses[name]), losses[name]))
