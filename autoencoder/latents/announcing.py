"""What is said before an encoding starts: rows, bytes, hours; and whether the disk has room for them."""

import math
import os
import resource
import shutil
from pathlib import Path

from autoencoder.latents.plan import Plan
from autoencoder.runtime.console import duration
from autoencoder.runtime.errors import ConfigError

SHOWN = 12
"""Class names that the plan shows."""
FILES_A_SHARD = 3


def announcement(plan: Plan, pending: list[int], *, seconds: float, workers: int, device: str) -> str:
    """The plan in lines, of which `pending` shards are to be done by so many `workers`, each in `seconds` a row."""
    todo = sum(len(plan.shard(n)) for n in pending)
    contents = "mean and log-variance" if plan.recipe["moments"] else "mean"
    goes_on = f"; {plan.shards - len(pending)} of them are done" if len(pending) < plan.shards else ""
    names = plan.labels or []
    more = ", ..." if len(names) > SHOWN else ""
    classes = f"{len(names)}: {', '.join(names[:SHOWN])}{more}" if names else "no names (labels that are numbers stay as they are)"
    c, h, w = plan.shape
    last = plan.segments[-1]
    before = f"{last.first_image:,} images and " if last.first_image else ""
    sources = f"{before}{last.images:,} images of {last.source['name']}"
    together, each = (f" for {workers} workers", " each") if workers > 1 else ("", "")
    return (
        f"plan: {plan.rows:,} rows ({sources} x {plan.views}) in {plan.shards} shards{goes_on}\n"
        f"  latents    {c} x {h} x {w}, {contents}, {plan.recipe['dtype']}, from crops of {plan.recipe['data']['resolution']} pixels\n"
        f"  size       {plan.rows * plan.row_bytes / 2**20:,.1f} MiB, {todo * plan.row_bytes / 2**20:,.1f} of them to be written\n"
        f"  classes    {classes}\n"
        f"  time       {duration(todo * seconds / workers)}{together} at {1 / seconds:.1f} rows/s{each}, measured\n"
        f"  device     {device}, precision {plan.recipe['precision']}"
    )


def check_room(folder: Path, plan: Plan, pending: list[int]) -> None:
    """ConfigError where the disk, or what this process may write, has no room for the pending shards."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    wanted = sum(len(plan.shard(n)) for n in pending) * plan.row_bytes
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
    largest = max((len(plan.shard(n)) for n in pending), default=0) * plan.row_bytes
    if limit != resource.RLIM_INFINITY and limit < largest:
        fits = math.floor(limit / plan.row_bytes)
        remedy = (
            f"a shard has {largest:,} bytes, files may have {limit:,} (`ulimit -f`); allow more, or give shard_rows of {fits:,} at most"
        )
        raise ConfigError("shard_rows", plan.recipe["shard_rows"], remedy)
