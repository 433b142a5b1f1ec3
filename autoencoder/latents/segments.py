"""A plan's images in a source: which of them it has, and by their numbers in the plan."""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow

from autoencoder.data.sources import Record, Source
from autoencoder.latents import listing
from autoencoder.latents.plan import Plan
from autoencoder.runtime.errors import UsageError


@dataclass(frozen=True)
class Found:
    """Which images of a plan a source has."""

    segments: Mapping[int, np.ndarray | None]
    """By segment that it has all images of, their indices in the source; None where they are all of the source in order."""
    added: np.ndarray
    """Indices in the source of images of no segment."""
    same: bool = False
    """Whether a segment is of a source of this name."""
    changed: Sequence[str] = ()
    """Names of images in the source that are not of the size that they were planned with."""
    lost: Sequence[str] = ()
    """Names of planned images that the source has no more."""
    listed: pyarrow.Table | None = field(default=None, repr=False)
    """The source's images by name, where that was needed and can be had."""


def find(source: Source, told: Mapping[str, object], plan: Plan, folder: Path) -> Found:
    """What `source`, told as a plan tells of it, has of `plan`: all that a segment has by its fingerprint, else by names and sizes.

    UsageError where the names are not there to be compared.
    """
    alike = [k for k, segment in enumerate(plan.segments) if (segment.source["fingerprint"], segment.images) == _key(source)]
    if alike:
        return Found(dict.fromkeys(alike), np.empty(0, np.int64), same=True)
    named = [k for k, segment in enumerate(plan.segments) if _who(segment.source) == _who(told)]
    if not isinstance(source, listing.Listed):
        return Found({}, np.arange(len(source)), same=bool(named))
    listed = source.listing()
    segments: dict[int, np.ndarray | None] = {}
    taken, changed, lost = np.zeros(len(source), bool), list[str](), list[str]()
    for k in range(len(plan.segments)):
        wanted = listing.read_listing(folder / listing.file_name(k))
        if wanted is None and k in named:
            remedy = "put it back, or encode to another folder: without it images that are there already would be added again"
            raise UsageError(f"{folder / listing.file_name(k)} cannot be read; {remedy}")
        if wanted is None:
            continue
        at, resized = listing.places(wanted, listed)
        whole = bool(((at >= 0) & ~resized).all())
        if whole:
            segments[k] = at
        if whole or k in named:
            taken[at[at >= 0]] = True
        if k in named:
            changed += _names(wanted, resized)
            lost += _names(wanted, at < 0)
    return Found(segments, np.flatnonzero(~taken), bool(named), changed, lost, listed)


class PlannedImages:
    """The images of a source by their number in the plan, with labels of the plan's table. Picklable, as sources are."""

    def __init__(self, source: Source, plan: Plan, found: Mapping[int, np.ndarray | None]) -> None:
        self.source = source
        self.name, self.labels, self.in_memory, self.fingerprint = source.name, plan.labels, source.in_memory, source.fingerprint
        self._length = plan.images
        order = sorted(found)
        self._firsts = [plan.segments[k].first_image for k in order]
        self._indices = [found[k] for k in order]
        self._renumbered: list[int] | None = None
        if source.labels is not None and plan.labels is not None and source.labels != plan.labels[: len(source.labels)]:
            numbers = {name: label for label, name in enumerate(plan.labels)}
            # A class that is not in the table yet is one of images that are not in the plan yet.
            self._renumbered = [numbers.get(name, len(plan.labels)) for name in source.labels]

    def __len__(self) -> int:
        return self._length

    def index(self, image: int) -> int:
        """The index in the source of an image of the plan."""
        place = bisect.bisect_right(self._firsts, image) - 1
        indices, local = self._indices[place], image - self._firsts[place]
        return local if indices is None else int(indices[local])

    def read(self, index: int) -> Record:
        record = self.source.read(self.index(index))
        if self._renumbered is None or record.label < 0:
            return record
        known = record.label < len(self._renumbered)
        # A label outside its own table must not become one of the plan's.
        label = self._renumbered[record.label] if known else max(record.label, len(self.labels or []))
        return Record(record.pixels, label, record.id, record.valid)


def _key(source: Source) -> tuple[str, int]:
    return source.fingerprint, len(source)


def _who(told: Mapping[str, object]) -> tuple[object, object]:
    return told["name"], told.get("own")


def _names(listed: pyarrow.Table, mask: np.ndarray) -> list[str]:
    return [name.decode(errors="replace") for name in listed["name"].filter(pyarrow.array(mask)).to_pylist()]
