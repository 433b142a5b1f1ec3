"""What is wrong with a run, as its log, console and report say it. Torch-free."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Alarm:
    """Something that a run should not go on with unseen."""

    name: str
    message: str
    """What was found, with its figures."""
    remedy: str
    """What to do."""


@dataclass(frozen=True)
class AlarmNews:
    """Alarms that stand, and what has changed since they were last asked for."""

    standing: tuple[str, ...] = ()
    """Names."""
    raised: tuple[Alarm, ...] = ()
    cleared: tuple[str, ...] = ()
    """Names."""

    def line(self) -> dict[str, Any]:
        """Entries of a line of `metrics.jsonl`: `alarms` while any stands, `raised` and `cleared` where one changes."""
        found = {"alarms": list(self.standing), "raised": [asdict(alarm) for alarm in self.raised], "cleared": list(self.cleared)}
        return {key: value for key, value in found.items() if value}

    def messages(self) -> list[str]:
        """What the console says: a change each."""
        return [f"alarm {a.name}: {a.message}. {a.remedy}" for a in self.raised] + [f"alarm {name}: cleared" for name in self.cleared]
