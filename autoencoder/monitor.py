"""A watch over a run: the rules of `alarms`, at every log line and every validation.

Bad figures raise an alarm, good ones clear it, those between leave it as it stands: it is said once when it is raised and once when it
is cleared, and has the figures last seen as long as it stands.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from autoencoder.alarms import AT_VALIDATION, IN_TRAINING, LATE, Figures, Finding, Subject
from autoencoder.runtime.alarms import Alarm, AlarmNews

GRACE = 0.1
"""Share of the run before which nothing is judged: latents begin near the prior, scales at their starting value."""
LEAST_STEPS = 10
"""Nor is anything before so many optimiser steps, in a preflight say."""
WINDOW = 0.025
"""Share of the run over which training figures are averaged before they are judged, however often they are logged."""
AVERAGED = ("kl_nats", "nll_nats", "mean_squared_error", "effective_beta", "discriminator_accuracy")
"""The figures that the rules for training look at."""


@dataclass
class _Window:
    """Means of training figures over a stretch of the run."""

    images: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    """Images behind each sum: a line may lack a figure."""

    def add(self, figures: Figures, images: int) -> None:
        self.images += images
        for name in AVERAGED:
            if name in figures:
                self.sums[name] = self.sums.get(name, 0.0) + figures[name] * images
                self.counts[name] = self.counts.get(name, 0) + images

    def means(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items()}


class Monitor:
    """Raises and clears alarms over a run. All its figures are global, so that every process has the same alarms."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._standing: dict[str, dict[str, Alarm]] = {}
        """Alarms by name, and by what raised them: each can only be cleared by that."""
        self._raised: list[Alarm] = []
        self._cleared: list[str] = []
        self._images = 0
        self._window = _Window()
        self._before: dict[str, float] | None = None
        self._priced: dict[str, float] = {}
        """Effective beta and likelihood scale of the last training line: a validation does not measure them."""

    def training(self, figures: Figures, images: int) -> None:
        """Take in a training log line after `images` images."""
        self._priced = {name: figures[name] for name in ("effective_beta", "likelihood_scale") if name in figures}
        passed, self._images = images - self._images, images
        if "kl_nats" not in figures or "nll_nats" not in figures:
            return  # every step since the last line was skipped
        self._window.add(figures, passed)
        if self._window.images < WINDOW * self.subject.images:
            return
        # A weight on its way is where it is, not where it was on the mean.
        weight = {"kl_weight": figures["kl_weight"]} if "kl_weight" in figures else {}
        now, before = self._window.means() | weight, self._before
        self._window, self._before = _Window(), now
        for name, rule in IN_TRAINING.items():
            if before is not None and self._judged(name, images):
                self._note(name, "training", rule(now, before, self.subject))

    def validation(self, figures: Figures, images: int) -> None:
        """Take in the figures of a validation after `images` images."""
        for name, rule in AT_VALIDATION.items():
            if self._judged(name, images):
                self._note(name, "validation", rule({**self._priced, **figures}, self.subject))

    @property
    def standing(self) -> list[Alarm]:
        """The alarms that stand, with the figures last seen."""
        return [alarms[min(alarms)] for _, alarms in sorted(self._standing.items())]

    def restated(self, figures: Figures) -> list[Alarm]:
        """The alarms that stand, with the final evaluation's figures wherever these bear them out; none is raised or cleared."""
        seen, stated = {**self._priced, **figures}, []
        for alarm in self.standing:
            finding = AT_VALIDATION[alarm.name](seen, self.subject) if alarm.name in AT_VALIDATION else None
            stated.append(self.subject.alarm(alarm.name, finding.message) if finding is not None and finding.bad else alarm)
        return stated

    def news(self) -> AlarmNews:
        """What stands, and what has changed since this was last asked."""
        told = AlarmNews(tuple(sorted(self._standing)), tuple(self._raised), tuple(self._cleared))
        self._raised, self._cleared = [], []
        return told

    def _judged(self, name: str, images: int) -> bool:
        return self.subject.judges(name) and images >= max(LATE.get(name, GRACE) * self.subject.images, LEAST_STEPS * self.subject.batch)

    def _note(self, name: str, source: str, finding: Finding | None) -> None:
        if finding is None:
            return
        stood = name in self._standing
        alarms = self._standing.setdefault(name, {})
        if finding.good:
            alarms.pop(source, None)
        elif finding.bad or source in alarms:
            alarms[source] = self.subject.alarm(name, finding.message)
            if not stood:
                self._raised.append(alarms[source])
        if not alarms:
            del self._standing[name]
            if stood:
                self._cleared.append(name)

    def state(self) -> dict[str, Any]:
        """For the checkpoint; numbers survive JSON exactly."""
        return {
            "standing": {name: {source: asdict(alarm) for source, alarm in its.items()} for name, its in self._standing.items()},
            "images": self._images,
            "window": asdict(self._window),
            "before": self._before,
            "priced": self._priced,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self._standing = {name: {source: Alarm(**told) for source, told in its.items()} for name, its in state["standing"].items()}
        self._images, self._before, self._priced = state["images"], state["before"], dict(state["priced"])
        self._window = _Window(**state["window"])
