"""Shards from crops: read, encoded and written, each stage while the others work on what comes before and after."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoencoder.data.batch import Batch
from autoencoder.data.workers import load as load_batches
from autoencoder.data.workers import spare_cores
from autoencoder.latents import shards
from autoencoder.latents.crops import CropBatches
from autoencoder.latents.network import Encoder
from autoencoder.latents.place import HERE, Place
from autoencoder.latents.plan import Plan
from autoencoder.latents.progress import Progress, Stopwatch
from autoencoder.latents.table import SideTable
from autoencoder.runtime.errors import UsageError
from autoencoder.runtime.signals import StopRequest

MEASURED_SECONDS = 2.0
"""What the expected time is taken from lasts at least this long, or is a whole microbatch."""


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
    stop: StopRequest,
    place: Place = HERE,
) -> Iterator[dict[str, Any]]:
    """Commit the pending shards, one after the other; yields their records. `rows` are this process's, those that are done included.

    A shard is written, and sent where `place` is elsewhere, while the next one is encoded. What
    goes wrong in either ends both, once the shard that is being written is whole. Raises Stopped
    where a `stop` has come, likewise.
    """
    watch = Stopwatch("encoding")
    batches = watch.each("reading", load_batches(crops, range(len(crops)), workers, pin))
    todo = sum(plan.rows_in(n) for n in pending)
    progress = Progress(rows, rows - todo, verb=verb, watch=watch)
    finished = False
    try:
        with ThreadPoolExecutor(1, "writer") as writer, encoder.lanes.in_order(encoder, batches) as encoded:
            written: Future[dict[str, Any]] | None = None
            for shard in pending:
                parts = []
                for _ in plan.microbatches(shard):
                    stop.check()
                    batch, moments = next(encoded)
                    parts.append((_without_pixels(batch), moments))
                    progress.advance(len(batch.ids))
                    if written is not None and written.done():
                        yield written.result()
                        written = None
                whole = _gather(parts, table, plan)
                if written is not None:
                    with watch.stage("writing"):
                        record = written.result()
                    yield record
                written = writer.submit(shards.write, folder, plan, shard, whole, place)
            if written is not None:
                with watch.stage("writing"):
                    record = written.result()
                yield record
        finished = True
    finally:
        progress.close(finished)


@dataclass(frozen=True)
class Speed:
    """Seconds that a row takes."""

    reading: float
    """In one thread or process."""
    encoding: float
    """With all lanes busy."""
    shared: float
    """What whoever reads takes from those who encode: on a CPU they have the same cores."""

    @property
    def workers(self) -> int:
        """Processes for reading: none where this one can read twice as fast as it encodes."""
        return 0 if 2 * self.reading < self.encoding else spare_cores()

    def a_row(self, workers: int) -> float:
        """Of the whole; stages overlap."""
        return max(self.encoding + self.shared, self.reading / max(1, workers))


def measure(crops: CropBatches, encoder: Encoder) -> Speed:
    """The speed of the first rows, of as few as tell: they are encoded again. Nothing is written."""
    rows, count, lanes = crops.microbatches[0], 1, encoder.lanes
    while True:
        count = min(2 * count, len(rows))
        start = time.perf_counter()
        batch = crops.of(rows[:count])
        read = time.perf_counter()
        with lanes.in_order(encoder, [batch] * lanes.count) as encoded:
            for _ in encoded:
                pass
        end = time.perf_counter()
        if end - start > MEASURED_SECONDS or count == len(rows):
            break
    reading = (read - start) / count
    shared = reading / (lanes.count * lanes.threads) if encoder.on_cpu else 0.0
    return Speed(reading, (end - read) / (count * lanes.count), shared)


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
