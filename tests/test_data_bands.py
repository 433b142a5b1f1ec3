"""Files of any number of bands, of any type and with missing values, as a recipe takes them."""

import io
import pathlib
import struct
import tarfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from autoencoder.data.bands import DecodeError, Misfit
from autoencoder.data.decode import decode_image
from autoencoder.data.formats import read_bands
from autoencoder.data.sources import open_source
from autoencoder.data_config import DataConfig
from autoencoder.pixel_recipe import PixelRecipe, recipe_of
from autoencoder.runtime.errors import ConfigError

RNG = np.random.default_rng(0)
BANDS = RNG.integers(0, 65536, (20, 17, 13), dtype=np.uint16)
RGBA = RNG.integers(0, 256, (6, 9, 4), dtype=np.uint8)
RANGE = {"low": (-1000.0,), "high": (3000.0,)}


def tiff(values: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def png(values: np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, format, **options)
    return file.getvalue()


def first(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(values, 2, 0))


LAYOUTS: dict[str, Callable[[np.ndarray], bytes]] = {
    "contiguous TIFF": lambda a: tiff(a, photometric="minisblack", planarconfig="contig"),
    "planar TIFF": lambda a: tiff(first(a), photometric="minisblack", planarconfig="separate"),
    "a TIFF of pages": lambda a: tiff(first(a)),
    "a TIFF as tifffile writes it unasked": lambda a: tiff(a),
    "tiled and deflated TIFF": lambda a: tiff(a, photometric="minisblack", planarconfig="contig", tile=(16, 16), compression="zlib"),
    "predicted BigTIFF": lambda a: tiff(
        a, photometric="minisblack", planarconfig="contig", compression="zlib", predictor=a.dtype.kind != "f", bigtiff=True
    ),
    "big-endian TIFF": lambda a: tiff(a, photometric="minisblack", planarconfig="contig", byteorder=">"),
    "array with bands last": npy,
    "array with bands first": lambda a: npy(first(a)),
    "big-endian array": lambda a: npy(a.astype(a.dtype.newbyteorder(">"))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_every_layout_gives_every_bit_of_every_band(layout: str, dtype: type, tmp_path: pathlib.Path) -> None:
    values = BANDS.astype(np.int32).astype(dtype)
    data = LAYOUTS[layout](values)
    decoded = decode_image(data, PixelRecipe(channels=13, low=(-1e5,) * 13, high=(1e5,) * 13))
    assert decoded.pixels.dtype == decoded.dtype == dtype
    assert np.array_equal(decoded.pixels, values)
    assert decoded.valid is None
    (tmp_path / "x.img").write_bytes(data)
    chosen = PixelRecipe(channels=2, bands=(12, 3), low=(-1e5,) * 2, high=(1e5,) * 2)
    assert np.array_equal(decode_image(tmp_path / "x.img", chosen).pixels, values[:, :, [12, 3]])


def test_the_bands_of_an_array_are_as_many_as_expected_or_else_fewer_than_rows_and_columns() -> None:
    for shape, expected, count in (((5, 6, 13), 13, 13), ((13, 6, 5), 13, 13), ((5, 6, 13), None, 5), ((9, 6, 4), 7, 4), ((6, 6, 6), 6, 6)):
        assert read_bands(npy(np.zeros(shape)), expected).values.shape[2] == count
    corner = np.zeros((6, 6, 6), np.uint8)
    corner[0, 0, 5] = 1
    assert np.array_equal(read_bands(npy(corner)).values, corner)


def test_integers_at_full_range_need_no_range() -> None:
    assert np.array_equal(decode_image(npy(BANDS), PixelRecipe(channels=13)).pixels, BANDS)
    wide = decode_image(npy(BANDS.astype(np.int64)), PixelRecipe(channels=13))
    assert wide.pixels.dtype == np.uint16
    assert np.array_equal(wide.pixels, BANDS)


def test_wider_integers_take_the_type_of_the_range_whatever_their_values() -> None:
    for low, high, dtype in ((0, 10000, np.uint16), (-500, 3000, np.int16), (-1e6, 1e6, np.float32)):
        for values in (np.array([[-70000, 70000]]), np.array([[5, 7]])):
            decoded = decode_image(npy(values), PixelRecipe(channels=1, low=(low,), high=(high,)))
            assert decoded.pixels.dtype == dtype
            assert np.array_equal(decoded.pixels[:, :, 0].clip(low, high), values.clip(low, high))


def test_opacity_is_a_band_where_four_are_taken_and_a_coat_of_white_where_three_are() -> None:
    for data in (png(RGBA), tiff(RGBA), png(RGBA, "TIFF", compression="tiff_lzw")):
        assert np.array_equal(decode_image(data, PixelRecipe(channels=4)).pixels, RGBA)
        assert np.array_equal(decode_image(data, PixelRecipe(channels=3, bands=(0, 1, 2))).pixels, RGBA[:, :, :3])
    deep = RGBA.astype(np.uint16) * 257
    coated = decode_image(tiff(deep), PixelRecipe(channels=3)).pixels
    opacity = deep[:, :, 3:] / 65535
    assert np.abs(coated - (deep[:, :, :3] * opacity + 65535 * (1 - opacity))).max() <= 0.5


def deep_png(values: np.ndarray, filters: np.ndarray) -> bytes:
    """PNG's forward filters as section 9.2 of its specification writes them, byte by byte."""
    height, width, samples = values.shape
    rows = values.astype(">u2").view(np.uint8).reshape(height, -1).astype(int)
    step, filtered = 2 * samples, b""
    for y, kind in enumerate(filters.tolist()):
        above = rows[y - 1] if y else np.zeros_like(rows[0])
        line = []
        for x in range(rows.shape[1]):
            a, b, c = (rows[y, x - step] if x >= step else 0), above[x], (above[x - step] if x >= step else 0)
            nearest = min((a, b, c), key=lambda value: abs(a + b - c - value))
            line.append((rows[y, x] - (0, a, b, (a + b) // 2, nearest)[kind]) % 256)
        filtered += bytes([kind, *line])
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 2: 4, 4: 6}[samples], 0, 0, 0)
    packed = zlib.compress(filtered)
    parts = {b"IHDR": header, b"IDAT": packed[:100], b"IDAT ": packed[100:], b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind[:4] + content + struct.pack(">I", zlib.crc32(kind[:4] + content))
        for kind, content in parts.items()
    )


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_deep_colour_pngs_keep_every_bit_of_which_pillow_gives_the_upper_eight(samples: int) -> None:
    smooth = np.add.outer(np.arange(31) * 900, np.arange(23) * 1300)[:, :, None] + RNG.integers(0, 4000, (31, 23, samples))
    values = np.where(smooth > 40000, BANDS.max(), smooth).astype(np.uint16)
    data = deep_png(values, np.arange(31) % 5)
    assert np.array_equal(decode_image(data, PixelRecipe(channels=samples)).pixels, values)
    with Image.open(io.BytesIO(data)) as image:
        upper = np.asarray(image)
    if samples != 2:
        assert np.array_equal(upper, values >> 8)
    for broken in (data[:-200], data[:41] + b"\0" + data[42:]):
        with pytest.raises(DecodeError):
            decode_image(broken, PixelRecipe(channels=samples))


def test_sixteen_bit_colour_tiffs_keep_every_bit_and_their_luma_is_that_of_itu_r_601() -> None:
    data = tiff(BANDS[:, :, :3])
    assert np.array_equal(decode_image(data, PixelRecipe(channels=3)).pixels, BANDS[:, :, :3])
    luma = BANDS[:, :, :3] @ np.array([0.299, 0.587, 0.114])
    assert np.abs(decode_image(data, PixelRecipe(channels=1)).pixels[:, :, 0] - luma).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_are_turned_as_pillow_turns_them(orientation: int) -> None:
    grey = RNG.integers(0, 256, (5, 8), dtype=np.uint8)
    tag = [(274, "H", 1, orientation, True)]
    upright = decode_image(tiff(grey, extratags=tag), PixelRecipe(channels=1)).pixels
    assert np.array_equal(decode_image(tiff(grey.astype(np.uint16), extratags=tag), PixelRecipe(channels=1)).pixels, upright)


def gdal(values: np.ndarray, mark: str) -> bytes:
    return tiff(values, photometric="minisblack", planarconfig="contig", extratags=[(42113, "s", 0, mark, True)])


def test_a_pixel_is_missing_where_one_of_the_bands_taken_is() -> None:
    values = BANDS.copy()
    values[values == 7] = 8
    values[0, 1, 2], values[3, 4, 5], values[6, 6, 0] = 7, 7, 7
    recipe = PixelRecipe(channels=2, bands=(2, 5), nodata=7)
    for data in (npy(values), gdal(values, "9")):
        decoded = decode_image(data, recipe)
        assert decoded.valid is not None
        assert np.argwhere(~decoded.valid).tolist() == [[0, 1], [3, 4]]
        assert np.array_equal(decoded.pixels, np.where(decoded.valid[:, :, None], values[:, :, [2, 5]], 0))
        assert decoded.nodata == 7
    by_file = decode_image(gdal(values, "7"), PixelRecipe(channels=13, nodata="file"))
    assert np.argwhere(~by_file.valid).tolist() == [[0, 1], [3, 4], [6, 6]]  # type: ignore[operator]
    without_mark = decode_image(npy(values), PixelRecipe(channels=13, nodata="file"))
    assert without_mark.valid is not None and without_mark.valid.all()
    assert (by_file.nodata, without_mark.nodata) == (7, None)


@pytest.mark.parametrize("mark", [-3.4028234663852886e38, -9999.0, 0.1])
def test_marks_of_floating_point_files_survive_their_decimal_text(mark: float) -> None:
    values = RNG.normal(size=(4, 5, 2)).astype(np.float32)
    values[1, 2, 0], values[3, 3, 1], values[0, 0, 0], values[2, 2, 1] = mark, mark, np.nan, np.inf
    for text in (f"{mark:.6g}", repr(mark), f"{mark:.17e} "):
        decoded = decode_image(gdal(values, text), PixelRecipe(channels=2, low=(-5, -5), high=(5, 5), nodata="file"))
        assert np.argwhere(~decoded.valid).tolist() == [[0, 0], [1, 2], [2, 2], [3, 3]]  # type: ignore[operator]
        assert np.isfinite(decoded.pixels).all()


def test_masks_are_there_exactly_where_the_recipe_lets_pixels_miss() -> None:
    for data, channels in ((png(RGBA[:, :, :3]), 3), (png(RGBA[:, :, 0]), 1), (png(RGBA), 4)):
        assert decode_image(data, PixelRecipe(channels=channels)).valid is None
        for nodata in (5.0, "file"):
            assert decode_image(data, PixelRecipe(channels=channels, nodata=nodata)).valid is not None  # type: ignore[arg-type]


FLOATS = np.array([[0.5, np.nan]], np.float32)


@pytest.mark.parametrize(
    ("data", "recipe", "key", "reason"),
    [
        (png(RGBA[:, :, :3]), {"channels": 4}, "channels", r"has 3 bands where data.channels=4 are taken; give data.channels=3$"),
        (npy(BANDS), {"channels": 3}, "channels", r"has 13 bands .*; give data.channels=13, or the 3 to take as data.bands"),
        (npy(BANDS), {"channels": 2, "bands": (1, 13)}, "bands", r"has 13 bands, counted from 0, so none numbered 13 of \[1, 13\]"),
        (png(RGBA[:, :, 0]), {"channels": 13}, "channels", r"has 1 band where"),
        (npy(FLOATS), {"channels": 1}, "nodata", "NaN"),
        (npy(FLOATS[:, :1]), {"channels": 1}, "low", "floating-point values .* data.low and data.high .*inspect_data"),
        (npy(-BANDS.astype(np.int32)), {"channels": 13}, "low", "int32 values from -6.* to .* do not fit 16 bits"),
        (gdal(BANDS, str(BANDS[0, 0, 0])), {"channels": 13}, "nodata", r"marks missing values by .*data.nodata=file"),
    ],
)
def test_what_does_not_fit_is_told_with_the_setting_that_would(data: bytes, recipe: dict[str, Any], key: str, reason: str) -> None:
    with pytest.raises(Misfit, match=reason) as caught:
        decode_image(data, PixelRecipe(**recipe))
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(BANDS)[:-100], "expected 8840 bytes got 8740"),
        (npy(np.zeros((2, 3, 4, 5))), r"shape \(2, 3, 4, 5\); give \(H, W\)"),
        (npy(np.zeros((4, 4), complex)), "complex128"),
        (b"\x93NUMPY\1\0", "ValueError"),
        (tiff(BANDS)[:200], "."),
        (tiff(BANDS, photometric="minisblack", planarconfig="contig")[: BANDS.nbytes // 2], "."),
    ],
    ids=["truncated array", "four axes", "complex", "header alone", "header of a TIFF", "half a TIFF"],
)
def test_broken_files_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason) as caught:
        decode_image(data, PixelRecipe(channels=13))
    assert not isinstance(caught.value, Misfit)


def test_arrays_of_objects_are_never_unpickled() -> None:
    file = io.BytesIO()
    np.save(file, np.array([{}, []], dtype=object), allow_pickle=True)
    with pytest.raises(DecodeError, match="allow_pickle=False"):
        read_bands(file.getvalue())


def test_a_compression_that_nothing_here_reads_is_named_with_a_remedy() -> None:
    data = bytearray(tiff(BANDS[:, :, :5], photometric="minisblack", planarconfig="contig"))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        offset = file.pages[0].tags[259].valueoffset  # type: ignore[union-attr]
    data[offset : offset + 2] = (5).to_bytes(2, "little")
    with pytest.raises(DecodeError, match=r"uint16 in 5 bands, compressed by LZW, needs the package imagecodecs; `pip install"):
        read_bands(bytes(data))


@pytest.mark.parametrize("values", [BANDS[:, :, 0], BANDS[:, :, 0].astype(np.float32), RGBA], ids=["16 bits", "float32", "RGBA"])
def test_what_pillow_can_decompress_needs_no_codec(values: np.ndarray) -> None:
    bands = read_bands(png(values, "TIFF", compression="tiff_lzw"))
    assert bands.values.dtype == values.dtype
    assert np.array_equal(bands.values, values if values.ndim == 3 else values[:, :, None])


def test_arrays_and_tiffs_are_read_from_folders_and_tars(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    config = DataConfig(channels=13)
    images = [RNG.integers(0, 65536, (13 - k, 7, 13), dtype=np.uint16) for k in range(4)]
    for ending, encoded in (("npy", npy), ("tif", LAYOUTS["planar TIFF"])):
        folder = tmp_path / ending
        folder.mkdir()
        with tarfile.open(tmp_path / f"{ending}.tar", "w") as archive:
            for k, values in enumerate(images):
                (folder / f"{k}.{ending}").write_bytes(encoded(values))
                archive.add(folder / f"{k}.{ending}", f"{k}.{ending}")
        for name in (folder, tmp_path / f"{ending}.tar"):
            source = open_source(str(name), split="train", config=config)
            assert source.read(2).id.endswith(f"2.{ending}")
            assert all(np.array_equal(source.read(k).pixels, values) for k, values in enumerate(images))


def test_a_source_of_other_images_is_refused_at_once_and_an_odd_one_among_them_is_bad(tmp_path: pathlib.Path) -> None:
    for k in range(5):
        (tmp_path / f"{k}.npy").write_bytes(npy(BANDS))
    with pytest.raises(ConfigError, match=r"data.channels: got 3; .*: 0.npy does not fit: it has 13 bands"):
        open_source(str(tmp_path), split="train", config=DataConfig())
    with pytest.raises(ConfigError, match=r"data.bands: got \(20,\); .* none numbered 20"):
        open_source(str(tmp_path), split="train", config=DataConfig(channels=1, bands=(20,)))
    (tmp_path / "0.npy").write_bytes(npy(BANDS[:, :, :4]))
    assert len(open_source(str(tmp_path), split="train", config=DataConfig(channels=13))) == 5
    with pytest.raises(ConfigError, match=r"data.channels: got 4; demo \(train\): astronaut does not fit: it has 3 bands"):
        open_source("demo", split="train", config=DataConfig(channels=4))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"channels": 0}, "channels"),
        ({"channels": 3, "bands": (1, 2)}, "bands"),
        ({"channels": 1, "bands": (-1,)}, "bands"),
        ({"low": 0.0}, "high"),
        ({"high": 1.0}, "low"),
        ({"low": 1.0, "high": 1.0}, "high"),
        ({"low": (0.0, 1.0, 2.0), "high": 2.0}, "high"),
        ({"low": (0.0, 1.0), "high": 2.0}, "low"),
        ({"low": 0.0, "high": float("inf")}, "high"),
        ({"low": (0.0, 1.0, 2.0), "high": 5.0, "shuffle_channels": True}, "shuffle_channels"),
        ({"nodata": float("nan")}, "nodata"),
        ({"preview": (0, 1)}, "preview"),
        ({"preview": (3,)}, "preview"),
        ({"stretch": (98.0, 2.0)}, "stretch"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DataConfig(**settings)
    assert caught.value.key == key


def test_recipes_tell_only_what_is_not_ordinary_and_come_back_from_json() -> None:
    assert recipe_of(DataConfig()).to_json() == {"range": [-1.0, 1.0], "levels": 256, "channels": 3}
    assert recipe_of(DataConfig(preview=(1,), stretch=(2.0, 98.0))).to_json() == recipe_of(DataConfig()).to_json()
    data = DataConfig(channels=2, bands=(3, 1), low=0, high=(10, 20), nodata="file")
    recipe = recipe_of(data, levels=0)
    assert recipe.to_json() == {
        "range": [-1.0, 1.0], "levels": 0, "channels": 2, "bands": [3, 1], "low": [0.0, 0.0], "high": [10.0, 20.0], "nodata": "file",
    }  # fmt: skip
    assert PixelRecipe.from_json(recipe.to_json()) == recipe
    assert recipe_of(DataConfig(**recipe.data_settings()), levels=0) == recipe
    assert recipe_of(DataConfig(channels=2, low=(1.0,), high=4)).low == (1.0, 1.0)
