import math

import numpy as np
import pytest
import scipy.stats
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from autoencoder import metrics
from autoencoder.metrics import bootstrap_interval, psnr, ssim


def pictures(channels: int = 3, side: int = 32) -> tuple[Tensor, Tensor]:
    """8-bit pictures (B, C, H, W), smooth and noisy, and distorted ones."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, side)[None, None, :, None] * np.ones((4, channels, side, side))
    first = np.clip(ramp + rng.normal(0, np.array([1, 20, 60, 100])[:, None, None, None], ramp.shape), 0, 255).astype(np.uint8)
    second = np.clip(first * 0.9 + rng.normal(0, 15, ramp.shape), 0, 255).astype(np.uint8)
    return torch.from_numpy(first), torch.from_numpy(second)


def images(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_and_ssim_equal_scikit_image_on_eight_bit_pictures(channels: int) -> None:
    first, second = pictures(channels)
    a, b = (x.permute(0, 2, 3, 1).numpy() for x in (first, second))
    expected_psnr = [peak_signal_noise_ratio(x, y) for x, y in zip(a, b, strict=True)]
    options = {"channel_axis": 2, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    expected_ssim = [structural_similarity(x, y, **options) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(images(first), images(second)).numpy(), expected_psnr, rtol=1e-6)
    np.testing.assert_allclose(ssim(images(first), images(second)).numpy(), expected_ssim, atol=1e-5)


def test_both_metrics_see_clamped_rounded_pixels() -> None:
    first, second = (images(x) for x in pictures())
    beyond = torch.where(second >= 1, second + 3, second) + 0.3 / 127.5 * (second < 0.9)
    for metric in (psnr, ssim):
        assert torch.equal(metric(first, beyond), metric(first, second))


def test_identical_pictures_have_infinite_psnr_and_ssim_one() -> None:
    first = images(pictures()[0])
    assert torch.isposinf(psnr(first, first)).all()
    torch.testing.assert_close(ssim(first, first), torch.ones(4))


def test_psnr_of_one_level_everywhere() -> None:
    first = images(torch.full((2, 3, 8, 8), 100, dtype=torch.uint8))
    torch.testing.assert_close(psnr(first, first + 1 / 127.5), torch.full((2,), 20 * math.log10(255)))


def test_values_of_an_image_do_not_depend_on_its_batch() -> None:
    first, second = (images(x) for x in pictures())
    for metric in (psnr, ssim):
        torch.testing.assert_close(metric(first, second)[2:3], metric(first[2:3], second[2:3]))


@pytest.mark.parametrize(("height", "width", "window"), [(8, 20, 7), (5, 5, 5), (3, 4, 3), (11, 11, 11)])
def test_small_images_take_the_largest_odd_window_that_fits(height: int, width: int, window: int) -> None:
    rng = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, 256, (2, 3, height, width), generator=rng) for _ in range(2))
    expected = metrics.structural_similarity(first.float(), second.float(), window=window, data_range=255)
    torch.testing.assert_close(ssim(images(first), images(second)), expected)


def test_refusals_say_what_was_given() -> None:
    first = torch.zeros(2, 3, 8, 8)
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\).*\(1, 3, 8, 8\)"):
            metric(first, first[:1])
    for window in (4, 9, 0):
        with pytest.raises(ValueError, match=f"window {window} pixels"):
            metrics.structural_similarity(first, first, window=window, data_range=2)
    with pytest.raises(ValueError, match=r"\(2, 3, 64\)"):
        metrics.structural_similarity(first.flatten(2), first.flatten(2), window=3, data_range=2)


def test_bootstrap_interval_agrees_with_scipy_and_with_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = bootstrap_interval(values, seed=0, level=0.9)
    options = {"confidence_level": 0.9, "method": "percentile", "n_resamples": 4000}
    reference = scipy.stats.bootstrap((values,), np.mean, rng=1, **options).confidence_interval
    standard_error = values.std() / 20
    assert low == pytest.approx(reference.low, abs=0.15 * standard_error)
    assert high == pytest.approx(reference.high, abs=0.15 * standard_error)
    assert (high - low) / standard_error == pytest.approx(2 * 1.645, rel=0.1)


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng, covered, trials = np.random.default_rng(2), 0, 100
    for _ in range(trials):
        low, high = bootstrap_interval(rng.normal(size=40), level=0.8)
        covered += low <= 0 <= high
    # Binomial(100, 0.8) is outside this once in about ten thousand.
    assert 64 <= covered <= 94


def test_crops_of_one_photo_are_drawn_together() -> None:
    # 50 photos whose 16 crops are alike hold 50 independent values, not 800.
    photos = np.random.default_rng(3).normal(size=50)
    values, groups = np.repeat(photos, 16), np.repeat(np.arange(50), 16)
    assert bootstrap_interval(values, groups, seed=4) == pytest.approx(bootstrap_interval(photos, seed=4))
    low, high = bootstrap_interval(values, seed=4)
    grouped = bootstrap_interval(torch.from_numpy(values), torch.from_numpy(groups), seed=4)
    assert (grouped[1] - grouped[0]) / (high - low) == pytest.approx(4, rel=0.15)


def test_bootstrap_interval_is_reproducible_and_knows_its_limits() -> None:
    assert bootstrap_interval([1.0, 2.0, 4.0], seed=1) == bootstrap_interval([1.0, 2.0, 4.0], seed=1)
    assert bootstrap_interval([math.inf, math.inf]) == (math.inf, math.inf)
    for values, groups in (([1.0], None), ([1.0, 2.0], [0, 0]), ([1.0, math.nan], None)):
        assert all(math.isnan(bound) for bound in bootstrap_interval(values, groups))
    for values, groups, level, message in (([], None, 0.9, "values"), ([1.0, 2.0], [0], 0.9, "groups"), ([1.0, 2.0], None, 1.0, "level")):
        with pytest.raises(ValueError, match=f"^{message} "):
            bootstrap_interval(values, groups, level=level)
