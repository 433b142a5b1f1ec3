"""From a configuration to a finished folder of latents."""

import shutil
import sys
from typing import Any

from autoencoder.latents import shards
from autoencoder.latents.config import EncodeConfig
from autoencoder.latents.crops import CropBatches
from autoencoder.latents.folder import LatentsFolder
from autoencoder.latents.manifest import finalize
from autoencoder.latents.network import Encoder
from autoencoder.latents.pipeline import encode_shards, measure
from autoencoder.latents.plan import Plan
from autoencoder.latents.setup import Setup, set_up
from autoencoder.latents.table import SideTable
from autoencoder.runtime.console import duration
from autoencoder.runtime.device import describe
from autoencoder.runtime.errors import ConfigError, UsageError

SHOWN = 12
"""Class names that the plan shows."""


def encode_dataset(config: EncodeConfig, folder: LatentsFolder) -> int:
    """Encode what has no record yet and write the manifest; returns the exit code.

    Raises:
        UsageError: model, source or folder that cannot be used, another plan in the folder, too many unreadable images.
        TrainingError: latents that are not finite.
    """
    setup = set_up(config)
    table = SideTable(setup.source, config.data.columns, setup.plan)
    plan = folder.agree(setup.plan)
    for note in folder.notes:
        print(note, file=sys.stderr)
    records = {n: r for n in range(plan.shards) if (r := shards.read_record(folder.path, plan, n)) is not None}
    pending = [n for n in range(plan.shards) if n not in records]
    if pending:
        crops = CropBatches(setup.source, plan, setup.data, [rows for n in pending for rows in plan.microbatches(n)])
        encoder = Encoder(setup.vae, plan, setup.device)
        speed = measure(crops, encoder)
        workers = config.data.workers if config.data.workers is not None else 0 if setup.source.in_memory else speed.workers
        _announce(folder, plan, setup, pending, speed.a_row(workers))
    if config.preflight:
        if not pending:
            print(f"{folder.path}: all {plan.shards} shards are done")
        return 0
    if len(pending) == plan.shards:
        folder.freeze(plan)
    setup.keep_model(folder.path)
    if pending:
        for record in encode_shards(folder.path, plan, pending, crops, encoder, table, workers, setup.device.type == "cuda"):
            records[record["shard"]] = record
            _tolerate(records, config.data.max_bad, plan)
    ordered = [records[n] for n in range(plan.shards)]
    written = finalize(folder.path, plan, ordered)
    bad = len({bad["image"] for record in ordered for bad in record["bad"]})
    if bad:
        print(f"{bad} of {plan.source['images']:,} images could not be read; their rows are left out and listed in the manifest (`bad`)")
    rows = sum(record["rows"] for record in ordered)
    print(
        f"{folder.path}: {rows:,} rows in {plan.shards} shards, written"
        if written
        else f"{folder.path}: finished already ({rows:,} rows); nothing to do"
    )
    return 0


def _tolerate(records: dict[int, dict[str, Any]], most: int, plan: Plan) -> None:
    bad = {bad["image"]: f"{bad['name']} ({bad['reason']})" for record in records.values() for bad in record["bad"]}
    if len(bad) > most:
        raise UsageError(
            f"{plan.images_key}: {plan.source['name']}: {len(bad)} images cannot be read, data.max_bad is {most}: "
            f"{'; '.join(list(bad.values())[:3])}; mend them, or give a larger --data.max_bad to go on without them"
        )


def _announce(folder: LatentsFolder, plan: Plan, setup: Setup, pending: list[int], seconds_a_row: float) -> None:
    """Say what is to be done; ConfigError where the disk has no room for it."""
    todo = sum(len(plan.shard(n)) for n in pending)
    contents = "mean and log-variance" if plan.recipe["moments"] else "mean"
    goes_on = f"; {plan.shards - len(pending)} of them are done" if len(pending) < plan.shards else ""
    names = plan.labels or []
    more = ", ..." if len(names) > SHOWN else ""
    classes = f"{len(names)}: {', '.join(names[:SHOWN])}{more}" if names else "no names (labels that are numbers stay as they are)"
    c, h, w = plan.shape
    images = f"{plan.source['images']:,} images of {plan.source['name']} x {plan.views}"
    print(
        f"plan: {plan.rows:,} rows ({images}) in {plan.shards} shards{goes_on}\n"
        f"  latents    {c} x {h} x {w}, {contents}, {plan.recipe['dtype']}, from crops of {plan.recipe['data']['resolution']} pixels\n"
        f"  size       {plan.rows * plan.row_bytes / 2**20:,.1f} MiB, {todo * plan.row_bytes / 2**20:,.1f} of them to be written\n"
        f"  classes    {classes}\n"
        f"  time       {duration(todo * seconds_a_row)} at {1 / seconds_a_row:.1f} rows/s, measured\n"
        f"  device     {describe(setup.device)}, precision {plan.recipe['precision']}"
    )
    existing = next(p for p in (folder.path.absolute(), *folder.path.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < todo * plan.row_bytes:
        raise ConfigError(
            "out",
            str(folder.path),
            f"{todo * plan.row_bytes / 2**30:.1f} GiB are to be written, but the disk has {free / 2**30:.1f} GiB; "
            "give another disk, or moments=false or dtype=fp16 for half the size",
        )
