"""Shards from crops: read, encoded, written, one after the other."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoencoder.data.batch import Batch
from autoencoder.data.workers import load as load_batches
from autoencoder.latents import shards
from autoencoder.latents.crops import CropBatches
from autoencoder.latents.network import Encoder
from autoencoder.latents.plan import Plan
from autoencoder.latents.progress import Progress
from autoencoder.latents.table import SideTable
from autoencoder.runtime.errors import UsageError


def encode_shards(
    folder: Path,
    plan: Plan,
    pending: list[int],
    crops: CropBatches,
    encoder: Encoder,
    table: SideTable,
    workers: int,
    pin: bool,
    *,
    rows: int,
    verb: str = "encoded",
) -> Iterator[dict[str, Any]]:
    """Commit the pending shards, one after the other; yields their records. `rows` are this process's, those that are done included."""
    batches = iter(load_batches(crops, range(len(crops)), workers, pin))
    todo = sum(len(plan.shard(n)) for n in pending)
    progress = Progress(rows, rows - todo, verb=verb)
    finished = False
    try:
        for shard in pending:
            parts = []
            for _ in plan.microbatches(shard):
                batch = next(batches)
                parts.append((_without_pixels(batch), encoder(batch)))
                progress.advance(len(batch.ids))
            yield shards.write(folder, plan, shard, _gather(parts, table, plan))
        finished = True
    finally:
        progress.close(finished)


def _without_pixels(batch: Batch) -> Batch:
    """What a shard needs of a batch, in memory of its own: a loader process's tensors each keep a file descriptor open."""
    empty = torch.empty(0)
    kept = {name: getattr(batch, name).clone() for name in ("labels", "position", "photo", "weight")}
    return replace(batch, pixels=empty, noise=empty, **kept)


def _gather(parts: list[tuple[Batch, dict[str, np.ndarray]]], table: SideTable, plan: Plan) -> shards.Encoded:
    """A shard of its microbatches, without the rows of bad images."""
    kept = np.concatenate([batch.weight.numpy() > 0 for batch, _ in parts])
    rows = np.concatenate([batch.position.numpy() for batch, _ in parts])
    labels = np.concatenate([batch.labels.numpy() for batch, _ in parts])
    images = np.concatenate([batch.photo.numpy() for batch, _ in parts])
    names = np.array([id for batch, _ in parts for id in batch.ids], dtype=object)
    tensors = {name: np.concatenate([moments[name] for _, moments in parts])[kept] for name in parts[0][1]}
    _check_labels(labels[kept], names[kept], plan)
    reasons = {id: reason for batch, _ in parts for id, reason in batch.bad}
    bad = [
        {"image": int(image), "name": names[lost[0]], "reason": reasons[names[lost[0]]], "rows": [int(rows[lost[0]]), int(rows[lost[-1]])]}
        for image in np.unique(images[~kept])
        for lost in [np.flatnonzero(images == image)]
    ]
    tensors |= {"label": labels[kept].astype(np.int64), "id": rows[kept].astype(np.int64)}
    return shards.Encoded(tensors, table.of(rows[kept], images[kept], list(names[kept])), bad)


def _check_labels(labels: np.ndarray, names: np.ndarray, plan: Plan) -> None:
    outside = labels < -1 if plan.labels is None else (labels < -1) | (labels >= len(plan.labels))
    if outside.any():
        image = int(np.argmax(outside))
        known = "labels are -1 (none) or more" if plan.labels is None else f"there are {len(plan.labels)} classes"
        key, whose = (plan.images_key, "its") if plan.own else ("data.label_column", "the source's")
        raise UsageError(f"{key}: image {names[image]} has label {labels[image]}, but {known}; mend {whose} labels")
