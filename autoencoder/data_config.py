"""Where images come from and how they become crops. Torch-free."""

import math
from dataclasses import dataclass, field
from typing import Literal

from autoencoder.runtime.errors import require
from autoencoder.runtime.own_class import OwnClass


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and how they are cropped."""

    source: str = "demo"
    """`demo` (scikit-image's photos), a folder (class folders become labels), a parquet or WebDataset glob, a URL of one of these
    (`s3://bucket/*.tar`), or a dataset's hub name."""
    own: OwnClass = field(default_factory=OwnClass)
    """Instead of `source`, a class of your own whose objects have __len__ and __getitem__ (docs/extending.md)."""
    split: str = "train"
    """Split of `source` to train on, where it has splits (hub names, `train/` and `validation/` folders)."""
    validation_source: str | None = None
    """Images to validate on; null: the `validation` or `test` split of `source`, else `validation_images` held out of it."""
    validation_own: OwnClass = field(default_factory=OwnClass)
    """Instead of `validation_source`, a class of your own."""
    validation_images: int = 64
    """Most images that a validation looks at. Without a validation split they are held out, but never more than a tenth of the source."""
    validation_grid: int = 1
    """Validation crops an image: a k x k grid of crops around its centre."""
    image_column: str | None = None
    """Column that holds the images, of WebDatasets their ending; null: the only image column."""
    label_column: str | None = None
    """Column that holds class labels; null: `label` where there is one."""
    resolution: int = 256
    """Side of the square training crops, in pixels."""
    channels: int = 3
    """Image channels: 1 (grey), 3 (RGB), 4 (RGBA), or the bands of a multispectral image."""
    bands: tuple[int, ...] | None = None
    """Bands of the files that become the channels, in order, counted from 0; null takes them all (and makes grey of colour, colour of
    grey, and lays transparent images over white)."""
    low: float | tuple[float, ...] | None = None
    """Source value that becomes -1, one for all channels or one each; null, as `high`: the full range of 8 or 16 bits.
    `inspect_data` finds ranges."""
    high: float | tuple[float, ...] | None = None
    """Source value that becomes 1; values beyond the range are clipped to it."""
    nodata: float | Literal["file"] | None = None
    """Source value that marks missing ones, or `file`: what each TIFF says itself; NaN and infinities are missing beside either. A pixel
    is missing where one of its bands is. Null: nothing may be missing."""
    preview: tuple[int, ...] | None = None
    """One channel or three to show in pictures, counted from 0; null shows the only one of one or two, and the first three of more."""
    stretch: tuple[float, float] | None = None
    """Percentiles of each shown channel that become black and white in pictures, such as [2, 98]; null shows the range as it is."""
    resize: int | None = None
    """Scale each image's short side to this many pixels before cropping; null crops at the image's own pixels."""
    crop: Literal["random", "center"] = "random"
    """Where training crops are taken; validation crops are central."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Range of a random factor (log-uniform) on the image's size before a random crop; below 1 shows more of it, smaller."""
    flip: bool = True
    """Mirror half of the training crops."""
    shuffle_channels: bool = False
    """Put the colour channels of each training crop into a random order: colours that few photos lack (the demo has six)."""
    filter: Literal["lanczos", "bicubic", "bilinear", "box"] = "lanczos"
    """Resampling filter of every resize (always antialiased)."""
    workers: int | None = None
    """Loader processes for each training process; null chooses by source and cores (none for in-memory sources)."""
    max_bad: int = 100
    """Unreadable images tolerated (each is skipped, counted and listed in `bad_images.jsonl`); one more ends the run."""

    def __post_init__(self) -> None:
        require(bool(self.source), "source", self.source, "give `demo`, a folder, a glob or a hub name")
        require(self.resolution >= 8, "resolution", self.resolution, "give at least 8 pixels")
        self._check_own()
        self._check_pixels()
        require(
            self.resize is None or self.resize >= self.resolution,
            "resize",
            self.resize,
            f"give null or at least the resolution ({self.resolution})",
        )
        require(0 < self.zoom[0] <= self.zoom[1], "zoom", self.zoom, "give two factors above 0, the smaller first")
        require(self.validation_images >= 1, "validation_images", self.validation_images, "give at least 1")
        require(self.validation_grid >= 1, "validation_grid", self.validation_grid, "give at least 1")
        require(self.workers is None or self.workers >= 0, "workers", self.workers, "give 0 or more, or null")
        require(self.max_bad >= 0, "max_bad", self.max_bad, "give 0 or more")

    def _check_own(self) -> None:
        # The source of a configuration that names none.
        given = None if self.source == "demo" else self.source
        check_own(self.own, source=given, split=None if self.split == "train" else self.split)
        check_own(self.validation_own, validation_source=self.validation_source)
        if self.validation_source is None:
            check_own(self.own, image_column=self.image_column, label_column=self.label_column)

    def _check_pixels(self) -> None:
        require(self.channels >= 1, "channels", self.channels, "give 1 (grey), 3 (RGB), 4 (RGBA) or another number of bands")
        require(
            self.bands is None or (len(self.bands) == self.channels and all(band >= 0 for band in self.bands)),
            "bands",
            self.bands,
            f"give one band, counted from 0, for each of data.channels={self.channels}",
        )
        ends = {"low": self.low, "high": self.high}
        for name, other in (("low", self.high), ("high", self.low)):
            value = ends[name]
            require(value is not None or other is None, name, None, "give data.low and data.high together, or neither")
            require(
                not isinstance(value, tuple) or len(value) in (1, self.channels),
                name,
                value,
                f"give one value, or one for each of data.channels={self.channels}",
            )
            require(value is None or all(math.isfinite(v) for v in listed(value)), name, value, "give finite values")
        if self.low is not None and self.high is not None:
            lows, highs = listed(self.low), listed(self.high)
            ordered = all(
                low < high for low, high in zip(lows * (self.channels // len(lows)), highs * (self.channels // len(highs)), strict=True)
            )
            require(ordered, "high", self.high, f"give values above data.low={self.low}")
            alike = len(set(lows)) == len(set(highs)) == 1
            require(alike or not self.shuffle_channels, "shuffle_channels", True, "give one data.low and data.high for all channels")
        finite = not isinstance(self.nodata, float) or math.isfinite(self.nodata)
        require(finite, "nodata", self.nodata, "give `file`: NaN and infinities are missing beside it")
        shown = self.preview
        require(
            shown is None or (len(shown) in (1, 3) and all(0 <= channel < self.channels for channel in shown)),
            "preview",
            shown,
            f"give one channel or three, from 0 to {self.channels - 1}",
        )
        stretch = self.stretch
        require(stretch is None or 0 <= stretch[0] < stretch[1] <= 100, "stretch", stretch, "give two percentiles, the smaller first")


def check_own(own: OwnClass, **others: str | None) -> None:
    """Refuse settings that are of other sources, None where they are not given, beside a class of the user's own."""
    remedy = f"{own.class_path} takes its place: leave one out (one that a file has: data.own=null, or data.source=demo)"
    for key, given in others.items():
        require(not own.given or given is None, key, given, remedy)


def images_key(own: OwnClass) -> str:
    """The setting that names the images, where `own` is `data.own`."""
    return "data.own.class_path" if own.given else "data.source"


def listed(value: float | tuple[float, ...]) -> tuple[float, ...]:
    """A value or several as several."""
    return value if isinstance(value, tuple) else (value,)
