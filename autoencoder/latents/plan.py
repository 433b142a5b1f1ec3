"""What a folder of latents will hold: which crop is which row, in which shard, by which recipe. Torch-free.

Row r is view r % views of image r // views. A view is a crop, or with mirrors a crop and then its mirror image. Images are numbered on
from segment to segment: the first start plans one, each append adds one. A shard is `shard_rows` rows of one segment in order, and
microbatches are `batch_size` rows in order that stay within a shard: all functions of the plan alone, whatever processes encode it.
"""

import bisect
import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from autoencoder.runtime.config_file import dotted

FORMAT, VERSION = "firststage-latents", 2


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

    @property
    def stop_image(self) -> int:
        return self.first_image + self.images

    @property
    def numbers(self) -> range:
        """Its shards."""
        return range(self.first_shard, self.first_shard + self.shards)


@dataclass(frozen=True)
class Plan:
    """Frozen in `plan.json` when the first run starts; an append freezes it with one segment more."""

    recipe: dict[str, Any]
    """All that decides a row's bits besides the images, nested as the command's settings are."""
    segments: tuple[Segment, ...]
    shapes: tuple[tuple[int, int, int], ...]
    """(c, h, w) of the latents, one entry a shape."""
    labels: list[str] | None
    """Class names by label."""
    decoder_hash: str
    """The decoder that is kept beside the latents."""

    @classmethod
    def of(cls, recipe: dict[str, Any], *, shape: tuple[int, int, int], labels: list[str] | None, decoder_hash: str) -> "Plan":
        """A plan without images."""
        return cls(recipe, (), (shape,), labels, decoder_hash)

    def plus(self, source: dict[str, Any], labels: list[str] | None, made_with: dict[str, Any]) -> "Plan":
        """This plan with a segment more, of the images of `source`, whose class names join the table at its end."""
        images = int(source["images"])
        shards = math.ceil(images * self.views / int(self.recipe["shard_rows"]))
        known = self.labels if self.segments else labels
        merged = None if known is None else [*known, *(name for name in labels or [] if name not in known)]
        added = Segment(source, self.images, images, self.shards, shards, len(merged or []), made_with)
        return replace(self, segments=(*self.segments, added), labels=merged)

    def without_last(self) -> "Plan":
        """This plan as it was before its last segment, which is not its first."""
        *earlier, _ = self.segments
        return replace(self, segments=tuple(earlier), labels=None if self.labels is None else self.labels[: earlier[-1].classes])

    @property
    def recipe_hash(self) -> str:
        """SHA-256 of the recipe: whatever images, they are encoded alike."""
        return digest(self.recipe)

    @property
    def rows_hash(self) -> str:
        """SHA-256 of recipe and images: rows of equal number and equal hash are the same."""
        return digest({"recipe": self.recipe, "fingerprints": [segment.source["fingerprint"] for segment in self.segments]})

    @property
    def own(self) -> bool:
        """Whether the images that came last are of a class of the user's own."""
        return "own" in self.segments[-1].source

    @property
    def images_key(self) -> str:
        """The setting that names them."""
        return "data.own.class_path" if self.own else "data.source"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of every latent."""
        return self.shapes[0]

    @property
    def views(self) -> int:
        """Rows of an image."""
        crops: int = self.recipe["data"]["crops"]
        return crops * (2 if self.recipe["mirrors"] else 1)

    @property
    def images(self) -> int:
        return self.segments[-1].stop_image if self.segments else 0

    @property
    def rows(self) -> int:
        """Rows if every image can be read."""
        return self.images * self.views

    @property
    def shards(self) -> int:
        return self.segments[-1].numbers.stop if self.segments else 0

    def segment_of(self, shard: int) -> Segment:
        """The segment that a shard is of."""
        return self.segments[bisect.bisect_right([segment.first_shard for segment in self.segments], shard) - 1]

    def shard(self, number: int) -> range:
        """The rows of a shard."""
        segment, size = self.segment_of(number), int(self.recipe["shard_rows"])
        rows = range(segment.first_image * self.views, segment.stop_image * self.views)
        first = (number - segment.first_shard) * size
        return rows[first : first + size]

    def microbatches(self, number: int) -> list[range]:
        """The rows of each microbatch of a shard."""
        rows, size = self.shard(number), int(self.recipe["batch_size"])
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in its safetensors file."""
        values = math.prod(self.shape) * (2 if self.recipe["moments"] else 1)
        return values * {"fp32": 4, "fp16": 2}[self.recipe["dtype"]] + 16

    def to_json(self) -> dict[str, Any]:
        """As `plan.json` has it; `rows`, `rows_per_image` and the hashes are there for people to read. Last its own digest."""
        told = {"rows": self.rows, "rows_per_image": self.views, "recipe_hash": self.recipe_hash, "rows_hash": self.rows_hash}
        content = {"format": FORMAT, "version": VERSION, **told, **asdict(self), "shapes": [list(shape) for shape in self.shapes]}
        return {**content, "sha256": digest(content)}

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> "Plan":
        """The plan in `plan.json`; KeyError or TypeError for anything else."""
        shapes = tuple((c, h, w) for c, h, w in given["shapes"])
        segments = tuple(Segment(**segment) for segment in given["segments"])
        return cls(given["recipe"], segments, shapes, given["labels"], given["decoder_hash"])

    def differences(self, now: "Plan") -> list[tuple[str, Any, Any]]:
        """What of the recipe, by dotted key, would make `now`'s rows others than these: key, old value, new value."""
        old, new = (_facts(plan) for plan in (self, now))
        return [(key, old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)]


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON with sorted keys and without spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _facts(plan: Plan) -> dict[str, Any]:
    # As JSON has them: a tuple that was written comes back as a list.
    return {**dotted(json.loads(json.dumps(plan.recipe))), "shapes": [list(shape) for shape in plan.shapes]}
