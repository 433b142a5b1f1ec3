"""Heights and widths from headers are those of the decoded images."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from autoencoder.config import DataConfig
from autoencoder.data import sizes
from autoencoder.data.bands import DecodeError
from autoencoder.data.decode import decode_image
from autoencoder.data.sizes import upright_size
from autoencoder.data.sources import open_images
from autoencoder.pixel_recipe import recipe_of
from autoencoder.runtime.own_class import OwnClass
from tests.test_data_bands import deep_png

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 17, 3), dtype=np.uint8)


def encoded(format: str, orientation: int = 1) -> bytes:
    exif, into = Image.Exif(), io.BytesIO()
    exif[274] = orientation
    Image.fromarray(PIXELS).save(into, format, exif=exif)
    return into.getvalue()


def saved(array: np.ndarray, **more: object) -> bytes:
    into = io.BytesIO()
    tifffile.imwrite(into, array, **more)  # type: ignore[arg-type]
    return into.getvalue()


def npy(array: np.ndarray) -> bytes:
    into = io.BytesIO()
    np.save(into, array)
    return into.getvalue()


def agrees(data: bytes, channels: int = 3) -> tuple[int, int]:
    recipe = recipe_of(DataConfig(channels=channels, low=0, high=1000) if channels != 3 else DataConfig())
    found = upright_size(data, channels)
    assert found == decode_image(data, recipe).pixels.shape[:2]
    return found


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_as_large_as_they_are_once_turned_upright(format: str, orientation: int) -> None:
    assert agrees(encoded(format, orientation)) == ((17, 30) if orientation >= 5 else (30, 17))


@pytest.mark.parametrize(
    ("data", "channels"),
    [
        (npy(PIXELS), 3),
        (npy(PIXELS.transpose(2, 0, 1)), 3),
        (npy(PIXELS[:, :, 0]), 3),
        (npy(np.zeros((5, 30, 17), np.uint16)), 5),
        (npy(np.zeros((30, 17, 5), np.float32)), 5),
        (saved(np.zeros((30, 17, 5), np.uint16)), 5),
        (saved(np.zeros((5, 30, 17), np.uint16), photometric="minisblack", planarconfig="separate"), 5),
        (deep_png(np.zeros((30, 17, 3), np.uint16), np.zeros(30, int)), 3),
        (saved(np.zeros((30, 17, 3), np.uint16), extratags=[(274, 3, 1, 6, True)]), 3),
    ],
)
def test_arrays_and_tiffs_of_any_bands_have_the_axes_that_decoding_gives_them(data: bytes, channels: int) -> None:
    assert sorted(agrees(data, channels)) == [17, 30]


def test_pixels_are_not_decoded() -> None:
    for data in (encoded("JPEG"), encoded("PNG"), npy(PIXELS)):
        assert upright_size(data[:-200]) == (30, 17)
        with pytest.raises(DecodeError):
            decode_image(data[:-200], recipe_of(DataConfig()))
    for broken in (b"", b"no image", encoded("JPEG")[:20], npy(PIXELS)[:20]):
        with pytest.raises(DecodeError):
            upright_size(broken)


class Rows:
    """Images of a class of one's own."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> np.ndarray:
        if index == 1:
            raise OSError("gone")
        return np.zeros((10 + index, 20, 3), np.uint8)


def test_every_kind_of_source_tells_the_sizes_of_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "_AHEAD", 2)
    files = {"0.jpg": encoded("JPEG"), "1.png": b"no image", "2.jpg": encoded("JPEG", 6), "3.npy": npy(PIXELS[:9])}
    (tmp_path / "photos").mkdir()
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in files.items():
            (tmp_path / "photos" / name).write_bytes(data)
            if name.endswith("npy"):
                continue
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    pq.write_table(pa.table({"image": pa.array([*files.values(), None], pa.binary())}), tmp_path / "x.parquet")
    expected = [(30, 17), None, (17, 30), (9, 17)]
    for source, wanted in (("photos", expected), ("x.tar", expected[:3]), ("x.parquet", [*expected, None])):
        found = open_images(DataConfig(source=str(tmp_path / source)), split="train")
        assert list(sizes.sizes(found, range(len(found)), 3)) == wanted
        assert list(sizes.sizes(found, np.array([2, 0]), 3)) == [wanted[2], wanted[0]]
    own = open_images(DataConfig(own=OwnClass(class_path="tests.test_image_sizes.Rows")), split="train")
    assert list(sizes.sizes(own, range(3))) == [(10, 20), None, (12, 20)]
