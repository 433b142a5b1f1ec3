"""Small images, tars and parquet files, as tests of sources have them."""

import io
import pathlib
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 6, 5, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray | Image.Image, format: str = "PNG", **options: object) -> bytes:
    """An image file's bytes."""
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, format, **options)
    return file.getvalue()


FILES = [encoded(pixels) for pixels in PIXELS]
"""PNGs of them."""


def write_tree(root: pathlib.Path, *names: str) -> None:
    """Images at these places, in the order of `PIXELS`."""
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(FILES[k])


def tar(members: dict[str, bytes] | list[tuple[str, bytes]], **options: object) -> bytes:
    """A tar's bytes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as archive:  # type: ignore[call-overload]
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def table(images: range, **columns: object) -> pa.Table:
    """A table of these images, with their numbers, and other columns."""
    cells = [{"bytes": FILES[k], "path": None} for k in images]
    return pa.table({"image": cells, "number": list(images), **columns})


def write_parquet(file: pathlib.Path, images: range, rows: int, **columns: object) -> None:
    """Row groups of so many rows."""
    pyarrow.parquet.write_table(table(images, **columns), file, row_group_size=rows)
