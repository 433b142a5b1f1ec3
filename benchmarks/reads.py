"""How quickly rows of latents are read: sorted batches from a warm page cache, beside the same rows of arrays in memory and beside a
safetensors file opened anew for each row; and how long a folder of many shards takes to open.

Writes benchmarks/results/reads-<device>.json: milliseconds a batch (median and quartiles), their ratios, and seconds to open. All of it is
processor time of user and system, on one thread with the files in the page cache: wall time would tell of whatever else the machine does.
The ways take turns, batch by batch. Arrays in memory are read twice: as `array[rows]`, and into memory that is there already.
"""

import json
import os
import pickle
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import frame
import numpy as np

SHAPE = (4, 32, 32)
"""Of a mean and a log-variance in fp32: 32 KiB together."""
LAYOUTS = {"shards of 4096 rows": 4096, "shards of 8 rows": 8}


def write_latents(folder: Path, mean: np.ndarray, logvar: np.ndarray, shard_rows: int) -> None:
    """A folder as `encode_dataset` would leave it, of these rows."""
    from safetensors.numpy import save_file

    from autoencoder.latents.reader import FORMAT, MANIFEST, VERSION, manifest_digest

    folder.mkdir()
    entries = []
    for number, first in enumerate(range(0, len(mean), shard_rows)):
        file, rows = folder / f"data-{number:05d}.safetensors", slice(first, first + shard_rows)
        ids = np.arange(len(mean))[rows]
        save_file({"mean": mean[rows], "logvar": logvar[rows], "label": np.full(len(ids), -1), "id": ids}, file)
        entries.append({"file": file.name, "rows": len(ids), "shape": SHAPE, "bytes": file.stat().st_size, "sha256": "0" * 64})
    manifest = {
        "format": FORMAT, "version": VERSION, "rows": len(mean), "shapes": [SHAPE], "contents": ["mean", "logvar"], "rows_per_image": 1,
        "labels": None, "statistics": {"mean": [0.0] * SHAPE[0], "std": [1.0] * SHAPE[0]}, "shards": entries,
    }  # fmt: skip
    manifest = json.loads(json.dumps(manifest))
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))


def reopened(folder: Path, rows: np.ndarray, shard_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows by a safetensors file opened anew for each."""
    from safetensors import safe_open

    mean, logvar = np.empty((len(rows), *SHAPE), np.float32), np.empty((len(rows), *SHAPE), np.float32)
    for place, row in enumerate(rows.tolist()):
        shard, local = divmod(row, shard_rows)
        with safe_open(folder / f"data-{shard:05d}.safetensors", framework="numpy") as file:
            mean[place], logvar[place] = (file.get_slice(name)[local : local + 1][0] for name in ("mean", "logvar"))
    return mean, logvar


def seconds(call: Callable[..., Any], *arguments: Any) -> float:
    begun = time.process_time()
    call(*arguments)
    return time.process_time() - begun


def told(times: list[float]) -> dict[str, Any]:
    """Milliseconds."""
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median_ms": round(1e3 * middle, 3), "quartiles_ms": [round(1e3 * low, 3), round(1e3 * high, 3)]}


def measure(folder: Path, mean: np.ndarray, logvar: np.ndarray, shard_rows: int, batch: int, batches: int) -> dict[str, Any]:
    """Open the folder and read random sorted batches of it in the three ways."""
    from autoencoder.latents.reader import Latents

    rng, before = np.random.default_rng(0), len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    held: list[Latents] = []
    opening = seconds(lambda: held.append(Latents(folder)))
    again = seconds(lambda: pickle.loads(pickle.dumps(held[0])))
    checking = seconds(lambda: held[0].check())
    latents = held[0]
    ours: list[float] = []
    memory: list[float] = []
    kept: list[float] = []
    naive: list[float] = []
    room = np.zeros((2, batch, *SHAPE), np.float32)
    for number in range(batches):
        rows = np.sort(rng.choice(len(mean), batch, replace=False))
        memory.append(seconds(lambda rows: (mean[rows], logvar[rows]), rows))
        kept.append(seconds(lambda rows: (mean.take(rows, 0, room[0], "clip"), logvar.take(rows, 0, room[1], "clip")), rows))
        ours.append(seconds(latents.gather, rows))
        if number % 10 == 0:
            naive.append(seconds(reopened, folder, rows, shard_rows))
    got, expected = latents.gather(rows), reopened(folder, rows, shard_rows)
    if got.logvar is None or not (np.array_equal(got.mean, expected[0]) and np.array_equal(got.logvar, expected[1])):
        raise SystemExit("the ways read different rows")
    middle = {name: statistics.median(times) for name, times in (("ours", ours), ("memory", memory), ("kept", kept), ("naive", naive))}
    return {
        "rows": len(mean),
        "shards": len(latents.manifest["shards"]),
        "opening_seconds": round(opening, 3),
        "opening_in_a_loader_process_seconds": round(again, 3),
        "opening_every_shard_seconds": round(checking, 3),
        "files_left_open": len(os.listdir("/proc/self/fd")) - before if before else None,
        "ours": told(ours),
        "first_20_batches_ms": round(1e3 * statistics.mean(ours[:20]), 3),
        "in_memory": told(memory),
        "in_memory_into_kept_memory": told(kept),
        "reopened_for_each_row": told(naive),
        "times_in_memory_into_kept_memory": round(middle["ours"] / middle["kept"], 2),
        "times_in_memory": round(middle["ours"] / middle["memory"], 2),
        "times_faster_than_reopening": round(middle["naive"] / middle["ours"], 1),
    }


def main() -> None:
    """Measure and write the result."""
    parser = frame.parser(__doc__)
    parser.add_argument("--rows", type=int, default=40_000, help="rows of 32 KiB, on disk and in memory")
    parser.add_argument("--batch", type=int, default=256, help="rows of a batch")
    parser.add_argument("--batches", type=int, default=300, help="batches of each layout")
    options = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    device = frame.device_name(one_thread=True)
    file = frame.result_file("reads", device)
    result = {**frame.made_with(device), "batch": options.batch, "row_bytes": 2 * 4 * int(np.prod(SHAPE)), "layouts": {}}
    rng = np.random.default_rng(1)
    mean, logvar = (rng.standard_normal((options.rows, *SHAPE), dtype=np.float32) for _ in range(2))
    with tempfile.TemporaryDirectory() as scratch:
        for name, shard_rows in LAYOUTS.items():
            folder = Path(scratch) / "latents"
            write_latents(folder, mean, logvar, shard_rows)
            result["layouts"][name] = measure(folder, mean, logvar, shard_rows, options.batch, options.batches)
            print(name, json.dumps(result["layouts"][name]), flush=True)
            shutil.rmtree(folder)
    frame.write(file, result)
    frame.say_written(file)


if __name__ == "__main__":
    main()
