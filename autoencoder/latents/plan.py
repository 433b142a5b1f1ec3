"""What a folder of latents will hold: which crop is which row, in which shard, by which recipe. Torch-free.

Row r is view r % views of image r // views. A view is a crop, or with mirrors a crop and then its mirror image. A shard is
`shard_rows` rows in order, and microbatches are `batch_size` rows in order that stay within a shard: all functions of the plan
alone, whatever processes encode it.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from autoencoder.runtime.config_file import dotted

FORMAT, VERSION = "firststage-latents", 2


@dataclass(frozen=True)
class Plan:
    """Frozen in `plan.json` when the first run starts."""

    recipe: dict[str, Any]
    """All that decides a row's bits besides the source's images, nested as the command's settings are."""
    source: dict[str, Any]
    """`name`, `fingerprint`, `images`; of a class of the user's own also `own`, its path and arguments."""
    shape: tuple[int, int, int]
    """(c, h, w) of a latent."""
    labels: list[str] | None
    """Class names by label."""
    decoder_hash: str
    """The decoder that is kept beside the latents."""
    made_with: dict[str, Any]
    """Versions, device and threads of the first run: the last bits depend on them."""

    @property
    def recipe_hash(self) -> str:
        """SHA-256 of the recipe."""
        return digest(self.recipe)

    @property
    def rows_hash(self) -> str:
        """SHA-256 of recipe and source: rows of equal number and equal hash are the same."""
        return digest({"recipe": self.recipe, "fingerprints": [self.source["fingerprint"]]})

    @property
    def own(self) -> bool:
        """Whether the images are of a class of the user's own."""
        return "own" in self.source

    @property
    def images_key(self) -> str:
        """The setting that names the images."""
        return "data.own.class_path" if self.own else "data.source"

    @property
    def views(self) -> int:
        """Rows of an image."""
        crops: int = self.recipe["data"]["crops"]
        return crops * (2 if self.recipe["mirrors"] else 1)

    @property
    def rows(self) -> int:
        """Rows if every image can be read."""
        images: int = self.source["images"]
        return images * self.views

    @property
    def shards(self) -> int:
        return math.ceil(self.rows / int(self.recipe["shard_rows"]))

    def shard(self, number: int) -> range:
        """The rows of a shard."""
        size = int(self.recipe["shard_rows"])
        return range(self.rows)[number * size : (number + 1) * size]

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
        """As `plan.json` has it; `rows`, `rows_per_image` and `recipe_hash` are there for people to read."""
        told = {"rows": self.rows, "rows_per_image": self.views, "recipe_hash": self.recipe_hash}
        return {"format": FORMAT, "version": VERSION, **told, **asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> "Plan":
        """The plan in `plan.json`; KeyError or TypeError for anything else."""
        names = ("recipe", "source", "labels", "decoder_hash", "made_with")
        c, h, w = given["shape"]
        return cls(**{name: given[name] for name in names}, shape=(c, h, w))

    def differences(self, now: "Plan") -> list[tuple[str, Any, Any]]:
        """Settings and facts, by dotted key, that would make `now`'s rows others than these: key, old value, new value."""
        old, new = (_facts(plan) for plan in (self, now))
        return [(key, old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)]


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON with sorted keys and without spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _facts(plan: Plan) -> dict[str, Any]:
    # As JSON has them: a tuple that was written comes back as a list.
    recipe = json.loads(json.dumps(plan.recipe))
    source = {f"source.{key}": plan.source[key] for key in ("fingerprint", "images")}
    return {**dotted(recipe), **source, "labels": plan.labels, "shape": list(plan.shape)}
