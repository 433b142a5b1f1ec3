"""What is said before an encoding starts: rows, bytes, hours; and whether the disk has room for them."""

import math
import os
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path

from autoencoder.latents.buckets import Size, told
from autoencoder.latents.plan import Plan
from autoencoder.runtime.console import duration
from autoencoder.runtime.errors import ConfigError

SHOWN = 12
"""Class names that the plan shows."""
A_LINE = 6
"""Sizes of crops on a line."""
FILES_A_SHARD = 3


def announcement(plan: Plan, pending: list[int], *, seconds: float, workers: int, device: str) -> str:
    """The plan in lines, of which `pending` shards are to be done by so many `workers`, each in `seconds` a row."""
    todo = sum(plan.rows_in(n) for n in pending)
    all_bytes, todo_bytes = (sum(map(plan.bytes_of, shards)) for shards in (range(plan.shards), pending))
    contents = "mean and log-variance" if plan.recipe["moments"] else "mean"
    goes_on = f"; {plan.shards - len(pending)} of them are done" if len(pending) < plan.shards else ""
    names = plan.labels or []
    more = ", ..." if len(names) > SHOWN else ""
    classes = f"{len(names)}: {', '.join(names[:SHOWN])}{more}" if names else "no names (labels that are numbers stay as they are)"
    last = plan.segments[-1]
    before = f"{last.first_image:,} images and " if last.first_image else ""
    sources = f"{before}{last.images:,} images of {last.source['name']}"
    together, each = (f" for {workers} workers", " each") if workers > 1 else ("", "")
    return (
        f"plan: {plan.rows:,} rows ({sources} x {plan.views}) in {plan.shards} shards{goes_on}\n"
        f"{_latents(plan, contents)}\n"
        f"  size       {all_bytes / 2**20:,.1f} MiB, {todo_bytes / 2**20:,.1f} of them to be written\n"
        f"  classes    {classes}\n"
        f"  time       {duration(todo * seconds / workers)}{together} at {1 / seconds:.1f} rows/s{each}, measured\n"
        f"  device     {device}, precision {plan.recipe['precision']}"
    )


def pixels(plan: Plan, shards: Sequence[int]) -> float:
    """Pixels of a crop, on average over the rows of these shards."""
    rows = [plan.rows_in(n) for n in shards]
    return sum(count * math.prod(plan.size_of(n)) for count, n in zip(rows, shards, strict=True)) / sum(rows)


def thin(plan: Plan) -> str | None:
    """A note where sizes have fewer rows than a batch."""
    batch, rows = int(plan.recipe["batch_size"]), _rows_by_size(plan)
    few = [told(size) for size, count in rows.items() if count < batch]
    if len(rows) == 1 or not few:
        return None
    listed = f"{', '.join(few[:SHOWN])}{', ...' if len(few) > SHOWN else ''}"
    remedy = "a larger data.bucket_step or a smaller data.bucket_ratio, or fewer sizes in a list, make fewer and fuller ones"
    why = "trainers that take a batch from one size drop or repeat them"
    return f"note: {len(few)} of {len(rows)} sizes have fewer rows than a batch of {batch} ({listed}): {why}; {remedy}"


def _latents(plan: Plan, contents: str) -> str:
    """What the latents are like, of each size of crops where there are several."""
    kind, rows = f"{contents}, {plan.recipe['dtype']}", _rows_by_size(plan)
    if plan.sizes is None:
        c, h, w = plan.shapes[0]
        return f"  latents    {c} x {h} x {w}, {kind}, from crops of {plan.recipe['data']['resolution']} pixels"
    listed = [f"{told(size)}: {count:,}" for size, count in rows.items()]
    lines = ["   ".join(listed[first : first + A_LINE]) for first in range(0, len(listed), A_LINE)]
    channels = plan.shapes[0][0]
    return "\n             ".join([f"  latents    {channels} channels, {kind}, from crops of width x height: rows", *lines])


def _rows_by_size(plan: Plan) -> dict[Size, int]:
    """The rows of each size that has some."""
    rows: dict[Size, int] = {}
    for number in range(plan.shards):
        size = plan.size_of(number)
        rows[size] = rows.get(size, 0) + plan.rows_in(number)
    return rows


def check_room(folder: Path, plan: Plan, pending: list[int]) -> None:
    """ConfigError where the disk, or what this process may write, has no room for the pending shards."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    wanted = sum(map(plan.bytes_of, pending))
    free = shutil.disk_usage(existing).free
    if free < wanted:
        raise ConfigError(
            "out",
            str(folder),
            f"{wanted / 2**30:.1f} GiB are to be written, but the disk has {free / 2**30:.1f} GiB; "
            "give another disk, or moments=false or dtype=fp16 for half the size",
        )
    disk, files = os.statvfs(existing), FILES_A_SHARD * len(pending)
    # File systems without a table of files say 0 of it.
    if disk.f_files and disk.f_favail < files:
        remedy = f"{files:,} files are to be written, but the disk takes {disk.f_favail:,} more; give another disk, or a larger shard_rows"
        raise ConfigError("out", str(folder), remedy)
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    number = max(pending, key=plan.bytes_of, default=None)
    largest = 0 if number is None else plan.bytes_of(number)
    if limit != resource.RLIM_INFINITY and number is not None and limit < largest:
        fits = math.floor(limit / (largest // plan.rows_in(number)))
        remedy = (
            f"a shard has {largest:,} bytes, files may have {limit:,} (`ulimit -f`); allow more, or give shard_rows of {fits:,} at most"
        )
        raise ConfigError("shard_rows", plan.recipe["shard_rows"], remedy)
