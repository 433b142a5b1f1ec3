"""SIGTERM and SIGINT as a request that the loop reads between steps."""

import signal
from types import FrameType, TracebackType
from typing import Any


class Stopped(Exception):
    """A signal of this name has asked for the end."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)


class StopRequest:
    """Within this context the first SIGTERM or SIGINT sets `name`; a second one acts at once as before."""

    def __init__(self) -> None:
        self.name = ""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def check(self) -> None:
        """Raise Stopped where a signal has come."""
        if self.name:
            raise Stopped(self.name)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()


def exit_code(outcome: str) -> int:
    """The exit code of a run's outcome: 128 + the signal's number where one stopped it, else 0."""
    return 128 + signal.Signals[outcome] if outcome.startswith("SIG") else 0
