"""Pixels to images and back."""

import pytest
import torch

from autoencoder.data.pixels import to_images, to_pixels


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
