"""The images that a plan took up at once, and the parts that their shards are cut from. Torch-free."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


class Part(NamedTuple):
    """Rows of one size that a segment's shards are cut from."""

    resolution: int
    bucket: int
    images: int


@dataclass(frozen=True)
class Segment:
    """The images that one planning added."""

    source: dict[str, Any]
    """`name`, `fingerprint`, `images`; of a class of the user's own also `own`, its path and arguments. The fingerprint is that of the
    segment's images, `images` their number."""
    first_image: int
    images: int
    first_shard: int
    shards: int
    classes: int
    """Names in the plan's table of classes with its own, of which those that came with it are the last."""
    made_with: dict[str, Any]
    """Versions, device and threads where it was planned: the last bits depend on them."""
    buckets: dict[str, Any] | None = None
    """Where images have buckets: `images` in each bucket of each resolution, `sha256` of the file that says which. Else None."""

    def to_json(self) -> dict[str, Any]:
        """As plan and manifest have it: `buckets` only where there are some."""
        return {key: value for key, value in asdict(self).items() if key != "buckets" or value is not None}

    @property
    def stop_image(self) -> int:
        return self.first_image + self.images

    @property
    def numbers(self) -> range:
        """Its shards."""
        return range(self.first_shard, self.first_shard + self.shards)

    def parts(self, resolutions: int) -> Iterator[Part]:
        """Its parts, in the order of its shards."""
        for resolution in range(resolutions):
            counts = [self.images] if self.buckets is None else self.buckets["images"][resolution]
            for bucket, images in enumerate(counts):
                yield Part(resolution, bucket, images)


class Place(NamedTuple):
    """Where a shard's rows are: from `first` to `last` - 1 of those of its part."""

    segment: int
    part: Part
    first: int
    last: int
