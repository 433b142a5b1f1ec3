"""Pixels to images and back."""

import pytest
import torch

from autoencoder.data.pixels import levels_of, to_images, to_pixels, to_values
from autoencoder.pixel_recipe import PixelRecipe


@pytest.mark.parametrize(("dtype", "levels"), [(torch.uint8, 256), (torch.uint16, 65536)])
def test_every_level_survives_and_the_levels_span_the_interval_evenly(dtype: torch.dtype, levels: int) -> None:
    pixels = torch.arange(levels).to(dtype).reshape(1, 1, 16, -1)
    images = to_images(pixels)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert torch.allclose(images.double().flatten(), torch.linspace(-1, 1, levels, dtype=torch.float64), atol=1e-7, rtol=0)
    assert torch.equal(to_pixels(images, levels), pixels)
    assert torch.equal(to_pixels(images.double(), levels), pixels)


def test_eight_bits_widened_by_257_are_the_same_images() -> None:
    pixels = torch.arange(256)
    assert torch.equal(to_images(pixels.to(torch.uint8)), to_images((257 * pixels).to(torch.uint16)))


def test_floating_point_input_is_images_already() -> None:
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    assert to_images(images) is images


def test_to_pixels_clamps_and_rounds_to_the_nearest_level() -> None:
    images = torch.tensor([-1.7, -1.0, -1 + 1.4 / 127.5, -1 + 1.6 / 127.5, 1.0, 3.0])
    assert to_pixels(images).tolist() == [0, 0, 1, 2, 255, 255]
    assert to_pixels(torch.tensor([0.5, -0.5], dtype=torch.bfloat16)).tolist() == [191, 64]


def test_other_dtypes_and_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="int64"):
        to_images(torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="1024"):
        to_pixels(torch.zeros(1), levels=1024)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.float32])
def test_a_stated_range_spans_the_interval_clips_and_comes_back(dtype: torch.dtype) -> None:
    recipe = PixelRecipe(channels=2, low=(10.0, 0.0), high=(20.0, 100.0), levels=0)
    values = torch.tensor([[0, 10, 15, 20, 99], [0, 25, 50, 100, 101]]).to(dtype).reshape(1, 2, 1, 5)
    images = to_images(values, recipe)
    assert images.dtype == torch.float32
    assert images.flatten().tolist() == [-1, -1, 0, 1, 1, -1, -0.5, 0, 1, 1]
    assert to_values(images, recipe).flatten().tolist() == [10, 10, 15, 20, 20, 0, 25, 50, 100, 100]
    assert to_values(2 * images, recipe).flatten().tolist() == [10, 10, 15, 20, 20, 0, 0, 50, 100, 100]


@pytest.mark.parametrize(("low", "high"), [(0, 255), (0, 10000), (-3000, 9000), (0, 65535)])
def test_the_levels_of_an_integer_range_are_those_of_discretised_likelihoods(low: int, high: int) -> None:
    recipe = PixelRecipe(channels=1, low=(float(low),), high=(float(high),), levels=high - low + 1)
    dtype = torch.int16 if low < 0 else torch.uint16
    pixels = torch.arange(low, high + 1).to(dtype).reshape(1, 1, 1, -1)
    images = to_images(pixels, recipe)
    assert levels_of(pixels, recipe) == recipe.levels == recipe.steps
    grid = torch.linspace(-1, 1, recipe.levels, dtype=torch.float64)
    assert torch.allclose(images.flatten().double(), grid, atol=1e-7, rtol=0)
    assert torch.equal(to_values(images, recipe).round().to(dtype), pixels)


def test_levels_are_counted_only_where_every_band_has_the_same_and_values_are_integers() -> None:
    whole, parts = torch.zeros(1, 2, 1, 1, dtype=torch.uint16), torch.zeros(1, 2, 1, 1)
    for low, high, levels in (((0, 5), (10, 15), 11), ((0, 0), (10, 20), 0), ((0.5, 0.5), (10.5, 10.5), 0)):
        recipe = PixelRecipe(channels=2, low=low, high=high)
        assert (levels_of(whole, recipe), levels_of(parts, recipe)) == (levels, 0)
    assert levels_of(whole, PixelRecipe(channels=2)) == levels_of(whole) == 65536


def test_missing_pixels_are_grey_in_every_channel() -> None:
    recipe = PixelRecipe(channels=2, low=(100.0, 100.0), high=(200.0, 300.0), nodata=0.0)
    pixels = torch.full((2, 2, 4, 4), float("nan"))
    pixels[:, :, :2] = 150
    valid = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    valid[:, :, :2] = True
    images = to_images(pixels, recipe, valid)
    assert (images[:, :, 2:] == 0).all()
    assert torch.equal(images[:, :, :2], to_images(pixels[:, :, :2], recipe))
    assert torch.equal(
        to_images(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), PixelRecipe(), torch.zeros(1, 1, 2, 2, dtype=torch.bool)),
        torch.zeros(1, 3, 2, 2),
    )
