"""What a folder of latents will hold: which crop is which row, in which shard, by which recipe. Torch-free.

Row r is view r % views of image r // views. A view is a crop, or with mirrors a crop and then its mirror image, of each resolution in
turn. Images are numbered on from segment to segment: the first start plans one, each append adds one. A shard is `shard_rows` rows of one
segment in order, of crops of one size; where there are several sizes, the shards of one come before those of the next. Microbatches are
`batch_size` rows in order that stay within a shard: all functions of the plan alone, whatever processes encode it.
"""

import bisect
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoencoder.latents.buckets import Size
from autoencoder.latents.parts import Part, Place, Segment
from autoencoder.runtime.config_file import dotted

if TYPE_CHECKING:
    from autoencoder.latents.assigned import Assigned

FORMAT, VERSION = "firststage-latents", 2


@dataclass(frozen=True)
class Plan:
    """Frozen in `plan.json` when the first run starts; an append freezes it with one segment more."""

    recipe: dict[str, Any]
    """All that decides a row's bits besides the images, nested as the command's settings are."""
    segments: tuple[Segment, ...]
    shapes: tuple[tuple[int, int, int], ...]
    """(c, h, w) of the latents, one entry a size of crops, of one resolution after the other."""
    labels: list[str] | None
    """Class names by label."""
    decoder_hash: str
    """The decoder that is kept beside the latents."""
    assigned: tuple["Assigned | None", ...] = field(default=(), compare=False, repr=False)
    """Of each segment which bucket its images are in, where they have buckets; equal where the segments are."""

    @classmethod
    def of(cls, recipe: dict[str, Any], *, shapes: tuple[tuple[int, int, int], ...], labels: list[str] | None, decoder_hash: str) -> "Plan":
        """A plan without images."""
        return cls(recipe, (), shapes, labels, decoder_hash)

    def plus(
        self, source: dict[str, Any], labels: list[str] | None, made_with: dict[str, Any], assigned: "Assigned | None" = None
    ) -> "Plan":
        """This plan with a segment more, of the images of `source`, whose class names join the table at its end."""
        images = int(source["images"])
        known = self.labels if self.segments else labels
        merged = None if known is None else [*known, *(name for name in labels or [] if name not in known)]
        buckets = None if assigned is None else assigned.told(self.sizes or [])
        added = Segment(source, self.images, images, self.shards, 0, len(merged or []), made_with, buckets)
        added = replace(added, shards=sum(self._shards_of(part) for part in added.parts(self._resolutions)))
        return replace(self, segments=(*self.segments, added), labels=merged, assigned=(*self.assigned, assigned))

    def without_last(self) -> "Plan":
        """This plan as it was before its last segment, which is not its first."""
        *earlier, _ = self.segments
        labels = None if self.labels is None else self.labels[: earlier[-1].classes]
        return replace(self, segments=tuple(earlier), labels=labels, assigned=self.assigned[:-1])

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

    @cached_property
    def sizes(self) -> list[list[Size]] | None:
        """(height, width) of crops, a list of buckets for each resolution; None where all are squares of the one resolution."""
        told = self.recipe.get("sizes")
        return None if told is None else [[(height, width) for height, width in each] for each in told]

    @property
    def bucketed(self) -> bool:
        """Whether an image's size decides on those of its crops."""
        return any(len(each) > 1 for each in self.sizes or [])

    @property
    def views(self) -> int:
        """Rows of an image."""
        return self.views_each * self._resolutions

    @property
    def views_each(self) -> int:
        """Rows of an image of one resolution."""
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

    def shard(self, number: int) -> Sequence[int]:
        """The rows of a shard, ascending; a range where they follow each other."""
        place = self._place(number)
        segment, each, part = self.segments[place.segment], self.views_each, place.part
        if each == self.views and not self.bucketed:
            start = segment.first_image * each
            return range(start + place.first, start + place.last)
        from_image, to_image = place.first // each, -(-place.last // each)
        start, assigned = segment.first_image * self.views + part.resolution * each, self._assigned(place.segment)
        if assigned is None:
            rows = [start + image * self.views + k for image in range(from_image, to_image) for k in range(each)]
        else:
            rows = assigned.rows(part.resolution, part.bucket, from_image, to_image, start=start, step=self.views, each=each)
        found = rows[place.first - from_image * each : place.last - from_image * each]
        return range(found[0], found[-1] + 1) if found[-1] - found[0] == len(found) - 1 else found

    def rows_in(self, number: int) -> int:
        """How many rows a shard has."""
        place = self._place(number)
        return place.last - place.first

    def shape_of(self, number: int) -> tuple[int, int, int]:
        """(c, h, w) of a shard's latents."""
        part = self._place(number).part
        return self.shapes[sum(map(len, (self.sizes or [])[: part.resolution])) + part.bucket]

    def size_of(self, number: int) -> Size:
        """(height, width) of a shard's crops."""
        part, side = self._place(number).part, int(self.recipe["data"]["resolution"])
        return (side, side) if self.sizes is None else self.sizes[part.resolution][part.bucket]

    def size_of_row(self, row: int) -> Size | None:
        """(height, width) of the crop of a row; None where all are squares of the one resolution."""
        if self.sizes is None:
            return None
        image, view = divmod(row, self.views)
        resolution = view // self.views_each
        number = bisect.bisect_right([segment.first_image for segment in self.segments], image) - 1
        assigned = self._assigned(number)
        bucket = 0 if assigned is None else assigned.bucket(resolution, image - self.segments[number].first_image)
        return self.sizes[resolution][bucket]

    def microbatches(self, number: int) -> list[Sequence[int]]:
        """The rows of each microbatch of a shard."""
        rows, size = self.shard(number), int(self.recipe["batch_size"])
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def bytes_of(self, number: int) -> int:
        """Bytes of a shard's rows in its safetensors file."""
        values = math.prod(self.shape_of(number)) * (2 if self.recipe["moments"] else 1)
        return self.rows_in(number) * (values * {"fp32": 4, "fp16": 2}[self.recipe["dtype"]] + 16)

    @property
    def _resolutions(self) -> int:
        return 1 if self.sizes is None else len(self.sizes)

    def _assigned(self, segment: int) -> "Assigned | None":
        found = self.assigned[segment]
        assert (found is None) == (self.segments[segment].buckets is None), "with_buckets has not been called"
        return found

    def _shards_of(self, part: Part) -> int:
        return math.ceil(part.images * self.views_each / int(self.recipe["shard_rows"]))

    def _place(self, number: int) -> Place:
        found = bisect.bisect_right([segment.first_shard for segment in self.segments], number) - 1
        local, size = number - self.segments[found].first_shard, int(self.recipe["shard_rows"])
        for part in self.segments[found].parts(self._resolutions):
            if local < self._shards_of(part):
                return Place(found, part, local * size, min((local + 1) * size, part.images * self.views_each))
            local -= self._shards_of(part)
        raise IndexError(number)

    def to_json(self) -> dict[str, Any]:
        """As `plan.json` has it; `rows`, `rows_per_image` and the hashes are there for people to read. Last its own digest."""
        told = {"rows": self.rows, "rows_per_image": self.views, "recipe_hash": self.recipe_hash, "rows_hash": self.rows_hash}
        content = {
            "format": FORMAT, "version": VERSION, **told, "recipe": self.recipe,
            "segments": [segment.to_json() for segment in self.segments], "shapes": [list(shape) for shape in self.shapes],
            "labels": self.labels, "decoder_hash": self.decoder_hash,
        }  # fmt: skip
        return {**content, "sha256": digest(content)}

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> "Plan":
        """The plan in `plan.json`, which tells of buckets how many images they have; KeyError or TypeError for anything else."""
        shapes = tuple((c, h, w) for c, h, w in given["shapes"])
        segments = tuple(Segment(**segment) for segment in given["segments"])
        return cls(given["recipe"], segments, shapes, given["labels"], given["decoder_hash"], (None,) * len(segments))

    def with_buckets(self, folder: Path) -> "Plan":
        """This plan, as it was read, with its images' buckets from the files beside it; OSError or ValueError where they cannot be read."""
        told = [segment.buckets for segment in self.segments]
        if not any(told):
            return self
        # NumPy, which a plan without buckets does without.
        from autoencoder.latents.assigned import Assigned, file_name

        read = [None if each is None else Assigned.read(folder / file_name(k), each["sha256"]) for k, each in enumerate(told)]
        return replace(self, assigned=tuple(read))

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
