"""`inspect_data`: what a source's images are like, and the `data` settings that take them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from autoencoder.data.paths import check_source
from autoencoder.data.remote import check_local
from autoencoder.data_config import check_own
from autoencoder.runtime import cli
from autoencoder.runtime.errors import ConfigError, require
from autoencoder.runtime.files import write_out
from autoencoder.runtime.own_class import OwnClass, find_class


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Count and measure the images of a source, band by band, and suggest settings for them."""

    source: str | None = None
    """`demo`, a folder, a parquet or WebDataset glob, or a dataset's hub name."""
    own: OwnClass = field(default_factory=OwnClass)
    """Instead of `source`, a class of your own whose objects have __len__ and __getitem__ (docs/extending.md)."""
    split: str = "train"
    """Split of `source`, where it has splits."""
    image_column: str | None = None
    """Column of a table that holds the images; null: the only image column."""
    images: int | None = 500
    """Most images to read, spread evenly over the source; null reads all."""
    bands: tuple[int, ...] | None = None
    """Bands to look at, in the order in which they are to become channels, counted from 0; null: all."""
    nodata: float | None = None
    """Value that marks missing ones, where the files do not say so (GDAL's tag of TIFFs) and it is not NaN."""
    range: Literal["auto", "full", "common", "each"] = "auto"
    """What becomes [-1, 1]. `full`: the integer type's whole range; `common`: one range for all bands, from the lowest of their lower
    percentiles to the highest of their upper ones; `each`: each band's own. `auto`: full for 8 bits, and for 16 where a quarter is used;
    else common for integers, each for floating point."""
    percentiles: tuple[float, float] = (0.1, 99.9)
    """Ends of a range that is not full: percentiles of the values; what lies beyond is clipped."""
    out: str | None = None
    """YAML file for the settings, which `train_autoencoder --config` takes; null prints them only."""

    def __post_init__(self) -> None:
        check_local(self.out, "out")
        require(self.images is None or self.images >= 1, "images", self.images, "give at least 1, or null")
        split = None if self.split == "train" else self.split
        check_own(self.own, source=self.source, split=split, image_column=self.image_column)
        bands_fit = self.bands is None or (len(self.bands) >= 1 and min(self.bands) >= 0)
        require(bands_fit, "bands", self.bands, "give bands counted from 0")
        low, high = self.percentiles
        require(0 <= low < high <= 100, "percentiles", self.percentiles, "give two from 0 to 100, the smaller first")
        parent = Path(self.out).absolute().parent if self.out else Path()
        require(parent.is_dir(), "out", self.out, f"the folder {parent} does not exist; make it first")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(lambda: _inspect(argv))


def _inspect(argv: list[str] | None) -> int:
    config = cli.parse(InspectConfig, argv, prog="firststage inspect_data", description="Measure images and suggest settings for them.")
    if config.own.given:
        find_class(config.own, "own")
    elif config.source is not None:
        check_source(config.source)
    else:
        raise ConfigError("source", None, "give --source SOURCE: `demo`, a folder, a parquet or WebDataset glob, or a dataset's hub name")
    from autoencoder.data.inspection import inspect
    from autoencoder.data.suggestion import suggest, table, told

    found = inspect(config)
    text = told(suggest(found, config), found, config)
    print(table(found, config))
    print()
    print(text, end="")
    if config.out is not None:
        write_out(config.out, text)
        print(f"\nwritten to {config.out}; `firststage train_autoencoder --config {config.out} --out RUN ...` takes it")
    return 0
