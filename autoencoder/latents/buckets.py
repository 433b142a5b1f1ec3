"""Aspect-ratio buckets: the few sizes that images of many shapes are cropped to, so that little of each is cut away. Torch-free."""

from collections.abc import Sequence

from autoencoder.latents.config import EncodeDataConfig, parsed_size
from autoencoder.runtime.errors import ConfigError

Size = tuple[int, int]
"""(height, width) of a crop in pixels."""


def automatic(resolution: int, step: int, ratio: float) -> list[Size]:
    """Sizes of at most resolution² pixels, both sides multiples of `step`, that a step more in height or in width would take beyond that.

    Their long side is at most `ratio` times the short one; the narrowest comes first. Those of NovelAI's trainer (2022), and of the
    table of SDXL (Podell et al. 2023, app. I).
    """
    area, found = resolution**2, set[Size]()
    for side in range(step, area // step + 1, step):
        other = area // side // step * step
        if max(side, other) <= ratio * min(side, other):
            found |= {(side, other), (other, side)}
    return sorted(found, key=lambda size: (size[1], -size[0]))


def sizes_of(data: EncodeDataConfig, resolution: int, factor: int) -> list[list[Size]] | None:
    """The sizes of crops that are asked for, a list for each resolution; None for crops of one square alone.

    Raises ConfigError for sides that are no multiples of `factor`, the network's downsampling.
    """
    if not data.covers:
        return None
    reason = f"multiples of {factor}, the network's downsampling factor"
    if isinstance(data.buckets, list):
        sizes = [parsed_size(text) for text in data.buckets]
        _require_multiples([side for size in sizes for side in size], factor, "data.buckets", data.buckets, f"give sides that are {reason}")
        return [sizes]
    resolutions, key = data.resolutions or [resolution], "data.resolutions" if data.resolutions else "data.resolution"
    given = data.resolutions or resolution
    if data.buckets is None:
        _require_multiples(resolutions, factor, key, given, f"give {reason}")
        return [[(side, side)] for side in resolutions]
    _require_multiples([data.bucket_step], factor, "data.bucket_step", data.bucket_step, f"give one of the {reason}")
    step = data.bucket_step
    _require_multiples(resolutions, step, key, given, f"give multiples of data.bucket_step={step}, or another step")
    return [automatic(side, step, data.bucket_ratio) for side in resolutions]


def told(size: Sequence[int]) -> str:
    """`WxH`, as settings have it."""
    return f"{size[1]}x{size[0]}"


def _require_multiples(sides: Sequence[int], of: int, key: str, given: object, remedy: str) -> None:
    if any(side % of for side in sides):
        raise ConfigError(key, given, remedy)
