"""What `encode_dataset` can be told. Torch-free."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from autoencoder.data.remote import is_remote
from autoencoder.data_config import check_own
from autoencoder.runtime.errors import require
from autoencoder.runtime.own_class import OwnClass

_SIZE = re.compile(r"(\d+)x(\d+)")


def parsed_size(text: str) -> tuple[int, int]:
    """(height, width) of `WxH`."""
    found = _SIZE.fullmatch(text)
    assert found is not None
    return int(found[2]), int(found[1])


@dataclass(frozen=True, kw_only=True)
class EncodeDataConfig:
    """Images to encode, and the crops that are taken of them."""

    source: str | None = None
    """`demo`, a folder (class folders become labels), a parquet or WebDataset glob, or a dataset's hub name."""
    own: OwnClass = field(default_factory=OwnClass)
    """Instead of `source`, a class of your own whose objects have __len__ and __getitem__ (docs/extending.md)."""
    split: str = "train"
    """Split of `source`, where it has splits."""
    resolution: int | None = None
    """Side of the square crops in pixels; null takes the model's, from its `preprocessing.json`, and with it `resize`."""
    resize: int | None = None
    """Scale each image's short side to this many pixels before cropping; null crops at the image's own pixels."""
    buckets: Literal["auto"] | list[str] | None = None
    """Aspect-ratio buckets, crops of several sizes, of which each image takes the nearest to its own ratio, scaled to cover it: a list of
    `WxH` in pixels, or `auto`: all multiples of `bucket_step` with at most resolution² pixels. Null: square crops."""
    bucket_step: int = 64
    """Sides of automatic buckets are multiples of this many pixels, itself one of the network's downsampling factor."""
    bucket_ratio: float = 2.0
    """Largest ratio of the long to the short side of automatic buckets."""
    resolutions: list[int] | None = None
    """Several sides of square crops, or of automatic buckets, instead of `resolution`: each image has rows of all of them, scaled to cover
    the crop."""
    filter: Literal["lanczos", "bicubic", "bilinear", "box"] | None = None
    """Resampling filter of a resize; null takes the model's, else lanczos."""
    crop: Literal["center", "random"] = "center"
    """Where crops are taken."""
    crops: int = 1
    """Random crops of each image, a row each."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Range of a random factor (log-uniform) on the image's size before a random crop; below 1 shows more of it, smaller."""
    image_column: str | None = None
    """Column of a table that holds the images; null: the only image column."""
    label_column: str | None = None
    """Column of a table that holds class labels; null: `label` where there is one."""
    columns: list[str] | None = None
    """Other columns of a table to carry along; null carries all that hold no images or raw bytes, `[]` none."""
    workers: int | None = None
    """Processes that decode images; null: none where one thread reads twice as fast as the encoder encodes, else by cores."""
    max_bad: int = 100
    """Unreadable images tolerated (their rows are left out and listed); one more ends the run."""

    def __post_init__(self) -> None:
        require(self.resolution is None or self.resolution >= 8, "resolution", self.resolution, "give at least 8 pixels, or null")
        require(self.resize is None or self.resize >= 8, "resize", self.resize, "give at least the resolution, or null")
        require(self.crops >= 1, "crops", self.crops, "give at least 1")
        require(self.crops == 1 or self.crop == "random", "crops", self.crops, "several crops of an image need data.crop=random")
        require(0 < self.zoom[0] <= self.zoom[1], "zoom", self.zoom, "give two factors above 0, the smaller first")
        require(self.zoom == (1.0, 1.0) or self.crop == "random", "zoom", self.zoom, "a random zoom needs data.crop=random")
        self._check_sizes()
        require(self.workers is None or self.workers >= 0, "workers", self.workers, "give 0 or more, or null")
        require(self.max_bad >= 0, "max_bad", self.max_bad, "give 0 or more")
        split = None if self.split == "train" else self.split
        check_own(self.own, source=self.source, split=split, image_column=self.image_column, label_column=self.label_column)

    @property
    def given(self) -> str | None:
        """What names the images, if anything does."""
        return self.own.class_path or self.source

    @property
    def covers(self) -> bool:
        """Whether images are scaled to cover crops of stated sizes."""
        return self.buckets is not None or self.resolutions is not None

    def _check_sizes(self) -> None:
        auto, listed = self.buckets == "auto", self.buckets if isinstance(self.buckets, list) else None
        sides, several = self.resolutions, self.resolutions is not None
        require(listed is None or len(listed) > 0, "buckets", listed, "give at least one WxH, or auto, or null")
        readable = all(_SIZE.fullmatch(text) and min(parsed_size(text)) >= 8 for text in listed or [])
        require(readable, "buckets", listed, "give WxH in pixels, such as 832x1216, both at least 8")
        distinct = len(set(listed or [])) == len(listed or [])
        require(distinct, "buckets", listed, "give each size once")
        require(listed is None or self.resolution is None, "resolution", self.resolution, "data.buckets lists the sizes; leave it out")
        require(listed is None or not several, "resolutions", sides, "data.buckets lists the sizes; leave it out")
        require(self.bucket_step >= 8, "bucket_step", self.bucket_step, "give at least 8 pixels")
        require(auto or self.bucket_step == 64, "bucket_step", self.bucket_step, "only data.buckets=auto has steps; leave it out")
        require(1 <= self.bucket_ratio < math.inf, "bucket_ratio", self.bucket_ratio, "give at least 1")
        require(auto or self.bucket_ratio == 2, "bucket_ratio", self.bucket_ratio, "only data.buckets=auto takes it; leave it out")
        require(sides is None or (len(sides) > 0 and min(sides) >= 8), "resolutions", sides, "give sides of at least 8 pixels, or null")
        require(sides is None or len(set(sides)) == len(sides), "resolutions", sides, "give each side once")
        require(not several or self.resolution is None, "resolution", self.resolution, "data.resolutions has them all; leave it out")
        why = "data.buckets and data.resolutions scale each image to cover its crop"
        require(not self.covers or self.resize is None, "resize", self.resize, f"{why}; leave it out")
        varied = self.crops == 1 or self.zoom[1] > 1
        require(not self.covers or varied, "crops", self.crops, f"{why}, so they would be much alike; give data.zoom=[1.0, 1.3]")
        require(not self.covers or self.zoom[0] >= 1, "zoom", self.zoom, f"{why}, and no smaller; give factors of at least 1")


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Encode a data set once: the posterior's moments of every crop, in shards that any trainer can read."""

    model: str
    """A run, a diffusers folder or a hub id."""
    out: str
    """Folder for the latents, on a disk or behind a URL (`s3://bucket/latents`); one that was left half done goes on, with the same
    settings."""
    staging: str | None = None
    """Folder on this machine's disk in which shards are made that go behind a URL; null: the system's for temporary files."""
    data: EncodeDataConfig = field(default_factory=EncodeDataConfig)
    """Images."""
    subfolder: str | None = None
    """Subfolder of `model` (such as `vae`)."""
    revision: str | None = None
    """Hub revision of `model`."""
    variant: str | None = None
    """Weight variant of `model` (such as `fp16`)."""
    moments: bool = True
    """Store the posterior's mean and log-variance; false stores the mean alone, at half the size."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """What is stored: fp16 is half the size, at a relative rounding of 5e-4."""
    mirrors: bool = False
    """Encode each crop mirrored too, as a row of its own after it."""
    shard_rows: int = 4096
    """Rows of a shard: what a killed run loses at most."""
    batch_size: int = 64
    """Crops that go through the network at once; part of the recipe, because it changes the last bits of convolutions."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision of the network; bf16 is quicker and rounds latents. `auto`: bf16 where the device is fast at it, else fp32."""
    seed: int = 0
    """Random crops are a function of this and of the row."""
    only: Literal["plan", "encode", "finalize"] | None = None
    """One stage: `plan` freezes what is to be done, `encode` makes shards of a plan, `finalize` writes the manifest; null: all of them."""
    append: bool = False
    """Add the images that the latents in `out` do not have yet, under the same recipe."""
    worker: int | None = None
    """Which of `workers` this process is, from 0; torchrun and accelerate tell it by themselves."""
    workers: int | None = None
    """Processes that encode this plan together, on one machine or many: shard s is worker s % workers's. Null: this one alone."""
    preflight: bool = False
    """Print rows, size and expected hours, and stop before anything is written."""

    def __post_init__(self) -> None:
        staged = self.staging is None or is_remote(self.out)
        require(staged, "staging", self.staging, "leave it out unless `out` is a URL: latents on a disk are made where they stay")
        require(self.shard_rows >= 1, "shard_rows", self.shard_rows, "give at least 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "give at least 1")
        require(self.workers is None or self.workers >= 1, "workers", self.workers, "give at least 1, or null")
        if self.workers is None:
            require(self.worker is None, "worker", self.worker, "give --workers too: how many there are")
        else:
            fits = self.worker is not None and 0 <= self.worker < self.workers
            require(fits, "worker", self.worker, f"with --workers {self.workers} give 0 to {self.workers - 1}, to each process another")
            alone = self.only in ("plan", "finalize")
            require(not alone, "workers", self.workers, f"one process does --only {self.only}; leave worker and workers out")
        require(not (self.append and self.only == "finalize"), "append", self.append, "--only finalize adds no images; leave it out")
        require(not (self.preflight and self.only), "preflight", self.preflight, "it stops before any stage; leave --only out")
        require(0 <= self.seed < 2**63, "seed", self.seed, "give an integer from 0 to 2**63 - 1")
