"""How the values in image files become the images in [-1, 1] that the encoder sees. Torch-free."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from autoencoder.data_config import DataConfig


@dataclass(frozen=True, kw_only=True)
class PixelRecipe:
    """The bands of a file, the range of each, and what is missing."""

    channels: int = 3
    """Bands that the encoder takes."""
    bands: tuple[int, ...] | None = None
    """Which bands of a file they are, in order, counted from 0; None: all."""
    low: tuple[float, ...] | None = None
    """Source value of each band that becomes -1; None, as `high`: the full range of the integer type."""
    high: tuple[float, ...] | None = None
    """Source value of each band that becomes 1; values beyond the range are clipped."""
    levels: int = 256
    """Values that a band can take over its range; 0 where they are continuous, or differ from band to band."""
    nodata: float | Literal["file"] | None = None
    """Source value that marks a missing one, or `file`: the file's own mark; beside either, what is not finite is missing.
    A pixel is missing where one of its bands is. None: nothing is."""

    @property
    def ranged(self) -> bool:
        """Whether a range is stated; else it is the full one of the integer type."""
        return self.low is not None

    @property
    def eight_bit(self) -> bool:
        """Whether these are ordinary 8-bit images at full range."""
        return self.levels == 256 and not self.ranged

    @property
    def may_miss(self) -> bool:
        """Whether pixels may be missing: batches then say which are valid."""
        return self.nodata is not None

    @property
    def steps(self) -> int:
        """Integers from low to high, both counted, where the range is of integers and the same number in every band; else 0."""
        if self.low is None or self.high is None:
            return 0
        widths = {high - low for low, high in zip(self.low, self.high, strict=True)}
        whole = len(widths) == 1 and all(float(end).is_integer() for end in (*self.low, *self.high))
        return int(widths.pop()) + 1 if whole else 0

    def to_json(self) -> dict[str, Any]:
        """What enters `encoder_hash`; of images at full range `range`, `levels` and `channels` alone."""
        told: dict[str, Any] = {"range": [-1.0, 1.0], "levels": self.levels, "channels": self.channels}
        for name in ("bands", "low", "high"):
            value = getattr(self, name)
            if value is not None:
                told[name] = list(value)
        if self.nodata is not None:
            told["nodata"] = self.nodata
        return told

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "PixelRecipe":
        """The recipe that `to_json` told."""
        lists = {name: tuple(told[name]) for name in ("bands", "low", "high") if name in told}
        return cls(channels=told["channels"], levels=told["levels"], nodata=told.get("nodata"), **lists)

    def data_settings(self) -> dict[str, Any]:
        """The settings of `DataConfig` that ask for it."""
        return {name: getattr(self, name) for name in ("channels", "bands", "low", "high", "nodata")}


def recipe_of(data: DataConfig, levels: int = 256) -> PixelRecipe:
    """The recipe that these settings ask for, of images with `levels` values a band (`data.pixels.levels_of`)."""
    return PixelRecipe(
        channels=data.channels,
        bands=data.bands,
        low=each(data.low, data.channels),
        high=each(data.high, data.channels),
        levels=levels,
        nodata=float(data.nodata) if isinstance(data.nodata, (int, float)) else data.nodata,
    )


def each(value: float | Sequence[float] | None, channels: int) -> tuple[float, ...] | None:
    """One value for every channel; floats, so that equal ranges are equal in JSON however they were written."""
    if value is None:
        return None
    values = [value] * channels if isinstance(value, (int, float)) else list(value)
    return tuple(float(v) for v in (values * channels if len(values) == 1 else values))
