"""`encode_dataset` against its encoder alone: rows a second from JPEG files to shards on the disk, and peak memory over the number of rows.

JPEGs with a short side of 288 pixels are made of `--photos` (a folder; else of the demo's). In each round, one after the other, the same
microbatches go through the encoder alone, with tensors in memory: `plain` is PyTorch as it comes, in a process of its own; `encoder` is
what the command uses (lanes, kept memory), in this one. Then `pipeline` reads, encodes and writes them, and `reading` reads them. Ratios
are medians over rounds: of wall-clock, and of CPU seconds, which other load changes less. `--memory` instead runs the command on 10,000
and 1,000,000 rows of 8 x 8 pixels. Writes benchmarks/results/encoding-<device>.json.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import frame
import numpy as np

SHORT_SIDE, QUALITY = 288, 90
PRESETS = {"tiny": (64, 64, 4096, 1024), "kl-f8": (256, 1, 2, 1)}
"""Side of the crops, microbatch, rows of a round and of a shard."""
MEMORY_ROWS = (10_000, 1_000_000)


class Noise:
    """Images of 8 x 8 random pixels, as `data.own` takes them."""

    in_memory = True

    def __init__(self, images: int) -> None:
        self._images = images
        self._pixels = np.random.default_rng(0).integers(0, 256, (256, 8, 8, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return self._images

    def __getitem__(self, index: int) -> np.ndarray:
        pixels: np.ndarray = self._pixels[index % len(self._pixels)]
        return pixels


def make_photos(source: str, folder: Path, count: int) -> None:
    """JPEG files of the first `count` photos of `source`; of fewer, square crops of them in turn."""
    from PIL import Image

    from autoencoder.config import DataConfig
    from autoencoder.data.sources import open_images
    from autoencoder.data.transforms import train_crop
    from autoencoder.runtime.rng import generator

    config = DataConfig(source=source, resolution=SHORT_SIDE, resize=2 * SHORT_SIDE if source == "demo" else SHORT_SIDE, flip=False)
    images = open_images(config, split="train")
    folder.mkdir()
    for number in range(count):
        pixels = images.read(number % len(images)).pixels
        if number < len(images) and source != "demo":
            height, width = pixels.shape[:2]
            scale = SHORT_SIDE / min(height, width)
            photo = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
        else:
            photo = Image.fromarray(train_crop(pixels, config, generator(0, "photos", number))[0])
        photo.save(folder / f"{number:05d}.jpg", quality=QUALITY)


def save_network(preset: Any, folder: Path, side: int, **shape: Any) -> None:
    """A network with random weights: what they are costs no time."""
    import torch

    from autoencoder import artifact
    from autoencoder.config import DataConfig, ModelConfig
    from autoencoder.model import build

    torch.manual_seed(0)
    vae = build(ModelConfig(preset=preset, **shape), channels=3, resolution=side)
    artifact.save_autoencoder(vae, folder, preprocessing=artifact.preprocessing(DataConfig(resolution=side), 256), likelihood=None)


class Encoding:
    """One preset's microbatches, by each of the ways that are compared."""

    def __init__(self, scratch: Path, preset: str, resize: int | None) -> None:
        from autoencoder.latents.config import EncodeConfig, EncodeDataConfig
        from autoencoder.latents.crops import CropBatches
        from autoencoder.latents.network import Encoder
        from autoencoder.latents.pipeline import measure
        from autoencoder.latents.segments import PlannedImages
        from autoencoder.latents.setup import set_up
        from autoencoder.latents.table import SideTable
        from autoencoder.latents.worker import Worker

        side, batch_size, self.rows, shard_rows = PRESETS[preset]
        data = EncodeDataConfig(source=str(scratch / "photos"), resolution=side, resize=resize)
        config = EncodeConfig(model=str(scratch / preset), out="", data=data, batch_size=batch_size, shard_rows=shard_rows)
        setup = set_up(config, Worker(), None, scratch)
        self.plan, self._shards = setup.base.plus(setup.told, setup.base.labels, setup.made_with), list(range(self.rows // shard_rows))
        ranges = [rows for shard in self._shards for rows in self.plan.microbatches(shard)]
        planned = PlannedImages(setup.source, self.plan, {0: None})
        self._crops, self._encoder = CropBatches(planned, self.plan, setup.data, ranges), Encoder(setup.vae, self.plan, setup.device)
        self._batches = [self._crops[number] for number in range(len(ranges))]
        self._table, self._cuda = SideTable(planned, None, self.plan), setup.device.type == "cuda"
        self.workers = measure(self._crops, self._encoder).workers

    def plain(self) -> None:
        """The encoder on one microbatch after the other."""
        for batch in self._batches:
            self._encoder(batch)

    def encoder(self) -> None:
        """The encoder on microbatches in memory."""
        with self._encoder.lanes.in_order(self._encoder, self._batches) as encoded:
            for _ in encoded:
                pass

    def pipeline(self) -> None:
        """From files to shards on the disk."""
        from autoencoder.latents.pipeline import encode_shards
        from autoencoder.runtime.signals import StopRequest

        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            for _ in encode_shards(
                Path(folder), self.plan, self._shards, self._crops, self._encoder, self._table, self.workers, self._cuda,
                rows=self.rows, stop=StopRequest(),
            ):  # fmt: skip
                pass

    def reading(self) -> None:
        """Files to microbatches."""
        for number in range(len(self._crops)):
            self._crops[number]


def timed(body: Callable[[], None]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of this process and its children."""
    wall, cpu = time.perf_counter(), os.times()
    body()
    now = os.times()
    return time.perf_counter() - wall, sum(now[:4]) - sum(cpu[:4])


def serve(scratch: Path, preset: str, resize: int | None, line: Connection) -> None:
    """A process that times `plain` each time it is asked."""
    encoding = Encoding(scratch, preset, resize)
    encoding.plain()
    line.send(None)
    while line.recv():
        line.send(timed(encoding.plain))


def compare(scratch: Path, preset: str, resize: int | None, rounds: int) -> dict[str, Any]:
    """Figures of one preset."""
    context = multiprocessing.get_context("spawn")
    line, theirs = context.Pipe()
    process = context.Process(target=serve, args=(scratch, preset, resize, theirs), daemon=True)
    process.start()
    line.recv()
    from autoencoder.runtime.memory import keep_freed

    keep_freed()
    encoding = Encoding(scratch, preset, resize)
    encoding.encoder()
    seconds: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        line.send(True)
        seconds.setdefault("plain", []).append(line.recv())
        for name in ("encoder", "pipeline", "reading"):
            seconds.setdefault(name, []).append(timed(getattr(encoding, name)))
        print(preset, resize, {name: [round(s, 2) for s in found[-1]] for name, found in seconds.items()}, flush=True)
    line.send(False)
    process.join()

    def ratio(name: str, unit: int) -> float:
        pairs = zip(seconds[name], seconds["pipeline"], strict=True)
        return round(statistics.median(alone[unit] / whole[unit] for alone, whole in pairs), 3)

    return {
        "rounds": rounds,
        "rows": encoding.rows,
        "batch_size": PRESETS[preset][1],
        "workers": encoding.workers,
        "rows_per_second": {n: round(encoding.rows / statistics.median(s[0] for s in found), 2) for n, found in seconds.items()},
        "cpu_ms_a_row": {n: round(1000 * statistics.median(s[1] for s in found) / encoding.rows, 2) for n, found in seconds.items()},
        "pipeline_to_plain": {"wall": ratio("plain", 0), "cpu": ratio("plain", 1)},
        "pipeline_to_encoder": {"wall": ratio("encoder", 0), "cpu": ratio("encoder", 1)},
    }


def peak_mib(scratch: Path, rows: int) -> float:
    """Peak resident memory of the command on this many rows."""
    out = scratch / f"{rows}"
    told = [f"--model={scratch / 'micro'}", "--data.own=encoding.Noise", f"--data.own.init_args.images={rows}", f"--out={out}"]
    paths = os.pathsep.join([str(frame.ROOT), str(frame.ROOT / "benchmarks")])
    command = [sys.executable, str(frame.ROOT / "scripts" / "encode_dataset.py"), *told]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return round(usage.ru_maxrss / 1024, 1)


def main() -> None:
    """Measure and write the result."""
    parser = frame.parser(__doc__)
    parser.add_argument("--photos", default="demo", help="folder of photos (demo)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=PRESETS, help="one preset")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--memory_rows", type=int, nargs="*", default=MEMORY_ROWS)
    options: argparse.Namespace = parser.parse_args()

    device = frame.device_name()
    file = frame.result_file("encoding", device)
    result: dict[str, Any] = {**(json.loads(file.read_text()) if file.exists() else {}), **frame.made_with(device)}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if options.memory:
            save_network("tiny", scratch / "micro", 8, block_out_channels=(8, 8), norm_groups=4)
            result["peak_mib"] = {f"{rows:,} rows": peak_mib(scratch, rows) for rows in options.memory_rows}
            frame.write(file, result)
        else:
            for preset in [options.only] if options.only else PRESETS:
                side = PRESETS[preset][0]
                if not (scratch / "photos").exists():
                    make_photos(options.photos, scratch / "photos", max(rows for _, _, rows, _ in PRESETS.values()))
                save_network(preset, scratch / preset, side)
                for resize in (None, side) if preset == "tiny" else (None,):
                    crops = f"{preset}, crops of {side} pixels" + (f" of photos resized to {resize}" if resize else "")
                    result[crops] = compare(scratch, preset, resize, options.rounds)
                    frame.write(file, result)
    frame.say_written(file)


if __name__ == "__main__":
    main()
