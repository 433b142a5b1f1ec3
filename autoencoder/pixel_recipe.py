"""How the values in image files become the images in [-1, 1] that the encoder sees. Torch-free."""

from dataclasses import dataclass
from typing import Any


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
    nodata: float | None = None
    """Source value that marks a missing one; NaN always does. A pixel is missing where one of its bands is."""

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
