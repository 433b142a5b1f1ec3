"""What becomes of images of all kinds, from their files in folders, tars and tables to a crop: the rules of docs/sources.md."""

import pathlib
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from autoencoder.config import DataConfig
from autoencoder.data.sources import BadImage, Source, open_source
from tests.source_files import encoded, tar

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 10, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (12, 10), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (12, 10), dtype=np.uint8)
INKS = RNG.integers(0, 256, (12, 10, 4), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (12, 10), dtype=np.uint16)
NAMES = ["l.png", "la.png", "rgba.png", "p.png", "cmyk.tif", "sixteen.png", "turned.jpg", "moving.gif", "one.bmp"]


def over_white(colours: np.ndarray) -> np.ndarray:
    opacity = ALPHA[:, :, None] / 255
    return colours * opacity + 255 * (1 - opacity)


def repeated(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey] * 3, 2)


def palette() -> tuple[Image.Image, np.ndarray]:
    colours, numbers = RNG.integers(0, 256, (7, 3), dtype=np.uint8), RNG.integers(0, 7, (12, 10), dtype=np.uint8)
    image = Image.fromarray(numbers, "P")
    image.putpalette(colours.tobytes())
    return image, colours[numbers]


def turned() -> tuple[bytes, np.ndarray]:
    """A JPEG of flat quarters, which its compression keeps, to be shown turned clockwise (EXIF orientation 6)."""
    quarters = np.kron(np.array([[0, 80], [160, 240]], np.uint8), np.ones((16, 16), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(quarters, "JPEG", quality=100, exif=exif), repeated(np.rot90(quarters, -1))


def moving() -> tuple[bytes, np.ndarray]:
    frames = [Image.fromarray(np.full((12, 10), value, np.uint8)) for value in (50, 150, 250)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), np.full((12, 10, 3), 50)


def cases() -> dict[str, tuple[bytes, np.ndarray]]:
    """A file of each kind and what it is as (H, W, 3), in its own depth."""
    p, p_colours = palette()
    grey, alpha = Image.fromarray(GREY), Image.fromarray(ALPHA)
    inks = (255.0 - INKS[:, :, :3]) * (255 - INKS[:, :, 3:]) / 255
    bits = RNG.integers(0, 2, (12, 10)).astype(bool)
    return dict(
        zip(
            NAMES,
            [
                (encoded(GREY), repeated(GREY)),
                (encoded(Image.merge("LA", (grey, alpha))), over_white(repeated(GREY))),
                (encoded(Image.merge("RGBA", (*Image.fromarray(RGB).split(), alpha))), over_white(RGB)),
                (encoded(p), p_colours),
                (encoded(Image.fromarray(INKS, "CMYK"), "TIFF"), inks),
                (encoded(DEEP), repeated(DEEP)),
                turned(),
                moving(),
                (encoded(Image.fromarray(bits), "BMP"), repeated(bits * 255)),
            ],
            strict=True,
        )
    )


def in_folder(root: pathlib.Path, files: dict[str, bytes]) -> str:
    (root / "photos").mkdir()
    for name, data in files.items():
        (root / "photos" / name).write_bytes(data)
    return str(root / "photos")


def in_tar(root: pathlib.Path, files: dict[str, bytes]) -> str:
    (root / "x.tar").write_bytes(tar(files))
    return str(root / "x.tar")


def in_parquet(root: pathlib.Path, files: dict[str, bytes]) -> str:
    pyarrow.parquet.write_table(pa.table({"image": list(files.values()), "name": list(files)}), root / "x.parquet")
    return str(root / "x.parquet")


PLACES = pytest.mark.parametrize("place", [in_folder, in_tar, in_parquet])
Place = Callable[[pathlib.Path, dict[str, bytes]], str]


def open_all(place: Place, root: pathlib.Path, files: dict[str, bytes]) -> Source:
    # Folders are read in the order of names.
    return open_source(place(root, dict(sorted(files.items()))), split="train", config=DataConfig())


@PLACES
def test_every_kind_of_image_becomes_colour_by_its_rule_wherever_it_lies(place: Place, tmp_path: pathlib.Path) -> None:
    wanted = cases()
    source = open_all(place, tmp_path, {name: data for name, (data, _) in wanted.items()})
    for k, name in enumerate(sorted(wanted)):
        pixels = source.read(k).pixels
        assert pixels.dtype == (np.uint16 if name == "sixteen.png" else np.uint8), name
        assert pixels.shape == wanted[name][1].shape, name
        assert np.abs(pixels - wanted[name][1].astype(float)).max() <= (2 if name == "turned.jpg" else 1), name


@PLACES
def test_zero_bytes_are_a_bad_image_with_its_reason(place: Place, tmp_path: pathlib.Path) -> None:
    source = open_all(place, tmp_path, {"a.png": encoded(RGB), "b.png": b""})
    assert np.array_equal(source.read(0).pixels, RGB)
    with pytest.raises(BadImage) as caught:
        source.read(1)
    assert caught.value.id == {in_folder: "b.png", in_tar: "1:b.png", in_parquet: "1"}[place]
    assert caught.value.reason == ("the cell is empty" if place is in_parquet else "not an image of a known format")


LARGE = """
import sys
from autoencoder.config import DataConfig
from autoencoder.data.loader import ValidationSet
from autoencoder.data.sources import open_source

config = DataConfig(resolution=8, channels=1, crop="center", workers=0)
source = open_source(sys.argv[1], split="train", config=config)
batch = ValidationSet(source, config, seed=0, batch_size=1, latent_shape=(1, 1, 1)).batch([0])
print(batch.pixels[0, 0].tolist(), batch.bad)
"""


def test_a_hundred_megapixels_are_read_and_cropped_without_a_warning(tmp_path: pathlib.Path) -> None:
    image = np.zeros((10_000, 10_000), np.uint8)
    image[4_996:5_004, 4_996:5_004] = GREY[:8, :8]
    folder = in_folder(tmp_path, {"large.png": encoded(image, compress_level=1)})
    run = subprocess.run([sys.executable, "-c", LARGE, folder], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == (f"{GREY[:8, :8].tolist()} []\n", "")


def test_an_image_that_says_it_is_larger_than_pillow_takes_is_a_bad_one(tmp_path: pathlib.Path) -> None:
    # The header alone: nothing is decoded, so no memory is asked for.
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)) + chunk(b"IDAT", b"")
    source = open_all(in_folder, tmp_path, {"a.png": encoded(RGB), "b.png": header})
    with pytest.raises(BadImage, match="exceeds limit of"):
        source.read(1)
