"""What is done, how fast, what time is left and what it goes into: a bar on a terminal, plain lines into a file."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

from autoencoder.runtime.console import duration

SECONDS_BETWEEN_LINES = 10.0
_END = object()

T = TypeVar("T")


class Stopwatch:
    """The seconds that one thread spends in each stage. What runs beside it counts only where the thread waits for it."""

    def __init__(self, stage: str) -> None:
        """`stage` is what all time goes to that no other stage takes."""
        self.seconds = {stage: 0.0}
        self._stage, self._since = stage, time.monotonic()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Within another stage it takes its time away from it."""
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items; the time until each is there goes to this stage."""
        iterator = iter(items)
        while True:
            with self.stage(name):
                item = next(iterator, _END)
            if item is _END:
                return
            yield item  # type: ignore[misc]

    def shares(self) -> dict[str, float]:
        """Of all time until now, the largest first."""
        self._switch(self._stage)
        total = max(sum(self.seconds.values()), 1e-9)
        return {name: seconds / total for name, seconds in sorted(self.seconds.items(), key=lambda entry: -entry[1])}

    def _switch(self, name: str) -> str:
        before, now = self._stage, time.monotonic()
        self.seconds[before] += now - self._since
        self.seconds.setdefault(name, 0.0)
        self._stage, self._since = name, now
        return before


class Progress:
    """Of `total` rows (or other units), `done` of them before this start; on stderr. With a stopwatch it says which stage is the limit."""

    def __init__(self, total: int, done: int, *, verb: str = "encoded", unit: str = "row", watch: Stopwatch | None = None) -> None:
        self._total, self._first, self._rows = total, done, done
        self._verb, self._unit, self._watch = verb, unit, watch
        self._start = self._said = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit=unit, unit_scale=True, dynamic_ncols=True) if terminal else None

    def advance(self, rows: int) -> None:
        self._rows += rows
        if self._bar is not None:
            if self._watch is not None:
                self._bar.set_postfix_str(self._limit(self._watch), refresh=False)
            self._bar.update(rows)
        elif self._rows < self._total and time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self._line()

    def close(self, finished: bool) -> None:
        if self._bar is not None:
            self._bar.close()
        elif finished:
            self._line()
        if finished and self._watch is not None:
            told = ", ".join(f"{share:.0%} {name}" for name, share in self._watch.shares().items())
            print(f"time: {told}", file=sys.stderr, flush=True)

    def _line(self) -> None:
        rate = (self._rows - self._first) / max(time.monotonic() - self._start, 1e-9)
        goes_on = rate > 0 and self._rows < self._total
        left = f"  {duration((self._total - self._rows) / rate)} left" if goes_on else ""
        limit = f"  {self._limit(self._watch)}" if goes_on and self._watch is not None else ""
        print(
            f"{self._verb} {self._rows:,} / {self._total:,} {self._unit}s  {rate:.1f} {self._unit}s/s{left}{limit}",
            file=sys.stderr,
            flush=True,
        )

    def _limit(self, watch: Stopwatch) -> str:
        name, share = next(iter(watch.shares().items()))
        return f"limit: {name} ({share:.0%} of the time)"
