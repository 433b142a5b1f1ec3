"""What a run says while it goes: a bar with throughput and time left on a terminal, plain lines in a file."""

import os
import sys
import time
from collections.abc import Collection
from types import TracebackType

from tqdm import tqdm

SHOWN = {
    "nll_nats": "NLL {}",
    "kl_nats": "KL {}",
    "kl_weight": "weight {}",
    "elbo_nats": "ELBO {}",
    "bits_per_dim": "{} bits/dim",
    "perceptual": "perceptual {}",
    "adversarial": "adversarial {}",
    "discriminator_accuracy": "D right {}",
    "psnr_db": "{} dB",
    "loss": "loss {}",
    "gradient_norm": "gradient {}",
}
"""What a line shows, in this order; in nats an image where no unit stands."""
RATE, LEFT = "images_per_second", "seconds_left"
FIRST = ("nll_nats", "discriminator_accuracy", "kl_nats", "adversarial", LEFT, RATE)
"""What of it has room first, the first first, then all else: a game that tips over has to be seen, which other figures do not tell."""
SETTINGS = ("kl_weight",)
"""Those of them that are shown only where they move."""
COLUMNS = 120
"""Width of a line where there is no terminal."""
BAR = 54
"""Columns of a bar without figures: share, counts, times and rate."""


class Console:
    """Progress over `total` images on stderr, from the main process only; of `SETTINGS` it shows those in `moving`."""

    def __init__(self, total: int, *, shown: bool, bar: bool, moving: Collection[str] = ()) -> None:
        self.total, self.shown, self.wants_bar = total, shown, bar and shown and sys.stderr.isatty()
        self._left_out = set(SETTINGS) - set(moving)
        self._bar: tqdm | None = None
        self._start: tuple[float, int] | None = None

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def say(self, message: str) -> None:
        """A message of its own line."""
        if not self.shown:
            return
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)

    def advance(self, images: int) -> None:
        """Move the bar."""
        if not self.wants_bar:
            return
        if self._bar is None:
            self._bar = tqdm(total=self.total, initial=images, unit="img", unit_scale=True, smoothing=0.05, dynamic_ncols=True)
        self._bar.update(images - self._bar.n)

    def line(self, phase: str, images: int, scalars: dict[str, float]) -> None:
        """A log line: beside the bar for training, as text of its own for validation or without a bar."""
        named = {name: _words(name, value) for name, value in scalars.items() if name in SHOWN and name not in self._left_out}
        if "bits_per_dim" in named:
            named.pop("elbo_nats", None)
        if self._bar is not None and phase == "train":
            self._bar.set_postfix_str(_fitting(named, _columns() - BAR))
            return
        if self._start is None:
            self._start = time.monotonic(), images
        head = f"{phase:>10}  {images:>9,} / {self.total:,}  "
        rate = (images - self._start[1]) / max(time.monotonic() - self._start[0], 1e-9)
        if rate > 0 and phase == "train":
            named |= {RATE: f"{rate:.0f} img/s", LEFT: f"{duration((self.total - images) / rate)} left"}
        self.say(head + _fitting(named, _columns() - len(head)))


def _words(name: str, value: float) -> str:
    return SHOWN[name].format(f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}")


def _fitting(named: dict[str, str], columns: int) -> str:
    """`NLL 2,410  KL 401  ELBO -2,811 ...`: as many as fit, chosen in the order of `FIRST` and written in that of `SHOWN`."""
    chosen: set[str] = set()
    room = columns + 2
    for name in (*FIRST, *SHOWN):
        if name in named and name not in chosen and len(named[name]) + 2 <= room:
            chosen.add(name)
            room -= len(named[name]) + 2
    return "  ".join(named[name] for name in (*SHOWN, RATE, LEFT) if name in chosen)


def _columns() -> int:
    """Width of the terminal that stderr is, as it is now."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or COLUMNS
    except (OSError, ValueError):  # none, or no file
        return COLUMNS


def duration(seconds: float) -> str:
    """`3m05s` or `2h10m`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
