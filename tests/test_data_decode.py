"""Image files of all modes to pixels."""

import io
import pathlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from autoencoder.data.decode import DecodeError, decode_image
from autoencoder.pixel_recipe import PixelRecipe

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(data: bytes | pathlib.Path, channels: int) -> np.ndarray:
    return decode_image(data, PixelRecipe(channels=channels)).pixels


def test_colour_and_grey_files_give_their_pixels(tmp_path: pathlib.Path) -> None:
    assert np.array_equal(pixels(encoded(Image.fromarray(COLOUR)), 3), COLOUR)
    assert np.array_equal(pixels(encoded(Image.fromarray(GREY)), 1)[:, :, 0], GREY)
    assert np.array_equal(pixels(encoded(Image.fromarray(GREY)), 3), np.stack([GREY] * 3, 2))
    (tmp_path / "x.png").write_bytes(encoded(Image.fromarray(COLOUR)))
    assert np.array_equal(pixels(tmp_path / "x.png", 3), COLOUR)


def test_one_channel_of_a_colour_file_is_its_luma() -> None:
    luma = COLOUR @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    decoded = pixels(encoded(Image.fromarray(COLOUR)), 1)
    assert decoded.shape == (6, 9, 1)
    assert np.abs(decoded[:, :, 0] - luma).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_keeps_every_bit(format: str) -> None:
    data = encoded(Image.fromarray(DEEP), format)
    for channels in (1, 3):
        decoded = pixels(data, channels)
        assert decoded.dtype == np.uint16
        assert np.array_equal(decoded, np.stack([DEEP] * channels, 2))


# What each EXIF orientation says of the stored array: how to show it upright.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("stored", [COLOUR, DEEP], ids=["8 bits", "16 bits"])
def test_exif_orientation_is_applied(orientation: int, stored: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = pixels(encoded(Image.fromarray(stored), exif=exif), 3)
    upright = UPRIGHT[orientation](stored)
    assert np.array_equal(decoded, upright if upright.ndim == 3 else np.stack([upright] * 3, 2))


def test_transparency_is_laid_over_white() -> None:
    alpha = RNG.integers(0, 256, (6, 9, 1), dtype=np.uint8)
    over_white = (COLOUR * (alpha / 255) + 255 * (1 - alpha / 255)).round()
    rgba = Image.fromarray(np.concatenate([COLOUR, alpha], 2))
    assert np.abs(pixels(encoded(rgba), 3) - over_white).max() <= 1

    grey_over_white = (GREY * (alpha[:, :, 0] / 255) + 255 * (1 - alpha[:, :, 0] / 255)).round()
    la = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(alpha[:, :, 0])))
    assert np.abs(pixels(encoded(la), 1)[:, :, 0] - grey_over_white).max() <= 1


def test_palettes_and_their_transparent_entry() -> None:
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert pixels(encoded(palette), 3).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    assert pixels(encoded(palette, transparency=1), 3).tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]


def test_black_and_white_and_cmyk() -> None:
    bits = RNG.integers(0, 2, (6, 9)).astype(bool)
    assert np.array_equal(pixels(encoded(Image.fromarray(bits)), 1)[:, :, 0], bits * 255)
    inks = RNG.integers(0, 256, (6, 9, 4), dtype=np.uint8)
    rgb = (255.0 - inks[:, :, :3]) * (255 - inks[:, :, 3:]) / 255
    assert np.abs(pixels(encoded(Image.fromarray(inks, "CMYK"), "TIFF"), 3) - rgb).max() <= 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "known format"),
        (b"<html>not an image</html>", "known format"),
        (encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")[:-500], "truncated"),
        (encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)))[:-500], "truncated"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), "16 bits"),
    ],
    ids=["empty", "text", "truncated JPEG", "truncated PNG", "floating point", "32 bits"],
)
def test_files_that_are_no_whole_images_are_refused_with_the_reason(data: bytes, reason: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "named-like-an-image.png"
    path.write_bytes(data)
    for given in (data, path):
        with pytest.raises(DecodeError, match=reason):
            pixels(given, 3)


def test_a_missing_file_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DecodeError, match="No such file"):
        pixels(tmp_path / "gone.png", 3)
