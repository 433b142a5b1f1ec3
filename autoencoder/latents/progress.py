"""What is done, how fast and what time is left: a bar on a terminal, plain lines into a file."""

import sys
import time

from tqdm import tqdm

from autoencoder.runtime.console import duration

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Of `total` rows (or other units), `done` of them before this start; on stderr."""

    def __init__(self, total: int, done: int, *, verb: str = "encoded", unit: str = "row") -> None:
        self._total, self._first, self._rows = total, done, done
        self._verb, self._unit = verb, unit
        self._start = self._said = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit=unit, unit_scale=True, dynamic_ncols=True) if terminal else None

    def advance(self, rows: int) -> None:
        self._rows += rows
        if self._bar is not None:
            self._bar.update(rows)
        elif self._rows < self._total and time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self._line()

    def close(self, finished: bool) -> None:
        if self._bar is not None:
            self._bar.close()
        elif finished:
            self._line()

    def _line(self) -> None:
        rate = (self._rows - self._first) / max(time.monotonic() - self._start, 1e-9)
        left = f"  {duration((self._total - self._rows) / rate)} left" if rate > 0 and self._rows < self._total else ""
        print(f"{self._verb} {self._rows:,} / {self._total:,} {self._unit}s  {rate:.1f} {self._unit}s/s{left}", file=sys.stderr, flush=True)
