"""The manifest: the records of all shards in one file, written when the last shard is done."""

import functools
import json
from pathlib import Path
from typing import Any

from autoencoder.latents.commit import beside, writing
from autoencoder.latents.plan import Plan
from autoencoder.latents.reader import FORMAT, MANIFEST, VERSION, manifest_digest
from autoencoder.latents.shards import names
from autoencoder.latents.statistics import Moments
from autoencoder.runtime.errors import UsageError
from autoencoder.runtime.files import put


def finalize(folder: Path, plan: Plan, records: list[dict[str, Any]]) -> bool:
    """Write the manifest of all shards' records, in order; False where the very same one is there already. Several may do so at once.

    Raises UsageError where no row is left.
    """
    content = json.dumps(manifest(plan, records), indent=1)
    file = folder / MANIFEST
    if _holds(file, content):
        return False
    try:
        with writing(file):
            beside(file).write_text(content, encoding="utf-8")
            put(file, beside(file))
    except FileNotFoundError:
        # Who finalizes takes away what others have half written: then it has written the same.
        if not _holds(file, content):
            raise
    return True


def manifest(plan: Plan, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest's content, a function of plan and records; last its own digest."""
    rows = sum(record["rows"] for record in records)
    if not rows:
        remedy = "mend what its __getitem__ gives" if plan.own else "check that these are image files"
        raise UsageError(f"{plan.images_key}: none of the images of {plan.segments[-1].source['name']} can be read; {remedy}")
    moments = functools.reduce(Moments.merge, (Moments.from_json(record["moments"]) for record in records))
    held = [record["shape"] for record in records if record["rows"]]
    told: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "rows": rows,
        "shapes": [list(shape) for shape in dict.fromkeys(plan.shapes) if list(shape) in held],
        "dtype": plan.recipe["dtype"],
        "contents": ["mean", "logvar"] if plan.recipe["moments"] else ["mean"],
        "rows_per_image": plan.views,
        "labels": plan.labels,
        "statistics": moments.statistics(),
        "encoder_hash": plan.recipe["encoder_hash"],
        "decoder_hash": plan.decoder_hash,
        "recipe": plan.recipe,
        "recipe_hash": plan.recipe_hash,
        "rows_hash": plan.rows_hash,
        "segments": [segment.to_json() for segment in plan.segments],
        "bad": [bad for record in records for bad in record["bad"]],
        "shards": [_entry(record) for record in records],
    }
    return {**told, "sha256": manifest_digest(told)}


def _entry(record: dict[str, Any]) -> dict[str, Any]:
    latents, table, _ = names(record["shard"])
    told = {"file": latents, "rows": record["rows"], "shape": record["shape"], **record["files"][latents]}
    return {**told, "table": {"file": table, **record["files"][table]}}


def _holds(file: Path, content: str) -> bool:
    return file.is_file() and file.read_bytes() == content.encode()
