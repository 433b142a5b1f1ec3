"""What a start is to do in a folder: begin a plan, go on with it, append to it, or be refused."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from autoencoder.data.sources import Indexed, Source
from autoencoder.latents import assigned
from autoencoder.latents.assigned import Assigned
from autoencoder.latents.check import PLAN
from autoencoder.latents.folder import VAE, LatentsFolder
from autoencoder.latents.gaps import not_done
from autoencoder.latents.listing import Listed, file_name, fingerprint, index_name, write_listing
from autoencoder.latents.plan import Plan
from autoencoder.latents.segments import Found, find
from autoencoder.latents.setup import Setup
from autoencoder.runtime.errors import UsageError

NAMED = 3
"""Images that a message names."""


@dataclass(frozen=True)
class Agreement:
    """What a start is to do."""

    plan: Plan
    found: Mapping[int, np.ndarray | None]
    """Which segments of `plan` can be encoded from the source that was given, as `Found` has them."""
    files: Mapping[str, Callable[[Path], object]]
    """What is to be kept beside a plan that is not frozen yet, by the functions that write it."""
    notes: tuple[str, ...] = ()


def agree(folder: LatentsFolder, setup: Setup, seen: Plan | None, done: Container[int], *, append: bool) -> Agreement:
    """What to do where the frozen plan is `seen`, of which these shards are done.

    Raises UsageError, naming what differs, where that would give other rows, or rows that are there already.
    """
    if seen is None:
        if append:
            raise UsageError(f"{folder}: no latents to append to; leave --append out, or give the folder that has them as --out")
        return _begun(setup)
    try:
        return _going_on(folder, setup, seen, done, append=append)
    except UsageError:
        # A start that failed before its first shard has nothing to protect: its settings may be mended.
        # What an append planned only another append replaces.
        if not folder.alone or folder.begun(seen) or (len(seen.segments) > 1) != append:
            raise
    note = f"note: replaces what {folder}/{PLAN} had planned of {seen.segments[-1].source['name']}: no shard of it is done"
    instead = _going_on(folder, setup, seen.without_last(), done, append=True) if append else _begun(setup)
    return replace(instead, notes=(note, *instead.notes))


def _begun(setup: Setup) -> Agreement:
    plan = setup.base.plus(setup.told, setup.base.labels, setup.made_with, _assigned(setup, None))
    return Agreement(plan, {0: None}, _beside(setup.source, plan, setup.source.listing() if isinstance(setup.source, Listed) else None))


def _going_on(folder: LatentsFolder, setup: Setup, seen: Plan, done: Container[int], *, append: bool) -> Agreement:
    found = find(setup.source, setup.told, seen, folder.path)
    _check_recipe(folder, setup, seen, found, append=append)
    missing = [n for n in range(seen.shards) if n not in done]
    foreign = [n for n in missing if seen.segments.index(seen.segment_of(n)) not in found.segments]
    if foreign and (append or len(foreign) == len(missing)):
        raise UsageError(f"{folder}: {not_done(seen, foreign)}")
    notes = [*_taken_for(setup, seen, found), *_notes(folder, setup, seen, [n for n in missing if n not in foreign])]
    added = len(found.added)
    if missing and added:
        notes.append(f"note: {added:,} more images of {setup.source.name} are not planned yet; once these are done, --append adds them")
    if missing or not added:
        return Agreement(seen, found.segments, {}, tuple(notes))
    return _appended(setup, seen, found, notes)


def _appended(setup: Setup, seen: Plan, found: Found, notes: list[str]) -> Agreement:
    number, told, listed, places = len(seen.segments), setup.told, found.listed, None
    if len(found.added) < len(setup.source):
        assert listed is not None
        listed, places = listed.take(found.added), found.added
        told = {**told, "fingerprint": fingerprint(listed), "images": len(found.added)}
    plan = seen.plus(told, setup.base.labels, setup.made_with, _assigned(setup, places))
    return Agreement(plan, {**found.segments, number: places}, _beside(setup.source, plan, listed), tuple(notes))


def _assigned(setup: Setup, places: np.ndarray | None) -> Assigned | None:
    """Which buckets these images of the source are in, or all of them; None where there are no buckets to choose from."""
    plan, data = setup.base, setup.data
    if plan.sizes is None or not plan.bucketed:
        return None
    indices = range(len(setup.source)) if places is None else places
    return Assigned.of(setup.source, indices, plan.sizes, data.channels if data.bands is None else None)


def _check_recipe(folder: LatentsFolder, setup: Setup, seen: Plan, found: Found, *, append: bool) -> None:
    """UsageError where recipe, images or classes are not those of the plan, nor such as can be appended to it."""
    here, classes = str(folder), setup.base.labels
    differing = [f"{key}: {_short(old)} -> {_short(new)}" for key, old, new in seen.differences(setup.base)]
    remedy = f"give another --out, or the old values (all of them: {here}/{PLAN}); what may change: data.workers, data.max_bad"
    if not differing and append and found.changed:
        one = "image has" if len(found.changed) == 1 else "images have"
        raise UsageError(
            f"{here}: {len(found.changed)} {one} another size than when planned: {_some(found.changed)}; put the files back as they were, "
            "give those that have changed another name, or encode to another --out"
        )
    if not differing and append and found.same and not found.segments and not isinstance(setup.source, Listed):
        raise UsageError(
            f"{here}: {setup.source.name} has changed since it was planned, and its images have no names by which the added ones could be "
            "told from the others; give the added ones alone as a source of their own"
        )
    adds = append and len(found.added) > 0
    if not append and (not found.segments or len(found.added)):
        if not (differing or found.changed or found.lost) and (isinstance(setup.source, Listed) or not found.same):
            remedy = f"--append adds the {len(found.added):,} images that are not there yet; or {remedy}"
        old = next((s for s in reversed(seen.segments) if s.source["name"] == setup.source.name), seen.segments[-1]).source
        facts = [(key, old[key], setup.told[key]) for key in ("fingerprint", "images")]
        differing += [f"source.{key}: {was!r} -> {now!r}" for key, was, now in facts if was != now]
        differing += [f"source: {len(names):,} {what} ({_some(names)})" for names, what in _altered(found)]
    if (seen.labels is None) != (classes is None) if adds else not set(classes or []) <= set(seen.labels or []):
        differing.append(f"labels: {_short(seen.labels)} -> {_short(classes)}")
        if adds:
            remedy = (
                "images with class names go with images with class names, numbers or none with numbers or none; give such, or another --out"
            )
    if differing:
        listed = "\n  ".join(differing)
        raise UsageError(f"{here} holds latents of another plan:\n  {listed}\n{remedy}")


def _taken_for(setup: Setup, seen: Plan, found: Found) -> list[str]:
    """That images elsewhere have names and sizes of planned ones: moved or, of formats of fixed size, perhaps others."""
    here, planned = setup.source.name, [seen.segments[k].source["name"] for k in sorted(found.segments)]
    if not planned or here in planned:
        return []
    return [f"note: {here} has images with the names and sizes of {planned[0]} and is taken for it, moved; give others other names"]


def _altered(found: Found) -> list[tuple[Sequence[str], str]]:
    both = ((found.changed, "of another size"), (found.lost, "not there any more"))
    return [(names, what) for names, what in both if names]


def _notes(folder: LatentsFolder, setup: Setup, seen: Plan, todo: list[int]) -> list[str]:
    notes = []
    if seen.decoder_hash != setup.base.decoder_hash:
        notes.append(
            f"note: the autoencoder's decoder has changed since these latents were begun: decoder_hash {seen.decoder_hash} -> "
            f"{setup.base.decoder_hash}; {folder}/{VAE} keeps the first one"
        )
    changed: dict[str, Any] = {}
    for segment in {seen.segment_of(n).first_shard: seen.segment_of(n) for n in todo}.values():
        changed |= {k: f"{k}: {v} -> {setup.made_with.get(k)}" for k, v in segment.made_with.items() if setup.made_with.get(k) != v}
    if changed:
        notes.append(f"note: shards encoded from here on may differ in their last bits ({', '.join(changed.values())})")
    return notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _beside(source: Source, plan: Plan, listed: pyarrow.Table | None) -> dict[str, Callable[[Path], object]]:
    """What is to be kept of the plan's last segment."""
    files: dict[str, Callable[[Path], object]] = {}
    number, buckets = len(plan.segments) - 1, plan.assigned[-1]
    if listed is not None:
        files[file_name(number)] = partial(write_listing, listed)
    if isinstance(source, Indexed):
        files[index_name(number)] = source.write_index
    if buckets is not None:
        files[assigned.file_name(number)] = partial(Path.write_bytes, data=buckets.to_bytes())
    return files
