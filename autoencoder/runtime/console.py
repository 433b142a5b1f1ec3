"""What a run says while it goes: a bar with throughput and time left on a terminal, plain lines in a file."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

SHOWN = ("loss", "nll_nats", "kl_nats", "psnr_db", "gradient_norm")


class Console:
    """Progress over `total` images on stderr, from the main process only."""

    def __init__(self, total: int, *, shown: bool, bar: bool) -> None:
        self.total, self.shown, self.wants_bar = total, shown, bar and shown and sys.stderr.isatty()
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
        shown = {k: f"{scalars[k]:.4g}" for k in SHOWN if k in scalars}
        if self._bar is not None and phase == "train":
            self._bar.set_postfix(shown)
            return
        if self._start is None:
            self._start = time.monotonic(), images
        text = "  ".join(f"{k} {v}" for k, v in shown.items())
        rate = (images - self._start[1]) / max(time.monotonic() - self._start[0], 1e-9)
        left = f"  {rate:.0f} img/s  {duration((self.total - images) / rate)} left" if rate > 0 and phase == "train" else ""
        self.say(f"{phase:>10}  {images:>9,} / {self.total:,} images  {text}{left}")


def duration(seconds: float) -> str:
    """`3m05s` or `2h10m`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
