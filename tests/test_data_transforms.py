"""Crops: where they are cut, and that a resampled crop is a crop of the resampled image."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from autoencoder.config import DataConfig
from autoencoder.data import transforms
from autoencoder.runtime.rng import generator

FILTERS = {name: Image.Resampling[name.upper()] for name in ("lanczos", "bicubic", "bilinear", "box")}


def coordinates(height: int, width: int) -> np.ndarray:
    """An image whose two channels of every pixel say row and column; the third is 16-bit noise."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, rows * 7 + columns], 2).astype(np.uint16)


def train_crop(pixels: np.ndarray, config: DataConfig, rng: np.random.Generator) -> np.ndarray:
    return transforms.train_crop(pixels, config, rng)[0]


def validation_crop(pixels: np.ndarray, config: DataConfig, k: int) -> np.ndarray:
    return transforms.validation_crop(pixels, config, k)[0]


def photo(height: int, width: int, channels: int = 3) -> np.ndarray:
    """A photo-like uint8 image: smooth, with some noise."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(small) + rng.normal(0, 12, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)[:, :, :channels]


def test_unscaled_crops_are_windows_of_the_image_and_reach_every_place() -> None:
    config = DataConfig(resolution=8, flip=False)
    image, corners = coordinates(11, 10), set()
    for position in range(400):
        crop = train_crop(image, config, generator(0, "crop", position))
        top, left = int(crop[0, 0, 0]), int(crop[0, 0, 1])
        assert np.array_equal(crop, image[top : top + 8, left : left + 8])
        corners.add((top, left))
    assert corners == {(top, left) for top in range(4) for left in range(3)}


def test_half_of_the_crops_are_mirrored() -> None:
    image = coordinates(8, 8)
    mirrored = [train_crop(image, DataConfig(resolution=8), generator(1, "crop", i))[0, 0, 1] == 7 for i in range(1000)]
    assert abs(np.mean(mirrored) - 0.5) < 5 * 0.5 / 1000**0.5
    assert not any(train_crop(image, DataConfig(resolution=8, flip=False), generator(1, "crop", i))[0, 0, 1] for i in range(50))


def test_shuffled_channels_are_the_same_crop_in_each_of_the_six_orders() -> None:
    image, orders = coordinates(12, 12), set()
    for position in range(60):
        plain = train_crop(image, DataConfig(resolution=8), generator(0, "crop", position))
        shuffled = train_crop(image, DataConfig(resolution=8, shuffle_channels=True), generator(0, "crop", position))
        order = tuple(next(c for c in range(3) if np.array_equal(shuffled[:, :, k], plain[:, :, c])) for k in range(3))
        orders.add(order)
    assert len(orders) == 6


def test_flips_and_places_do_not_move_with_other_options() -> None:
    image = coordinates(20, 20)
    for position in range(20):
        plain = train_crop(image, DataConfig(resolution=8, flip=False), generator(0, "crop", position))
        flipped = train_crop(image, DataConfig(resolution=8), generator(0, "crop", position))
        assert np.array_equal(flipped, plain) or np.array_equal(flipped, plain[:, ::-1])


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("resize", [20, 41, 150], ids=["smaller", "slightly smaller", "larger"])
def test_a_resampled_crop_is_a_crop_of_the_resampled_image(filter: str, resize: int) -> None:
    image = photo(50, 77)
    config = DataConfig(resolution=16, resize=resize, filter=filter, validation_grid=3)  # type: ignore[arg-type]
    size = (round(77 * resize / 50), resize)
    whole = np.asarray(Image.fromarray(image).resize(size, FILTERS[filter])).astype(int)
    spans = [min(48, length) for length in (resize, size[0])]
    for k in range(9):
        row, column = divmod(k, 3)
        top = (resize - spans[0]) // 2 + round(row * (spans[0] - 16) / 2)
        left = (size[0] - spans[1]) // 2 + round(column * (spans[1] - 16) / 2)
        difference = np.abs(validation_crop(image, config, k) - whole[top : top + 16, left : left + 16])
        assert difference.max() <= 1
        assert difference.mean() < 0.05  # ties in PIL's fixed-point weights


def test_sixteen_bit_images_are_resampled_in_sixteen_bits() -> None:
    image = np.random.default_rng(0).integers(0, 65536, (40, 40, 1), dtype=np.uint16)
    crop = validation_crop(image, DataConfig(resolution=24, resize=24, channels=1), 0)
    whole = np.asarray(Image.fromarray(image[:, :, 0].astype(np.float32)).resize((24, 24), Image.Resampling.LANCZOS))
    assert crop.dtype == np.uint16
    assert np.abs(crop[:, :, 0] - whole.clip(0, 65535)).max() <= 0.51


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (3, 40), (1, 1)])
def test_images_smaller_than_the_crop_are_enlarged_to_fit(channels: int, shape: tuple[int, int]) -> None:
    image = np.full((*shape, channels), 77, np.uint8)
    config = DataConfig(resolution=16, channels=channels, validation_grid=2, zoom=(0.5, 1.0))
    crops = [train_crop(image, config, generator(0, "crop", 0)), *(validation_crop(image, config, k) for k in range(4))]
    for crop in crops:
        assert crop.shape == (16, 16, channels)
        assert (crop == 77).all()


def test_zoom_is_log_uniform_over_its_range() -> None:
    # On a horizontal ramp, the slope of a crop is the inverse of its zoom.
    ramp = np.broadcast_to(np.arange(600, dtype=np.uint16)[None, :, None] * 100, (600, 600, 1))
    config = DataConfig(resolution=64, channels=1, zoom=(0.25, 1.0), flip=False, filter="bilinear")
    zooms = []
    for position in range(300):
        row = train_crop(ramp, config, generator(0, "crop", position))[32, :, 0].astype(float)
        zooms.append(100 / ((row[-8] - row[8]) / 48))
    logs = np.log(zooms) / np.log(4)  # uniform on [-1, 0]
    assert logs.min() > -1.01
    assert logs.max() < 0.01
    assert abs(logs.mean() + 0.5) < 5 * 12**-0.5 / 300**0.5
    assert abs(logs.std() - 12**-0.5) < 0.05


def test_validation_crops_tile_the_centre() -> None:
    image = coordinates(31, 40)
    config = DataConfig(resolution=8, validation_grid=3)
    rows = [np.concatenate([validation_crop(image, config, 3 * row + column) for column in range(3)], 1) for row in range(3)]
    assert np.array_equal(np.concatenate(rows, 0), image[3:27, 8:32])
    single = validation_crop(image, DataConfig(resolution=8), 0)
    assert np.array_equal(single, image[11:19, 16:24])
    assert np.array_equal(train_crop(image, DataConfig(resolution=8, crop="center", flip=False), generator(0, "crop", 0)), single)


def test_validation_crops_overlap_where_the_image_is_too_small_to_tile() -> None:
    image = coordinates(12, 20)
    config = DataConfig(resolution=8, validation_grid=3)
    corners = [tuple(int(value) for value in validation_crop(image, config, k)[0, 0, :2]) for k in range(9)]
    assert corners == [(row, column) for row in (0, 2, 4) for column in (0, 6, 12)]


@pytest.mark.parametrize("filter", ["lanczos", "bicubic", "bilinear", "box"])
@pytest.mark.parametrize("resize", [16, 23, 31, 90])
@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_what_stands_in_missing_pixels_changes_no_valid_pixel_of_a_crop(filter: str, resize: int, dtype: type) -> None:
    rng = np.random.default_rng(resize)
    image = rng.integers(0, 60000, (60, 47, 2)).astype(dtype)
    valid = np.ones((60, 47), bool)
    valid[20:24, 30:33] = valid[50:, 5] = valid[0, 0] = False
    other = np.where(valid[:, :, None], image, rng.integers(0, 60000, image.shape).astype(dtype))
    config = DataConfig(resolution=16, resize=resize, channels=2, filter=filter, validation_grid=2)  # type: ignore[arg-type]
    seen = 0
    for k in range(4):
        (one, kept), (two, again) = (transforms.validation_crop(pixels, config, k, valid) for pixels in (image, other))
        assert kept is not None and again is not None and kept.shape == (16, 16)
        assert np.array_equal(kept, again)
        assert np.array_equal(one[kept], two[kept])
        # And no more is given up than what the missing pixels reach.
        changed = (one != two).any(2)
        reached = ~kept
        assert (reached & ~changed).sum() <= 0.5 * reached.sum() if filter in ("lanczos", "bicubic") else np.array_equal(reached, changed)
        seen += int(reached.sum())
    assert seen > 0


def test_a_mask_is_cut_and_mirrored_with_its_crop() -> None:
    image = np.arange(30 * 40, dtype=np.uint16).reshape(30, 40, 1)
    valid = np.random.default_rng(0).random((30, 40)) < 0.8
    marked = np.where(valid[:, :, None], image, 0)
    for resize in (None, 30):
        config = DataConfig(resolution=12, channels=1, resize=resize)
        for position in range(20):
            crop, kept = transforms.train_crop(image, config, generator(0, "crop", position), valid)
            blanked, _ = transforms.train_crop(marked, config, generator(0, "crop", position), valid)
            assert kept is not None
            assert np.array_equal(crop * kept[:, :, None], blanked)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32])
def test_bands_are_resampled_each_on_its_own_in_their_own_type(dtype: type) -> None:
    bands = np.random.default_rng(0).integers(0, 250, (40, 50, 5)).astype(dtype)
    config = DataConfig(resolution=16, resize=20, channels=5)
    crop = validation_crop(bands, config, 0)
    assert crop.dtype == dtype
    for band in range(5):
        alone = validation_crop(bands[:, :, [band]], replace(config, channels=1), 0)
        assert np.array_equal(crop[:, :, band], alone[:, :, 0])
    if dtype != np.uint8:
        wide = validation_crop(bands.astype(np.float32), config, 0)
        assert np.abs(crop - wide).max() <= (0 if dtype == np.float32 else 0.5) + 1e-6


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (17, 61), (30, 30)])
def test_a_crop_of_a_size_of_its_own_is_cut_from_the_image_scaled_to_cover_it(size: tuple[int, int]) -> None:
    # Of floating-point values, which are not rounded between rows and columns.
    image, config = photo(77, 59, 1).astype(np.float32), DataConfig(resolution=8, resize=13, channels=1, flip=False)
    scale = max(size[0] / 77, size[1] / 59)
    height, width = (max(side, round(length * scale)) for side, length in zip(size, (77, 59), strict=True))
    whole = np.asarray(Image.fromarray(image[:, :, 0]).resize((width, height), Image.Resampling.LANCZOS))
    windows = np.lib.stride_tricks.sliding_window_view(whole, size)

    def place(crop: np.ndarray) -> tuple[int, ...]:
        differences = np.abs(windows - crop[:, :, 0]).max((2, 3))
        assert crop.shape == (*size, 1) and differences.min() < 1e-3
        return tuple(map(int, np.unravel_index(np.argmin(differences), differences.shape)))

    assert place(transforms.validation_crop(image, config, 0, size=size)[0]) == ((height - size[0]) // 2, (width - size[1]) // 2)
    seen = {place(transforms.train_crop(image, config, generator(0, "crop", n), size=size)[0]) for n in range(600)}
    assert len(seen) == windows.shape[0] * windows.shape[1]


def test_a_square_of_its_own_is_the_crop_of_a_resize_to_its_side() -> None:
    image, valid = photo(50, 37), np.random.default_rng(0).random((50, 37)) > 0.01
    plain, covered = DataConfig(resolution=24, resize=24, zoom=(1.0, 1.7)), DataConfig(resolution=8, zoom=(1.0, 1.7))
    for n in range(10):
        wanted = transforms.train_crop(image, plain, generator(0, "crop", n), valid)
        found = transforms.train_crop(image, covered, generator(0, "crop", n), valid, (24, 24))
        assert all(np.array_equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_a_zoom_shows_less_of_what_covers_a_crop_and_never_more() -> None:
    # Each pixel's value is its column.
    image = np.repeat(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], 60, axis=0)
    spans = []
    for zoom in (0.5, 1.0, 2.0):
        config = DataConfig(resolution=8, channels=1, zoom=(zoom, zoom), flip=False)
        crop = transforms.train_crop(image, config, generator(0, "crop", 0), size=(30, 60))[0].astype(int)
        spans.append(int(crop[15, -1, 0] - crop[15, 0, 0]))
    assert spans[0] == spans[1] and spans[1] >= 234 and 110 <= spans[2] <= 125
