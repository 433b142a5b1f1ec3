import math
import warnings
from collections.abc import Callable

import mpmath
import pytest
import scipy.stats
import torch
from torch import Tensor, distributions

from autoencoder.likelihood import (
    LIKELIHOODS,
    DiscretizedGaussian,
    DiscretizedLogistic,
    Gaussian,
    Laplace,
    Likelihood,
    PixelScale,
    bounded_log_scale,
    build_likelihood,
)

DISCRETIZED = (DiscretizedGaussian, DiscretizedLogistic)
SCALES = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)


def grid(levels: int, dtype: torch.dtype) -> Tensor:
    """Every level, one an image: (L, 1)."""
    return (torch.arange(levels, dtype=torch.float64) / ((levels - 1) / 2) - 1).to(dtype)[:, None]


def errors(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images on the 8-bit grid and reconstructions near them, float64."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, shape, generator=generator).double() / 127.5 - 1
    return images, images + 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("ours", "theirs"), [(Gaussian, distributions.Normal), (Laplace, distributions.Laplace)])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4, 4), (4, 1, 2, 3, 2)])
def test_densities_equal_those_of_torch_summed_over_an_image(
    ours: type[Likelihood], theirs: Callable[..., distributions.Distribution], shape: tuple[int, ...]
) -> None:
    images, reconstruction = errors(shape)
    expected = theirs(reconstruction, 0.37).log_prob(images).flatten(1).sum(1)
    torch.testing.assert_close(ours(0.37).log_prob(images, reconstruction), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("levels", [256, 65536])
@pytest.mark.parametrize("kind", DISCRETIZED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
def test_probabilities_of_all_levels_sum_to_one_and_none_exceeds_one(
    kind: type[DiscretizedGaussian], levels: int, dtype: torch.dtype, tolerance: float
) -> None:
    images = grid(levels, dtype)
    # Of the fine levels every scale, but at one of the means in turn.
    for i, scale in enumerate(SCALES):
        means = (-1.3, -1.0, 0.0039, 0.5, 1.0, 40.0)
        for mean in means if levels == 256 else means[i % 6 : i % 6 + 1]:
            log_prob = kind(scale, levels).log_prob(images, torch.full_like(images, mean))
            assert (log_prob <= 0).all()
            assert abs(log_prob.double().exp().sum().item() - 1) < tolerance, (scale, mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [256, 65536])
@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_values_and_gradients_are_finite_for_every_level_and_scale(name: str, levels: int, dtype: torch.dtype) -> None:
    images = grid(levels, dtype)
    if levels == 65536:
        # Both ends, the surroundings of the means, and a sample of the rest.
        images = torch.cat((images[:64], images[32736:32800], images[56660:56724], images[64:-64:97], images[-64:]))
    for value in SCALES:
        for mean in (-300.0, -1.0, 0.0, 0.73, 40.0):
            # A scale for all, and one for each value.
            for shape in ((), images.shape):
                scale = torch.full(shape, value, dtype=dtype, requires_grad=True)
                reconstruction = torch.full_like(images, mean).requires_grad_()
                log_prob = build_likelihood(name, scale, levels).log_prob(images, reconstruction)
                log_prob.sum().backward()
                assert log_prob.isfinite().all() and reconstruction.grad is not None and scale.grad is not None
                assert reconstruction.grad.isfinite().all() and scale.grad.isfinite().all(), (value, mean)


def exact_log_probability(kind: type[Likelihood], k: int, levels: int, mean: float, scale: float) -> float:
    """ln of the bin's mass from the two distribution functions in 200 digits."""
    with mpmath.workdps(200):
        half, center = mpmath.mpf(1) / (levels - 1), mpmath.mpf(2 * k) / (levels - 1) - 1
        if kind is DiscretizedGaussian:
            bounds = [mpmath.ncdf((center + side * half - mean) / scale) for side in (-1, 1)]
        else:
            bounds = [1 / (1 + mpmath.exp(-(center + side * half - mean) / scale)) for side in (-1, 1)]
        lower, upper = 0 if k == 0 else bounds[0], 1 if k == levels - 1 else bounds[1]
        return float(mpmath.log(upper - lower))


@pytest.mark.parametrize("levels", [256, 65536])
@pytest.mark.parametrize("kind", DISCRETIZED)
def test_log_probabilities_equal_the_distribution_function_in_many_digits(kind: type[DiscretizedGaussian], levels: int) -> None:
    # At scale 0.05 and below the difference of two such numbers in double precision is 0 for most of these levels.
    for scale in (0.0625, 0.25, 4.0, 128.0):
        for k in (0, 1, levels // 3, levels // 2, levels - 2, levels - 1):
            images = torch.tensor([[2 * k / (levels - 1) - 1]], dtype=torch.float64)
            for mean in (-0.75, 0.0, 0.984375):
                expected = exact_log_probability(kind, k, levels, mean, scale)
                actual = kind(scale, levels).log_prob(images, torch.full_like(images, mean)).item()
                assert actual == pytest.approx(expected, rel=1e-9), (scale, k, mean)


@pytest.mark.parametrize(("kind", "family"), [(DiscretizedGaussian, scipy.stats.norm), (DiscretizedLogistic, scipy.stats.logistic)])
def test_discretised_probabilities_equal_scipy(kind: type[DiscretizedGaussian], family: scipy.stats.rv_continuous) -> None:
    images = grid(256, torch.float64)
    x, mean, scale = images[:, 0].numpy(), 0.1, 0.15
    expected = family.cdf(x + 1 / 255, mean, scale) - family.cdf(x - 1 / 255, mean, scale)
    expected[0], expected[-1] = family.cdf(x[0] + 1 / 255, mean, scale), family.sf(x[-1] - 1 / 255, mean, scale)
    actual = kind(scale).log_prob(images, torch.full_like(images, mean)).exp()
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-9, atol=1e-14)


def test_fine_levels_approach_the_density_times_the_spacing() -> None:
    images, reconstruction = grid(65536, torch.float64)[1:-1], torch.full((65534, 1), 0.2, dtype=torch.float64)
    expected = distributions.Normal(reconstruction, 0.3).log_prob(images)[:, 0] + math.log(2 / 65535)
    torch.testing.assert_close(DiscretizedGaussian(0.3, 65536).log_prob(images, reconstruction), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", DISCRETIZED)
def test_the_regimes_of_a_bin_meet_without_a_step(kind: type[DiscretizedGaussian]) -> None:
    # The Gaussian changes formula with the bin's width and with its slope: the value must not jump where it does.
    images = grid(256, torch.float64)[128:129]
    for scale in torch.linspace(0.003, 0.02, 400, dtype=torch.float64).tolist():
        means = images - torch.linspace(0, 0.4, 50, dtype=torch.float64)[:, None]
        actual = kind(scale).log_prob(images.expand(50, 1), means)
        slope = actual.diff().diff()
        # Both log masses are concave in the mean.
        assert (slope < 1e-9).all(), scale


def slopes(function: Callable[[Tensor], Tensor], at: Tensor, step: float) -> Tensor:
    """Central differences of the summed values, one entry of `at` after the other."""
    result = torch.empty_like(at)
    for i in range(at.numel()):
        moved = torch.zeros_like(at)
        moved.view(-1)[i] = step
        result.view(-1)[i] = (function(at + moved) - function(at - moved)).sum() / (2 * step)
    return result


@pytest.mark.parametrize("name", list(LIKELIHOODS))
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("width", [(), (3, 1), (3, 4)])
def test_gradients_match_finite_differences(name: str, scale: float, width: tuple[int, ...]) -> None:
    images, reconstruction = errors((3, 4))
    images[0, :2] = torch.tensor([-1.0, 1.0])
    widths = torch.full(width, scale, dtype=torch.float64, requires_grad=True)
    reconstruction.requires_grad_()

    def log_prob(r: Tensor, s: Tensor) -> Tensor:
        return build_likelihood(name, s, 256).log_prob(images, r)

    log_prob(reconstruction, widths).sum().backward()
    assert reconstruction.grad is not None and widths.grad is not None
    with torch.no_grad():
        expected = slopes(lambda r: log_prob(r, widths), reconstruction, 1e-4 * scale)
        torch.testing.assert_close(reconstruction.grad, expected, rtol=1e-5, atol=1e-8 / scale)
        expected = slopes(lambda s: log_prob(reconstruction, s), widths, 1e-4 * scale)
        torch.testing.assert_close(widths.grad, expected, rtol=1e-5, atol=1e-6 / scale)


def test_gradient_of_a_far_gaussian_level_is_that_of_its_tail_in_fp32() -> None:
    # -log P falls like e**2 / 2 s**2 in the nearest edge of the bin, so that its slope is about e / s**2.
    images, scale = grid(256, torch.float32)[128:129], 1e-3
    reconstruction = torch.tensor([[1.0]], requires_grad=True)
    DiscretizedGaussian(scale).log_prob(images, reconstruction).sum().backward()
    nearest = 1 - images.item() - 1 / 255
    assert reconstruction.grad is not None
    assert reconstruction.grad.item() == pytest.approx(-nearest / scale**2, rel=1e-4)


@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_a_scale_broadcasts_and_per_image_scales_equal_separate_calls(name: str) -> None:
    images, reconstruction = errors((3, 2, 4, 4))
    scales = torch.tensor([0.05, 0.2, 0.9], dtype=torch.float64)
    together = build_likelihood(name, scales.view(3, 1, 1, 1), 256).log_prob(images, reconstruction)
    apart = [build_likelihood(name, s.item(), 256).log_prob(images[i : i + 1], reconstruction[i : i + 1]) for i, s in enumerate(scales)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_half_precision_is_raised_to_fp32_also_under_autocast_and_float64_stays(name: str) -> None:
    images, reconstruction = errors((2, 3, 8, 8))
    likelihood = build_likelihood(name, 0.1, 256)
    assert likelihood.log_prob(images, reconstruction).dtype == torch.float64
    single, half = images.float(), reconstruction.bfloat16()
    expected = likelihood.log_prob(single, half.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = likelihood.log_prob(single, half)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["gaussian", "laplace"])
def test_the_scale_from_the_moment_is_the_maximum_of_the_likelihood(name: str) -> None:
    images, reconstruction = errors((64, 10))
    kind = LIKELIHOODS[name]
    best = kind.scale_from_moment(kind.moment(images - reconstruction).mean()).requires_grad_()
    build_likelihood(name, best, 256).log_prob(images, reconstruction).sum().backward()
    assert best.grad is not None
    assert abs(best.grad.item()) < 1e-8


def test_the_scale_of_a_logistic_from_its_mean_absolute_deviation() -> None:
    # E|X| of a standard logistic, by quadrature.
    deviation = scipy.stats.logistic.expect(abs)
    scale = DiscretizedLogistic.scale_from_moment(torch.tensor(0.3 * deviation, dtype=torch.float64))
    assert scale.item() == pytest.approx(0.3, rel=1e-9)


@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_the_moment_of_a_larger_error_gives_a_proportionally_larger_scale(name: str) -> None:
    kind, error = LIKELIHOODS[name], torch.randn(5, 7, dtype=torch.float64)
    assert kind.moment(error).shape == (5,)
    torch.testing.assert_close(kind.scale_from_moment(kind.moment(3 * error)), 3 * kind.scale_from_moment(kind.moment(error)))


def test_names_discreteness_and_levels() -> None:
    assert set(LIKELIHOODS) == {"gaussian", "laplace", "discretized_gaussian", "discretized_logistic"}
    for name in LIKELIHOODS:
        likelihood = build_likelihood(name, 0.1, 65536)
        assert likelihood.name == name and likelihood.scale == 0.1
        assert likelihood.discrete == name.startswith("discretized")
        assert likelihood.levels == (65536 if likelihood.discrete else None)


def test_refusals_say_what_was_given() -> None:
    images, reconstruction = errors((2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\).*\(1, 3, 4, 4\)"):
        Gaussian(1.0).log_prob(images, reconstruction[:1])
    with pytest.raises(ValueError, match="batch axis"):
        Laplace(1.0).log_prob(images.flatten(), reconstruction.flatten())
    with pytest.raises(ValueError, match="uint8"):
        Laplace(1.0).log_prob(images.byte(), reconstruction)
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scale is"):
            DiscretizedLogistic(scale)
    with pytest.raises(ValueError, match="levels is 1"):
        DiscretizedGaussian(0.1, levels=1)
    with pytest.raises(ValueError, match=r"poisson.*laplace"):
        build_likelihood("poisson", 0.1, 256)


def decoded(shape: tuple[int, ...], log_scale: tuple[float, float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images, and reconstructions with log scales drawn from a range beside them on axis 1, float64."""
    images, reconstruction = errors(shape, seed)
    low, high = log_scale
    raw = low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return images, torch.cat((reconstruction, raw), dim=1)


@pytest.mark.parametrize("name", list(LIKELIHOODS))
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (3, 5), (2, 1, 2, 3, 2)])
def test_a_scale_for_each_value_equals_a_call_for_each_value(name: str, shape: tuple[int, ...]) -> None:
    images, made = decoded(shape, (-3.0, 0.0))
    reconstruction, raw = made.chunk(2, dim=1)
    scale = bounded_log_scale(raw, (1e-4, 100.0)).exp()
    # Well within the bounds the scale is what the decoder says.
    torch.testing.assert_close(scale, raw.exp(), rtol=1e-8, atol=0)
    apart = [
        build_likelihood(name, s.item(), 256).log_prob(x.view(1, 1), r.view(1, 1)).item()
        for x, r, s in zip(images.flatten(), reconstruction.flatten(), scale.flatten(), strict=True)
    ]
    expected = torch.tensor(apart, dtype=torch.float64).view(shape).flatten(1).sum(1)
    likelihood = PixelScale(name)
    torch.testing.assert_close(likelihood.log_prob(images, made), expected, rtol=1e-12, atol=0)
    assert torch.equal(likelihood.reconstruction(made), reconstruction)
    assert torch.equal(likelihood.moment(images - reconstruction), LIKELIHOODS[name].moment(images - reconstruction))
    assert (likelihood.name, likelihood.discrete) == (name, LIKELIHOODS[name].discrete)
    assert likelihood.levels == (256 if likelihood.discrete else None)


@pytest.mark.parametrize("name", list(LIKELIHOODS))
@pytest.mark.parametrize("log_scale", [(-9.0, -6.0), (-3.0, 0.0), (2.0, 4.6), (-12.0, -9.3), (4.6, 8.0)])
def test_gradients_to_what_the_decoder_makes_match_finite_differences(name: str, log_scale: tuple[float, float]) -> None:
    images, made = decoded((2, 2, 3), log_scale)
    images[0, 0, :2] = torch.tensor([-1.0, 1.0])
    likelihood = PixelScale(name, bounds=(1e-4, 100.0))
    made.requires_grad_()
    likelihood.log_prob(images, made).sum().backward()
    assert made.grad is not None
    with torch.no_grad():
        step = 1e-4 * likelihood.split(made)[1].min().item()
        expected = slopes(lambda d: likelihood.log_prob(images, d), made, min(step, 1e-5))
    torch.testing.assert_close(made.grad, expected, rtol=1e-5, atol=1e-7 / step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_whatever_log_scale_a_decoder_makes_values_and_gradients_are_finite(name: str, dtype: torch.dtype) -> None:
    images = grid(256, dtype)
    for raw in (-1e4, -30.0, math.log(1e-4), 0.0, math.log(100.0), 30.0, 1e4):
        made = torch.cat((torch.full_like(images, 0.73), torch.full_like(images, raw)), dim=1).requires_grad_()
        log_prob = PixelScale(name).log_prob(images, made)
        log_prob.sum().backward()
        assert made.grad is not None and log_prob.isfinite().all() and made.grad.isfinite().all(), raw


def test_a_bounded_scale_stays_within_and_its_slope_lives_on_near_the_bounds() -> None:
    low, high = 1e-3, 10.0
    raw = torch.linspace(-15, 10, 501, dtype=torch.float64, requires_grad=True)
    scale = bounded_log_scale(raw, (low, high)).exp()
    assert (scale > low * (1 - 1e-9)).all() and (scale < high * (1 + 1e-9)).all()
    assert (scale.diff() >= 0).all()
    inside = (raw > math.log(low) + 2) & (raw < math.log(high) - 2)
    torch.testing.assert_close(scale.log()[inside], raw[inside], rtol=0, atol=1e-4)
    scale.log().sum().backward()
    assert raw.grad is not None
    # Where a clamp would have no slope: one nat beyond.
    beyond = ((raw - math.log(low)).abs() < 1) | ((raw - math.log(high)).abs() < 1)
    assert (raw.grad[beyond] > 0.01).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [256, 65536])
@pytest.mark.parametrize("kind", DISCRETIZED)
def test_images_on_the_grid_are_in_the_support(kind: type[DiscretizedGaussian], levels: int, dtype: torch.dtype) -> None:
    images, likelihood = grid(levels, dtype), kind(0.1, levels)
    # Arithmetic of another order leaves a rounding.
    alike = torch.arange(levels, dtype=dtype)[:, None] / (levels - 1) * 2 - 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in (images, alike, images * (1 + torch.finfo(dtype).eps)):
            likelihood.check_images(given)
            PixelScale(kind.name, levels).check_images(given)


@pytest.mark.parametrize("kind", DISCRETIZED)
def test_images_outside_the_support_are_refused_and_ones_between_the_levels_warned_of(kind: type[DiscretizedGaussian]) -> None:
    images = grid(256, torch.float32)
    for outside in (images + 1e-3, images * 1.001, (images + 1) * 127.5):
        with pytest.raises(ValueError, match=r"outside the support of discretized_\w+, \[-1, 1\]; scale them"):
            kind(0.1).check_images(outside)
    with pytest.warns(UserWarning, match="255 of 256 values lie between the 256 levels"):
        kind(0.1).check_images((images + 1 / 255).clamp(max=1.0))
    with pytest.warns(UserWarning, match="between the 256 levels"):
        kind(0.1).check_images(grid(65536, torch.float32))
    # A density over the reals holds every image.
    for density in (Gaussian(0.1), Laplace(0.1)):
        density.check_images(images * 100)


def test_decoders_whose_channels_do_not_fit_are_told_what_does() -> None:
    images = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"\(2, 6, 4, 4\) differ in shape.*`PixelScale`"):
        Laplace(0.1).log_prob(images, torch.zeros(2, 6, 4, 4))
    for channels in (3, 4, 7):
        with pytest.raises(ValueError, match=rf"\(2, {channels}, 4, 4\).*2C channels.*one scale for all"):
            PixelScale("laplace").log_prob(images, torch.zeros(2, channels, 4, 4))
    with pytest.raises(ValueError, match="uint8"):
        PixelScale("laplace").log_prob(images.byte(), torch.zeros(2, 6, 4, 4))
    with pytest.raises(ValueError, match="bounds"):
        PixelScale("laplace", bounds=(1.0, 0.1))
    with pytest.raises(ValueError, match="100 times"):
        PixelScale("laplace", bounds=(0.05, 0.1))
