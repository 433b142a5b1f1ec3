"""Missing values and ranges, against written-out references: what is missing counts nowhere, what is stated is what is measured."""

import math
import pickle

import numpy as np
import pytest
import pytorch_msssim
import torch
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor, nn

from autoencoder import artifact, comparison
from autoencoder.account import Measure
from autoencoder.config import DataConfig
from autoencoder.data.pixels import to_images, to_values
from autoencoder.diagnostics import sharpness
from autoencoder.likelihood import LIKELIHOODS, DiscretizedLogistic, Gaussian, Laplace, PixelScale, build_likelihood
from autoencoder.metrics import psnr, ssim, structural_similarity
from autoencoder.objective import Objective
from autoencoder.objective_config import LikelihoodConfig, ObjectiveConfig
from autoencoder.pixel_recipe import PixelRecipe, recipe_of
from autoencoder.posterior import DiagonalGaussian
from autoencoder.preview import Preview
from autoencoder.provenance import QUALITY_8_BIT, QUALITY_OF_RANGE
from autoencoder.report.pictures import GAP
from autoencoder.runtime.errors import ConfigError
from autoencoder.scale import AnalyticScale
from autoencoder.shuffling import LatentShuffle
from tests.test_diagnostics import batches

LEFT = (slice(None), slice(None), slice(None), slice(0, 5))
"""The pixels that are there, of images of 8 x 8."""


def left_half(images: int = 3) -> Tensor:
    valid = torch.zeros(images, 1, 8, 8, dtype=torch.bool)
    valid[LEFT] = True
    return valid


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """Images of five bands on a grid of 10,001 levels, 0 where missing, and reconstructions that are far off there."""
    torch.manual_seed(0)
    images = (torch.rand(3, 5, 8, 8, dtype=torch.float64) * 10_000).round() / 5_000 - 1
    reconstruction = images + 0.05 * torch.randn_like(images)
    valid = left_half()
    return images.where(valid, 0.0), reconstruction.where(valid, 7.0)


@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_observed_values_have_the_likelihood_of_an_image_of_them_alone(pair: tuple[Tensor, Tensor], name: str) -> None:
    images, reconstruction = pair
    reconstruction = reconstruction.requires_grad_()
    likelihood = build_likelihood(name, 0.1, 10_001)
    found = likelihood.observed(left_half()).log_prob(images, reconstruction)
    torch.testing.assert_close(found, likelihood.log_prob(images[LEFT], reconstruction[LEFT]))
    (gradient,) = torch.autograd.grad(found.sum(), reconstruction)
    assert gradient.isfinite().all()
    assert not gradient[~left_half().expand_as(gradient)].any()
    assert gradient[left_half().expand_as(gradient)].all()


def test_scales_of_missing_values_do_not_count(pair: tuple[Tensor, Tensor]) -> None:
    images, reconstruction = pair
    decoded = torch.cat((reconstruction, torch.randn_like(reconstruction) - 3), dim=1)
    likelihood = PixelScale("discretized_logistic", 10_001)
    found = likelihood.observed(left_half()).log_prob(images, decoded)
    torch.testing.assert_close(found, likelihood.log_prob(images[LEFT], decoded[LEFT]))


def test_mid_grey_of_missing_values_is_on_no_grid_and_is_not_looked_at(
    pair: tuple[Tensor, Tensor], recwarn: pytest.WarningsRecorder
) -> None:
    likelihood = DiscretizedLogistic(0.1, 256)
    images = to_images(torch.randint(0, 256, (3, 5, 8, 8), dtype=torch.uint8), None, left_half())
    likelihood.observed(left_half()).check_images(images)
    assert not recwarn
    with pytest.warns(UserWarning, match="lie between the 256 levels"):
        likelihood.check_images(images)


@pytest.mark.parametrize("levels", [3, 10_001, 65_536])
@pytest.mark.parametrize("name", ["discretized_logistic", "discretized_gaussian"])
def test_probabilities_of_any_number_of_levels_sum_to_one(name: str, levels: int) -> None:
    images = torch.linspace(-1, 1, levels, dtype=torch.float64)[:, None]
    log_prob = build_likelihood(name, 0.05, levels).log_prob(images, torch.full_like(images, 0.3))
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-9)


class Distance(nn.Module):
    """A sum over places, as a mean over them."""

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        return (images - reconstruction).abs().pow(1.5).flatten(1).mean(1)


@pytest.mark.parametrize("convention", ["elbo", "ldm", "diffusers"])
def test_the_loss_is_that_of_the_observed_part_alone(pair: tuple[Tensor, Tensor], convention: str) -> None:
    images, reconstruction = pair
    posterior = DiagonalGaussian(torch.randn(3, 2, 2, 2, dtype=torch.float64), torch.randn(3, 2, 2, 2, dtype=torch.float64))
    config = ObjectiveConfig(convention=convention, ldm_logvar=0.2 if convention == "ldm" else 0.0)  # type: ignore[arg-type]
    objective, scale = Objective(config, Distance()), torch.tensor(0.2, dtype=torch.float64)
    found = objective(images, posterior, reconstruction, scale=scale, kl_weight=0.5, valid=left_half())
    part = objective(images[LEFT], posterior, reconstruction[LEFT], scale=scale, kl_weight=0.5)
    torch.testing.assert_close(found.loss, part.loss)
    share = found.named.pop("valid_share")
    torch.testing.assert_close(share, torch.full_like(share, 5 / 8))
    # Means over all places, missing ones without error, and means over the observed values.
    for name in ("scale_moment", "perceptual"):
        torch.testing.assert_close(found.named.pop(name) / share, part.named.pop(name), check_dtype=False)
    assert found.named.keys() == part.named.keys()
    for name, value in found.named.items():
        torch.testing.assert_close(value, part.named[name])


def test_a_padding_image_without_a_pixel_has_finite_terms() -> None:
    posterior = DiagonalGaussian(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2))
    decoded = torch.randn(1, 3, 8, 8, requires_grad=True)
    nothing = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    terms = Objective(ObjectiveConfig(), None)(
        torch.zeros(1, 3, 8, 8), posterior, decoded, scale=torch.tensor(0.1), kl_weight=1.0, valid=nothing
    )
    assert all(value.isfinite().all() for value in (terms.loss, *terms.named.values()))
    assert not torch.autograd.grad(terms.loss.sum(), decoded)[0].any()


def test_the_analytic_scale_weighs_steps_by_what_was_observed_in_them() -> None:
    scale = AnalyticScale(LikelihoodConfig(name="laplace", decay=0.5), torch.device("cpu"))
    go, before = torch.tensor(0.0), float(scale.value)
    scale.update(torch.tensor(0.0), go, torch.tensor(0.0))
    assert float(scale.value) == before
    # Half of the values observed with mean error 0.2, then all with 0.4.
    scale.update(torch.tensor(0.5 * 0.2), go, torch.tensor(0.5))
    assert float(scale.value) == pytest.approx(0.2)
    scale.update(torch.tensor(0.4), go, torch.tensor(1.0))
    assert float(scale.value) == pytest.approx((0.5 * 0.5 * 0.2 + 0.4) / (0.5 * 0.5 + 1))


RANGED = PixelRecipe(channels=3, low=(100.0,) * 3, high=(4100.0,) * 3, levels=4001)


def test_psnr_is_that_of_source_values_with_the_stated_range_as_peak() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(100, 4101, (2, 3, 16, 16)).astype(np.uint16)
    images = to_images(torch.from_numpy(pixels), RANGED)
    reconstruction = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    made = to_values(reconstruction, RANGED).numpy()
    wanted = [peak_signal_noise_ratio(pixels[i].astype(float), made[i].astype(float), data_range=4000) for i in range(2)]
    np.testing.assert_allclose(psnr(images, reconstruction, eight_bit=False).numpy(), wanted, rtol=1e-5)


def test_psnr_of_a_range_tells_errors_below_8_bits_apart() -> None:
    images = torch.zeros(1, 1, 8, 8)
    found = psnr(images, images + 1e-4, eight_bit=False)
    assert found.item() == pytest.approx(20 * math.log10(2 / 1e-4), rel=1e-4)
    assert math.isinf(psnr(images, images + 1e-4).item())


@pytest.mark.parametrize("eight_bit", [True, False])
def test_missing_pixels_count_in_no_figure(pair: tuple[Tensor, Tensor], eight_bit: bool) -> None:
    images, reconstruction = pair
    valid = left_half()
    torch.testing.assert_close(
        psnr(images, reconstruction, eight_bit=eight_bit, valid=valid), psnr(images[LEFT], reconstruction[LEFT], eight_bit=eight_bit)
    )
    torch.testing.assert_close(sharpness(images, reconstruction, valid), sharpness(images[LEFT], reconstruction[LEFT]))
    other = reconstruction.where(valid, -0.3)
    for measure in (psnr, ssim):
        first, second = (measure(images, made, eight_bit=eight_bit, valid=valid) for made in (reconstruction, other))
        assert torch.equal(first, second)


def test_ssim_without_missing_pixels_is_that_of_the_library(pair: tuple[Tensor, Tensor]) -> None:
    images, reconstruction = pair
    everything = torch.ones(3, 1, 8, 8, dtype=torch.bool)
    found = structural_similarity(images, reconstruction, window=7, data_range=2.0, valid=everything)
    wanted = pytorch_msssim.ssim(images, reconstruction, data_range=2.0, size_average=False, win_size=7, win_sigma=1.5 * 7 / 11)
    torch.testing.assert_close(found, wanted)


def test_ssim_of_observed_pixels_is_the_written_out_one() -> None:
    rng = np.random.default_rng(0)
    x, y, valid = rng.uniform(-1, 1, (9, 9)), rng.uniform(-1, 1, (9, 9)), rng.random((9, 9)) > 0.4
    window, c1, c2 = 5, (0.01 * 2) ** 2, (0.03 * 2) ** 2
    line = np.exp(-((np.arange(window) - 2) ** 2) / (2 * (1.5 * window / 11) ** 2))
    kernel = np.outer(line, line) / np.outer(line, line).sum()
    total = weights = 0.0
    for row in range(5):
        for column in range(5):
            place = (slice(row, row + window), slice(column, column + window))
            w = kernel * valid[place]
            share = w.sum()
            w, a, b = w / share, x[place], y[place]
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb, vab = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
            total += share * (2 * ma * mb + c1) * (2 * vab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
            weights += share
    tensors = (torch.from_numpy(v)[None, None] for v in (x, y))
    found = structural_similarity(*tensors, window=window, data_range=2.0, valid=torch.from_numpy(valid)[None, None])
    assert found.item() == pytest.approx(total / weights, rel=1e-9)


def test_shuffled_images_keep_what_is_missing_of_them() -> None:
    (batch,) = batches(4, 1, 4)
    batch.valid = torch.zeros(batch.pixels.shape, dtype=torch.bool)
    batch.valid[..., 0] = True
    likelihood = Gaussian(0.5)
    recipe = PixelRecipe(channels=1, nodata=0.0)
    images = to_images(batch.pixels, recipe, batch.valid)
    shuffle = LatentShuffle(recipe)
    shuffle.add(batch, images, -likelihood.observed(batch.valid).log_prob(images, images))
    found = shuffle.measure(lambda latents: latents, likelihood, torch.device("cpu"), 3)
    assert found is not None
    column = images[:4, ..., :1]
    wanted = -likelihood.log_prob(column, column.roll(-1, 0)).mean()
    assert found.nll_nats == pytest.approx(wanted.item(), rel=1e-5)


def test_shuffled_images_of_16_bits_reach_other_processes() -> None:
    (batch,) = batches(4, 1, 4)
    batch.pixels = (257 * batch.pixels.int()).to(torch.uint16)
    images = to_images(batch.pixels)
    shuffle = LatentShuffle(PixelRecipe(channels=1, levels=65_536))
    shuffle.add(batch, images, -Gaussian(0.5).log_prob(images, images))
    sent = pickle.loads(pickle.dumps(shuffle))  # as torch.distributed sends objects
    first, second = (s.measure(lambda latents: latents, Gaussian(0.5), torch.device("cpu"), 3) for s in (shuffle, sent))
    assert first == second


def test_ordinary_images_have_the_dictionary_that_their_hashes_are_of() -> None:
    ordinary = artifact.preprocessing(DataConfig(resolution=16), 256)
    assert ordinary["pixels"] == {"range": [-1.0, 1.0], "levels": 256, "channels": 3}
    assert ordinary.keys() == {"pixels", "crops"}
    shown = artifact.preprocessing(DataConfig(resolution=16, channels=5, preview=(4, 2, 0), stretch=(2, 98)), 256)
    assert shown["pixels"] == {"range": [-1.0, 1.0], "levels": 256, "channels": 5}
    assert Preview.from_json(shown) == Preview(channels=(4, 2, 0), stretch=(2, 98))
    assert Preview.from_json(None) == Preview.from_json(ordinary) == Preview()


def test_accounts_of_other_ranges_are_not_compared() -> None:
    measure, told = Measure.of(Laplace(0.1), 12), {"data": {"fingerprint": "a"}, "crops": {}}
    recipes = [recipe_of(DataConfig(channels=3, low=0, high=high), levels) for high, levels in ((1000, 1001), (2000, 2001))]
    first, second = ({**told, "pixels": recipe.to_json()} for recipe in recipes)
    comparison.check("F", {"measure": measure.to_json(), "provenance": first}, measure=measure, provenance=first)
    for other in (second, told):
        with pytest.raises(ConfigError, match="was measured on other pixels"):
            comparison.check("F", {"measure": measure.to_json(), "provenance": first}, measure=measure, provenance=other)
    assert QUALITY_8_BIT != QUALITY_OF_RANGE


def test_previews_stretch_both_alike_by_the_originals_and_leave_missing_pixels_grey() -> None:
    images = torch.linspace(-0.5, 0.3, 64).view(1, 1, 8, 8).repeat(1, 4, 1, 1)
    valid = left_half(1)
    preview = Preview(channels=(2,), stretch=(0, 100))
    seen = images[valid.expand_as(images)]
    low, high = seen.min(), seen.max()
    original, other = preview.pixels(images, 0.5 * images, valid=valid)
    for shown, values in ((original, images), (other, 0.5 * images)):
        wanted = ((values[:, 2:3] - low) / (high - low) * 255).clamp(0, 255).round()
        assert (shown.float() - wanted).abs()[valid].max() <= 1
        assert (shown[~valid] == GAP).all()
    assert original[valid].min() == 0
    assert original[valid].max() == 255


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (4, 3), (13, 3)])
def test_previews_show_the_first_three_channels_or_one(channels: int, shown: int) -> None:
    pixels = torch.randint(0, 256, (2, channels, 4, 4), dtype=torch.uint8)
    (picture,) = Preview().pixels(to_images(pixels))
    assert torch.equal(picture, pixels[:, :shown])


def test_a_flat_channel_is_not_stretched_to_noise() -> None:
    images = 1e-6 * torch.randn(1, 1, 8, 8)
    (picture,) = Preview(stretch=(2, 98)).pixels(images)
    assert int(picture.max()) - int(picture.min()) <= 2
