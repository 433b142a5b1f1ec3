"""Statistics of a source's images, band by band, in one pass over the images that are read."""

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from autoencoder.data.bands import Bands, DecodeError, Misfit, find_missing
from autoencoder.data.formats import read_bands
from autoencoder.data.order import spread
from autoencoder.data.own import OwnSource
from autoencoder.data.sources import BadImage, Files, open_files
from autoencoder.data_config import DataConfig
from autoencoder.runtime.errors import UsageError

if TYPE_CHECKING:
    from autoencoder.inspect_data import InspectConfig

KEPT = 2**24
"""Values kept for percentiles, over all images and bands: 128 MiB."""


@dataclass
class Band:
    """Running statistics of one band's valid values."""

    count: int = 0
    low: float = np.inf
    high: float = -np.inf
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared deviations from the mean."""
    kept: list[np.ndarray] = field(default_factory=list)
    """Values for percentiles."""

    def add(self, values: np.ndarray, kept: np.ndarray) -> None:
        """Add an image's values (Chan, Golub & LeVeque 1979: means and squares of two parts make those of the whole)."""
        exact = values.astype(np.float64)
        count, mean = self.count + len(exact), float(exact.mean())
        difference = mean - self.mean
        self.squares += float(np.square(exact - mean).sum()) + difference**2 * self.count * len(exact) / count
        self.mean += difference * len(exact) / count
        self.count, self.low, self.high = count, min(self.low, float(exact.min())), max(self.high, float(exact.max()))
        self.kept.append(kept.astype(np.float64))

    @property
    def std(self) -> float:
        return float(np.sqrt(self.squares / self.count)) if self.count else float("nan")

    def percentiles(self, wanted: tuple[float, float]) -> tuple[float, float]:
        """Percentiles of the values kept; NaN without any."""
        if not self.count:
            return float("nan"), float("nan")
        low, high = np.percentile(np.concatenate(self.kept), wanted)
        return float(low), float(high)


@dataclass
class Kind:
    """Images of one type and number of bands."""

    dtype: np.dtype
    bands: list[Band]
    colour: bool
    alpha: bool
    images: int = 0
    pixels: int = 0
    missing: int = 0
    """Pixels of which a band is marked missing, NaN or infinite."""
    with_missing: int = 0
    """Images that have some."""
    blank: int = 0
    """Pixels that are not marked missing and 0 in every band."""
    marks: Counter[float] = field(default_factory=Counter)
    """How many images give which value as the mark of missing ones."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Height and width of each."""
    whole: bool = True
    """Whether percentiles are of all values."""


@dataclass
class Inspection:
    """What was found in a source."""

    name: str
    images: int
    """Images of the source."""
    read: int
    kinds: list[Kind]
    """The most frequent first."""
    bad: list[tuple[str, str]]


def inspect(config: "InspectConfig") -> Inspection:
    """Read the images; UsageError where none can be used."""
    source = _open(config)
    chosen = spread(len(source), len(source) if config.images is None else config.images).tolist()
    kinds: dict[tuple[str, int], Kind] = {}
    bad = []
    for index in tqdm(chosen, unit="img", disable=None):
        id = str(index)
        try:
            if isinstance(source, OwnSource):
                bands, id = source.bands(index)
            else:
                data, id = source.encoded(index)
                bands = read_bands(data)
            values = _selected(bands, config.bands)
        except BadImage as error:
            bad.append((error.id, error.reason))
            continue
        except DecodeError as error:
            bad.append((id, str(error)))
            continue
        key = (bands.values.dtype.str, bands.values.shape[2])
        if key not in kinds:
            kinds[key] = Kind(bands.values.dtype, [Band() for _ in range(values.shape[2])], bands.colour, bands.alpha)
        _add(kinds[key], values, bands.nodata if config.nodata is None else config.nodata, index, KEPT // len(chosen))
    if not kinds:
        reasons = "; ".join(f"{id} ({reason})" for id, reason in bad[:3])
        named, remedy = "source", "check that these are image files"
        if config.own.given:
            named, remedy = "own.class_path", "mend what its __getitem__ gives"
        raise UsageError(f"{named}: {source.name}: none of {len(chosen)} images can be read: {reasons}; {remedy}")
    ordered = sorted(kinds.values(), key=lambda kind: -kind.images)
    return Inspection(source.name, len(source), len(chosen), ordered, bad)


def _open(config: "InspectConfig") -> Files | OwnSource:
    """The source, whatever its images look like."""
    if config.source is None:
        found = OwnSource(config.own, DataConfig(), "own")
        found.look()
        return found
    return open_files(config.source, config.split, DataConfig(source=config.source, image_column=config.image_column), "source")


def _selected(bands: Bands, wanted: tuple[int, ...] | None) -> np.ndarray:
    if wanted is None:
        return bands.values
    count = bands.values.shape[2]
    if max(wanted) >= count:
        raise Misfit("bands", f"it has bands 0 to {count - 1}, so none numbered {max(wanted)}")
    return bands.values[:, :, list(wanted)]


def _add(kind: Kind, values: np.ndarray, mark: float | None, index: int, most: int) -> None:
    missing = find_missing(values, mark)
    valid = values[~missing]  # (M, N)
    kind.images += 1
    kind.pixels += missing.size
    kind.missing += int(missing.sum())
    kind.with_missing += bool(missing.any())
    kind.blank += int((valid == 0).all(1).sum())
    kind.sizes.append(missing.shape)
    if mark is not None:
        kind.marks[mark] += 1
    if not len(valid):
        return
    # At random places: every nth pixel would be a pattern in the image's width.
    most = max(1, most // len(kind.bands))
    places = np.random.default_rng(index).integers(0, len(valid), most) if len(valid) > most else slice(None)
    kind.whole &= len(valid) <= most
    for number, band in enumerate(kind.bands):
        band.add(valid[:, number], valid[places, number])
