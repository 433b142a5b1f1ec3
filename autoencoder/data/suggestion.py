"""What an inspection found, as text, and the settings that take it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from autoencoder.data.inspection import Inspection, Kind
from autoencoder.pixel_recipe import PixelRecipe, each
from autoencoder.runtime.config_file import to_yaml
from autoencoder.runtime.errors import ConfigError

if TYPE_CHECKING:
    from autoencoder.inspect_data import InspectConfig

SHOWN = 20
"""Bad images that are listed; the others are counted."""


@dataclass(frozen=True)
class Suggestion:
    """Settings for the most frequent kind of image."""

    data: dict[str, Any]
    """Settings of `data` that are not the default."""
    levels: int
    """Values that a band can take; 0 where they are continuous."""
    notes: list[str]
    """What the settings leave to decide."""


def suggest(found: Inspection, config: "InspectConfig") -> Suggestion:
    """Channels, range, missing values and pictures; ConfigError where the range that was asked for does not exist."""
    kind, notes = found.kinds[0], []
    channels = len(kind.bands)
    data: dict[str, Any] = {"own": config.own.to_json()} if config.source is None else {"source": config.source}
    if config.split != "train":
        data["split"] = config.split
    if config.image_column is not None:
        data["image_column"] = config.image_column
    if config.bands is None and kind.colour and kind.alpha:
        notes.append(f"the last band is opacity; data.channels={channels - 1} lays images over white instead")
    if config.bands is None and channels == 1 and any(other.colour and len(other.bands) in (3, 4) for other in found.kinds[1:]):
        channels = 3
        notes.append("grey and colour images: grey ones become colour; data.channels=1 makes grey of all")
    data["channels"] = channels
    if config.bands is not None:
        data["bands"] = list(config.bands)
    ends = _range(kind, config)
    if ends is not None:
        data["low"], data["high"] = ends
        notes += _range_words(kind, config, ends)
    if config.nodata is not None:
        data["nodata"] = config.nodata
    elif kind.missing or kind.marks:
        data["nodata"] = "file"
    if channels > 3 and not kind.colour:
        data["preview"] = [0, 1, 2]
        notes.append("preview: bands 0, 1, 2 as red, green, blue; choose those that look natural")
    if ends is not None:
        data["stretch"] = [2.0, 98.0]
    share = kind.blank / max(1, kind.pixels)
    if config.nodata is None and share > 0.005 and not (kind.colour and ends is None):
        notes.append(f"{share:.1%} of pixels are 0 in every band; if that means missing, inspect again with --nodata 0")
    others = [other for other in found.kinds[1:] if not _fits(other, data)]
    if others:
        notes.append(f"images that do not fit these settings, and will count as bad: {_list(others)}")
    full = {"u1": 256, "b1": 256, "f2": 0, "f4": 0, "f8": 0}.get(kind.dtype.str[1:], 65536)
    recipe = PixelRecipe(channels=channels, low=each(data.get("low"), channels), high=each(data.get("high"), channels))
    levels = full if ends is None else 0 if kind.dtype.kind == "f" else recipe.steps
    return Suggestion(data, levels, notes)


def _fits(kind: Kind, data: dict[str, Any]) -> bool:
    return "bands" in data or len(kind.bands) == data["channels"] or (kind.colour and data["channels"] in (1, 3))


def _range(kind: Kind, config: "InspectConfig") -> tuple[float | list[float], float | list[float]] | None:
    """Low and high, common to all bands or each band's own; None for the full range of the type."""
    pairs = [band.percentiles(config.percentiles) for band in kind.bands]
    if any(math.isnan(low) for low, _ in pairs):
        raise ConfigError("nodata", config.nodata, "every pixel that was read is missing; give another value, or more images")
    low, high = min(low for low, _ in pairs), max(high for _, high in pairs)
    has_full = kind.dtype.str[1:] in ("b1", "u1", "u2")
    wanted: str = config.range
    if wanted == "auto":
        quarter = (high - low) / 65536 >= 0.25
        integers = "full" if has_full and (kind.dtype.itemsize == 1 or quarter) else "common"
        wanted = "each" if kind.dtype.kind == "f" else integers
    if wanted == "full":
        if not has_full:
            raise ConfigError("range", config.range, f"{kind.dtype} values have no range of their own; give common or each")
        return None
    rounded = [_rounded(*ends, kind.dtype) for ends in ([(low, high)] if wanted == "common" else pairs)]
    if len(rounded) == 1:
        return rounded[0]
    return [low for low, _ in rounded], [high for _, high in rounded]


def _range_words(kind: Kind, config: "InspectConfig", ends: tuple[float | list[float], float | list[float]]) -> list[str]:
    """Where a range that is not the type's own comes from, what it clips, and what a common one leaves of itself to the narrowest band."""
    lower, upper = config.percentiles
    below, above = f"{lower:.3g}%", f"{100 - upper:.3g}%"
    low, high = ends
    if isinstance(low, list) or isinstance(high, list):
        return [f"each band has its own range: {below} of its values lie below low and {above} above high, and are clipped"]
    if len(kind.bands) == 1:
        return [f"{below} of values lie below low and {above} above high, and are clipped"]
    pairs = [band.percentiles(config.percentiles) for band in kind.bands]
    numbers = range(len(kind.bands)) if config.bands is None else config.bands
    widths = [top - bottom for bottom, top in pairs]
    least = min(range(len(widths)), key=widths.__getitem__)
    return [
        f"one range for all bands, {low:g} to {high:g}: from the lowest {lower:g} % value in the table to the highest {upper:g} % value",
        f"of no band do more than {below} of the values lie below it and {above} above; they are clipped",
        f"band {numbers[least]} takes up least of it, {widths[least] / (high - low):.0%}; --range each gives every band its own",
    ]


def _rounded(low: float, high: float, dtype: np.dtype) -> tuple[float, float]:
    """Whole numbers for integers, six digits else; never an empty range."""
    low, high = (math.floor(low), math.ceil(high)) if dtype.kind != "f" else (float(f"{low:.6g}"), float(f"{high:.6g}"))
    return (low, high) if low < high else (low, low + 1)


def told(suggestion: Suggestion, found: Inspection, config: "InspectConfig") -> str:
    """The settings as YAML, which `train_autoencoder --config` takes, with the notes as comments."""
    settings: dict[str, Any] = {"data": suggestion.data}
    notes = list(suggestion.notes)
    if suggestion.levels == 0:
        continuous = "continuous values: a likelihood over levels (discretized_*) cannot be used"
        differing = "bands of unlike ranges: a likelihood over levels (discretized_*) cannot be used; --range common lets it"
        notes.append(continuous if found.kinds[0].dtype.kind == "f" else differing)
    elif suggestion.levels != 256:
        settings["objective"] = {"likelihood": {"levels": suggestion.levels}}
    kind = found.kinds[0]
    head = [f"From {kind.images:,} of {found.images:,} images of {found.name}, each of {_what(kind)}.", *notes]
    return "".join(f"# {line}\n" for line in head) + to_yaml(settings)


def table(found: Inspection, config: "InspectConfig") -> str:
    """Counts, sizes, and a line for each band."""
    kind = found.kinds[0]
    lines = [f"source   {found.name}: {found.images:,} images, {found.read:,} of them read"]
    lines.append(f"images   {kind.images:,} of {_what(kind)}" + (f"; besides {_list(found.kinds[1:])}" if found.kinds[1:] else ""))
    heights, widths = np.array(kind.sizes).T
    shorter = np.minimum(heights, widths)
    smallest, largest = (f"{widths[k]} x {heights[k]}" for k in ((heights * widths).argmin(), (heights * widths).argmax()))
    sides = f"; shorter side {shorter.min()} to {shorter.max()}, half of them {np.median(shorter):g} or more"
    lines.append(f"sizes    {smallest} pixels each" if len(set(kind.sizes)) == 1 else f"sizes    {smallest} to {largest} pixels{sides}")
    if kind.missing or kind.marks:
        marks = ", ".join(f"{mark:g} in {count:,} images" for mark, count in kind.marks.most_common(3)) or "none but NaN"
        lines.append(f"missing  {kind.missing / kind.pixels:.2%} of pixels, in {kind.with_missing:,} images; marked by {marks}")
    numbers = range(len(kind.bands)) if config.bands is None else config.bands
    low, high = (f"{percentile:g} %" for percentile in config.percentiles)
    rows: list[tuple[str, ...]] = [("band", "min", low, "mean", "std", high, "max")]
    for number, band in zip(numbers, kind.bands, strict=True):
        ends = band.percentiles(config.percentiles)
        rows.append((str(number), *(_short(v) for v in (band.low, ends[0], band.mean, band.std, ends[1], band.high))))
    columns = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines += ["", *("  ".join(cell.rjust(width) for cell, width in zip(row, columns, strict=True)) for row in rows)]
    if not kind.whole:
        kept = sum(len(values) for values in kind.bands[0].kept)
        lines.append(f"(percentiles of {kept:,} random pixels; all else of {kind.bands[0].count:,})")
    if found.bad:
        lines += ["", f"bad images: {len(found.bad):,}", *(f"  {id}: {reason}" for id, reason in found.bad[:SHOWN])]
        lines += [f"  and {len(found.bad) - SHOWN:,} more"] if len(found.bad) > SHOWN else []
    return "\n".join(lines)


def _list(kinds: Sequence[Kind]) -> str:
    shown = ", ".join(f"{kind.images:,} of {_what(kind)}" for kind in kinds[:4])
    return shown if len(kinds) <= 4 else f"{shown}, and {sum(kind.images for kind in kinds[4:]):,} others"


def _what(kind: Kind) -> str:
    count = len(kind.bands)
    return f"{count} band{'' if count == 1 else 's'} of {kind.dtype.name}"


def _short(value: float) -> str:
    return f"{value:.6g}"
