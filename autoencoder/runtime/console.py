"""What a run says while it goes: a bar with throughput and time left on a terminal, plain lines in a file."""

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
"""What a line shows, where there is room for it, the first first; in nats an image where no unit stands."""
SETTINGS = ("kl_weight",)
"""Those of them that are shown only where they move."""
COLUMNS = 120


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
        scalars = {name: value for name, value in scalars.items() if name not in self._left_out}
        if self._bar is not None and phase == "train":
            self._bar.set_postfix_str(_figures(scalars, COLUMNS // 2))
            return
        if self._start is None:
            self._start = time.monotonic(), images
        head = f"{phase:>10}  {images:>9,} / {self.total:,}  "
        rate = (images - self._start[1]) / max(time.monotonic() - self._start[0], 1e-9)
        left = f"  {rate:.0f} img/s  {duration((self.total - images) / rate)} left" if rate > 0 and phase == "train" else ""
        self.say(head + _figures(scalars, COLUMNS - len(head) - len(left)) + left)


def _figures(scalars: dict[str, float], columns: int) -> str:
    """`NLL 2,410  KL 401  ELBO -2,811  perceptual 0.12 ...`, as many as fit."""
    text = ""
    for name, label in SHOWN.items():
        if name not in scalars or (name == "elbo_nats" and "bits_per_dim" in scalars):
            continue
        value = scalars[name]
        longer = f"{text}  {label.format(f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}')}".strip()
        if len(longer) > columns:
            break
        text = longer
    return text


def duration(seconds: float) -> str:
    """`3m05s` or `2h10m`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
