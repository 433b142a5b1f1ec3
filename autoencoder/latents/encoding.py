"""From a configuration to a finished folder of latents: plan, encode, finalize."""

import sys
from collections.abc import Generator
from contextlib import closing
from typing import Any

from autoencoder.latents import shards
from autoencoder.latents.agreement import Agreement, agree
from autoencoder.latents.announcing import announcement, pixels, thin
from autoencoder.latents.check import MANIFEST, PLAN
from autoencoder.latents.config import EncodeConfig
from autoencoder.latents.crops import CropBatches
from autoencoder.latents.folder import LatentsFolder
from autoencoder.latents.gaps import not_done
from autoencoder.latents.manifest import finalize
from autoencoder.latents.microbatches import Microbatches
from autoencoder.latents.network import Encoder
from autoencoder.latents.pipeline import encode_shards, measure
from autoencoder.latents.plan import Plan
from autoencoder.latents.segments import PlannedImages
from autoencoder.latents.setup import Setup, set_up
from autoencoder.latents.table import SideTable
from autoencoder.latents.worker import Worker
from autoencoder.runtime.errors import UsageError
from autoencoder.runtime.signals import Stopped, StopRequest, exit_code

FINISHED = "finished already"

Records = dict[int, dict[str, Any]]


def encode_dataset(config: EncodeConfig, folder: LatentsFolder, worker: Worker) -> int:
    """Plan what is to be encoded, encode what has no record yet, write the manifest; or of these what `only` names. Returns the exit code,
    after a signal 128 and its number.

    Raises:
        UsageError: model, source or folder that cannot be used, another plan in the folder, too many unreadable images.
        TrainingError: latents that are not finite.
    """
    if config.only == "finalize":
        plan = _planned(folder)
        return _finish(config, folder, plan, shards.read_records(folder.path, plan, folder.place), FINISHED)
    work, records = _plan(config, folder, worker)
    if config.preflight:
        return 0
    work.setup.keep_model(folder, work.plan)
    if config.only == "plan":
        print(f"{folder}: {work.plan.shards} shards are planned, {len(work.pending)} of them are to be encoded")
        return 0
    nothing, begun = "nothing to append" if config.append and not work.pending else FINISHED, len(records)
    bad = _unreadable(records)
    try:
        # Closed here, so that no shard is being written any more when the folder is let go.
        with StopRequest() as stop, closing(work.encode(folder, stop)) as encoded:
            for record in encoded:
                records[record["shard"]] = record
                bad |= _unreadable({record["shard"]: record})
                _tolerate(bad, config.data.max_bad, work.plan)
    except Stopped as stopped:
        print(worker.says(f"{folder}: stopped ({stopped.name}); the same command goes on"), file=sys.stderr)
        return exit_code(stopped.name)
    folder.refresh()
    if config.only == "encode" or worker.shared:
        records = shards.read_records(folder.path, work.plan, folder.place)
        left = work.plan.shards - len(records)
        if left or config.only == "encode":
            last = "--only finalize" if config.only == "encode" else "the worker that finds all of them done"
            print(worker.says(f"{folder}: its shards are done, {left} of all {work.plan.shards} are not; {last} writes the manifest"))
            return 0
    return _finish(config, folder, work.plan, records, nothing if begun == work.plan.shards else None)


def _plan(config: EncodeConfig, folder: LatentsFolder, worker: Worker) -> tuple["_Work", Records]:
    """What is to be done, announced and frozen; and the records of what is done."""
    seen = _planned(folder) if config.only == "encode" else folder.plan()
    setup = set_up(config, worker, seen, folder.path)
    said = False
    while True:
        records = {} if seen is None else shards.read_records(folder.path, seen, folder.place)
        agreed = agree(folder, setup, seen, records, append=config.append)
        work = _Work(config, setup, agreed, records, worker)
        if config.only == "encode" and agreed.plan != seen:
            raise UsageError(f"{folder}: these images are not in its plan; run the same with --only plan first, or without --only")
        if not said:
            work.announce(folder)
            said = True
        if config.preflight or agreed.plan == seen or folder.freeze(agreed.plan, seen, agreed.files):
            return work, records
        # Another worker was quicker: it may have planned the same.
        seen = folder.plan()


class _Work:
    """What one process is to encode."""

    def __init__(self, config: EncodeConfig, setup: Setup, agreed: Agreement, records: Records, worker: Worker) -> None:
        self.setup, self.plan = setup, agreed.plan
        self._config, self._notes, self._worker = config, agreed.notes, worker
        planned = PlannedImages(setup.source, agreed.plan, agreed.found)
        self._table = SideTable(planned, config.data.columns, agreed.plan)
        self.pending = [n for n in range(self.plan.shards) if n not in records]
        here = [n for k in sorted(agreed.found) for n in self.plan.segments[k].numbers]
        self._mine = [n for n in here if n not in records and worker.owns(n)]
        if self._mine:
            self._crops = CropBatches(planned, self.plan, setup.data, Microbatches(self.plan, self._mine))
            self._encoder = Encoder(setup.vae, self.plan, setup.device)
            self._speed = measure(self._crops, self._encoder)
            given = config.data.workers
            self._readers = given if given is not None else 0 if setup.source.in_memory else self._speed.workers

    def announce(self, folder: LatentsFolder) -> None:
        """Say how it goes on and, of several workers the first, what is to be done; ConfigError where the disk has no room for it."""
        few = thin(self.plan) if self._mine and self._worker.first else None
        for note in (*folder.notes, *self._notes, *([few] if few else [])):
            print(self._worker.says(note), file=sys.stderr)
        if self._mine and self._worker.first:
            # Measured on rows of the first of its shards; others may have larger crops or smaller ones.
            seconds = self._speed.a_row(self._readers) * pixels(self.plan, self.pending) / pixels(self.plan, self._mine[:1])
            told = announcement(self.plan, self.pending, seconds=seconds, workers=self._worker.of, device=self.setup.made_with["device"])
            print(told + folder.where(self.plan, self._mine))
        folder.check_room(self.plan, self.pending)
        if self._config.preflight and not self.pending:
            print(f"{folder}: all {self.plan.shards} shards are done")

    def encode(self, folder: LatentsFolder, stop: StopRequest) -> Generator[dict[str, Any]]:
        """Commit its shards, one after the other; yields their records."""
        if not self._mine:
            return
        pin, plan = self.setup.device.type == "cuda", self.plan
        rows, verb = sum(plan.rows_in(n) for n in range(plan.shards) if self._worker.owns(n)), self._worker.says("encoded")
        stages = (self._crops, self._encoder, self._table, self._readers, pin)
        yield from encode_shards(folder.path, plan, self._mine, *stages, rows=rows, verb=verb, stop=stop, place=folder.place)


def _planned(folder: LatentsFolder) -> Plan:
    plan = folder.plan()
    if plan is None:
        raise UsageError(f"{folder}: no {PLAN} in it; run the same with --only plan first, or without --only")
    return plan


def _finish(config: EncodeConfig, folder: LatentsFolder, plan: Plan, records: Records, nothing: str | None) -> int:
    """Write the manifest, if there is none or another; UsageError where shards are not done. `nothing` is what to say of a start that had
    nothing to do, None of one that had."""
    missing = [n for n in range(plan.shards) if n not in records]
    if missing:
        raise UsageError(f"{folder}: {not_done(plan, missing)}")
    bad = _unreadable(records)
    _tolerate(bad, config.data.max_bad, plan)
    ordered = [records[n] for n in range(plan.shards)]
    with folder.planning():
        # A manifest of the plan before the append would lose the rows that have come since.
        if folder.plan() != plan:
            print(f"{folder}: images were appended to its plan meanwhile; who encodes them writes the manifest")
            return 0
        written = finalize(folder.path, plan, ordered)
        if written:
            folder.place.keep(folder.path / MANIFEST)
    folder.tidy()
    if bad:
        print(f"{len(bad)} of {plan.images:,} images could not be read; their rows are left out and listed in the manifest (`bad`)")
    rows = sum(record["rows"] for record in ordered)
    idle = nothing is not None and not written
    done = f"{nothing} ({rows:,} rows); nothing to do" if idle else f"{rows:,} rows in {plan.shards} shards, written"
    print(f"{folder}: {done}")
    return 0


def _unreadable(records: Records) -> dict[int, str]:
    """Names and reasons of unreadable images, by their numbers."""
    return {bad["image"]: f"{bad['name']} ({bad['reason']})" for record in records.values() for bad in record["bad"]}


def _tolerate(bad: dict[int, str], most: int, plan: Plan) -> None:
    if len(bad) > most:
        raise UsageError(
            f"{plan.images_key}: {plan.segments[-1].source['name']}: {len(bad)} images cannot be read, data.max_bad is {most}: "
            f"{'; '.join(list(bad.values())[:3])}; mend them, or give a larger --data.max_bad to go on without them"
        )
