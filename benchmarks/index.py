"""What an index costs: seconds to make and to open, and resident bytes a row, of folders, tars and parquet files.

    python benchmarks/index.py [--files 1000000] [--samples 1000000] [--rows 1000000] [--folder DIR] [--datasets]
        [--kinds folder tars parquet]

Images are a few hundred bytes long (links to a few files in the folder): what is measured is the listing, not the reading. The folder has
1,000 class folders; each sample of a tar an image, a caption and a class; parquet files have row groups of 100 rows. Everything is in
the page cache, as it was just written. `resident` is anonymous memory, of a process that made the index, and of one that opened the
written file, whose pages are shared by all processes and given up under pressure. Reads are of bytes (of a folder: of path and size),
20,000 at random (1,000 of parquet), and of parquet 20,000 in the order of training. `--datasets` loads the same tars and parquet files
by `datasets`, with the copy that it makes; without it, and of kinds that are not chosen, the result file
keeps what was measured before.
`peak` is the most that was resident while the index was made.

Each measurement has a process of its own. The scratch files need a disk with room for as many files, and are removed.
"""

import io
import json
import multiprocessing
import os
import shutil
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import frame
import numpy as np

LOOKED_UP = 20_000
KINDS = ("folder", "tars", "parquet")
A_TAR, A_GROUP = 10_000, 100
IMAGE = bytes(500)


def make_folder(root: Path, files: int, classes: int = 1000) -> str:
    """Links to one file a class folder: of as many names as files, of few contents."""
    for label in range(classes):
        folder = root / f"n{label:08d}"
        folder.mkdir(parents=True)
        first = folder / f"n{label:08d}_00000.JPEG"
        first.write_bytes(IMAGE[: 1 + label % len(IMAGE)])
        for k in range(1, files // classes):
            os.link(first, folder / f"n{label:08d}_{k:05d}.JPEG")
    return str(root)


def make_tars(root: Path, samples: int) -> str:
    """Tars of the same images, captions and classes: of the first one, with the numbers in names and the check sums of headers changed."""
    root.mkdir(parents=True)
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for k in range(A_TAR):
            for field, data in (("jpg", IMAGE), ("txt", b"a caption of a photo, of some words"), ("cls", b"7")):
                member = tarfile.TarInfo(f"00000{k:04d}.{field}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    blocks = np.frombuffer(whole.getvalue(), np.uint8).reshape(-1, 512).copy()
    # Of each member a header and a block of content.
    headers = blocks[: 6 * A_TAR : 2]
    sums = [int(header[148:154].tobytes(), 8) for header in headers]
    for number in range(samples // A_TAR):
        digits = f"{number:05d}".encode()
        headers[:, :5] = np.frombuffer(digits, np.uint8)
        told = b"".join(b"%06o" % (total + sum(digits) - sum(b"00000")) for total in sums)
        headers[:, 148:154] = np.frombuffer(told, np.uint8).reshape(-1, 6)
        blocks.tofile(root / f"{number:05d}.tar")
    return f"{root}/*.tar"


def make_parquet(root: Path, rows: int) -> str:
    import pyarrow
    import pyarrow.parquet

    root.mkdir(parents=True)
    for start in range(0, rows, 50_000):
        count = min(50_000, rows - start)
        images = [{"bytes": os.urandom(500), "path": None} for _ in range(count)]
        table = pyarrow.table({"image": images, "label": np.arange(count) % 1000})
        pyarrow.parquet.write_table(table, root / f"{start:09d}.parquet", row_group_size=A_GROUP)
    return f"{root}/*.parquet"


def resident() -> int:
    """Bytes of anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024


class Watch:
    """Looks at this process's resident memory every few milliseconds."""

    def __init__(self) -> None:
        self._most, self._done = resident(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def stop(self) -> int:
        """The most that was seen."""
        self._done.set()
        self._thread.join()
        return self._most

    def _look(self) -> None:
        while not self._done.wait(0.02):
            self._most = max(self._most, resident())


def alone(measure: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """What `measure` finds in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def make_index(source: str, file: Path) -> dict[str, float]:
    import gc
    import importlib

    # Arrow imports it when it first makes an array.
    importlib.import_module("pandas")

    from autoencoder.data import folder, parquet, tars  # noqa: F401
    from autoencoder.data.sources import Indexed, open_files
    from autoencoder.data_config import DataConfig

    gc.collect()
    before, watch = resident(), Watch()
    start, start_cpu = time.perf_counter(), time.process_time()
    opened = open_files(source, "train", DataConfig(), "data.source")
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    peak = watch.stop() - before
    gc.collect()
    held = resident() - before
    assert isinstance(opened, Indexed)
    opened.write_index(file)
    return {
        "rows": len(opened),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "resident_bytes_a_row": round(held / len(opened), 1),
        "peak_bytes_a_row": round(peak / len(opened), 1),
        "file_bytes_a_row": round(file.stat().st_size / len(opened), 1),
    }


def open_index(source: str, file: Path) -> dict[str, float]:
    import gc

    from autoencoder.data import folder, parquet, tars  # noqa: F401
    from autoencoder.data.sources import open_files
    from autoencoder.data_config import DataConfig

    gc.collect()
    before, start = resident(), time.perf_counter()
    opened = open_files(source, "train", DataConfig(), "data.source", file)
    seconds, held = time.perf_counter() - start, resident() - before
    rows = np.random.default_rng(0).integers(0, len(opened), LOOKED_UP).tolist()
    start = time.perf_counter()
    if source.endswith(".parquet"):
        rows = rows[:1000]
    for row in rows:
        opened.encoded(row)
    looked = time.perf_counter() - start
    result = {
        "seconds": round(seconds, 4),
        "resident_bytes_a_row": round(held / len(opened), 1),
        "random_reads_a_second": round(len(rows) / looked),
    }
    if source.endswith(".parquet"):
        from autoencoder.data.order import sample_index
        from autoencoder.data.sources import blocks_of

        start = time.perf_counter()
        for position in range(LOOKED_UP):
            opened.encoded(sample_index(0, len(opened), position, blocks_of(opened)))
        result["reads_a_second_in_training_order"] = round(LOOKED_UP / (time.perf_counter() - start))
    return result


def load_by_datasets(source: str, cache: Path) -> dict[str, float]:
    import datasets

    datasets.disable_progress_bars()
    start = time.perf_counter()
    kind = "webdataset" if source.endswith(".tar") else "parquet"
    loaded = datasets.load_dataset(kind, data_files=source, split="train", cache_dir=str(cache))
    seconds = time.perf_counter() - start
    copied = sum(file.stat().st_size for file in cache.rglob("*.arrow"))
    return {"rows": len(loaded), "seconds": round(seconds, 2), "copied_bytes_a_row": round(copied / len(loaded), 1)}


def main() -> None:
    given = frame.parser(__doc__)
    given.add_argument("--files", type=int, default=1_000_000)
    given.add_argument("--samples", type=int, default=1_000_000)
    given.add_argument("--rows", type=int, default=1_000_000)
    given.add_argument("--folder", type=Path, help="for the scratch files; by default the system's")
    given.add_argument("--datasets", action="store_true")
    given.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    arguments = given.parse_args()
    device = frame.device_name(one_thread=True)
    file = frame.result_file("index", device)
    before = json.loads(file.read_text()) if file.exists() else {}
    result: dict[str, Any] = frame.made_with(device) | {kind: before[kind] for kind in KINDS if kind in before}
    scratch = Path(tempfile.mkdtemp(dir=arguments.folder))
    os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
    try:
        makers = {
            "folder": lambda: make_folder(scratch / "folder", arguments.files),
            "tars": lambda: make_tars(scratch / "tars", arguments.samples),
            "parquet": lambda: make_parquet(scratch / "parquet", arguments.rows),
        }
        for kind in arguments.kinds:
            source, index = makers[kind](), scratch / f"{kind}.arrow"
            result[kind] = {"made": alone(make_index, source, index)}
            if kind == "tars":
                result[kind]["made_from_cache"] = alone(make_index, source, index)
            result[kind]["opened"] = alone(open_index, source, index)
            if "datasets" in before.get(kind, {}):
                result[kind]["datasets"] = before[kind]["datasets"]
            if arguments.datasets and kind != "folder":
                result[kind]["datasets"] = alone(load_by_datasets, source, scratch / "copies" / kind)
            print(kind, result[kind])
    finally:
        shutil.rmtree(scratch)
    frame.write(file, result)
    frame.say_written(file)


if __name__ == "__main__":
    main()
