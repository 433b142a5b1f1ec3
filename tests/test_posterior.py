import math

import pytest
import torch
from torch import Tensor, distributions

from autoencoder.posterior import DiagonalGaussian
from autoencoder.prior import StandardNormal

SHAPES = [(3, 5), (2, 4, 8, 8), (2, 3, 2, 2, 2)]


def moments(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))  # type: ignore[return-value]


def theirs(mean: Tensor, logvar: Tensor) -> distributions.Independent:
    return distributions.Independent(distributions.Normal(mean, (0.5 * logvar).exp()), mean.ndim - 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_density_entropy_and_divergence_equal_those_of_torch(shape: tuple[int, ...]) -> None:
    mean, logvar = moments(shape)
    posterior, expected = DiagonalGaussian(mean, logvar), theirs(mean, logvar)
    z = torch.randn(shape, dtype=torch.float64)
    standard = theirs(torch.zeros_like(mean), torch.zeros_like(mean))

    def equal(actual: Tensor, value: Tensor) -> None:
        torch.testing.assert_close(actual, value, rtol=1e-12, atol=1e-12)

    equal(posterior.log_prob(z), expected.log_prob(z))
    equal(posterior.entropy(), expected.entropy())
    equal(posterior.kl_to_standard_normal(), distributions.kl_divergence(expected, standard))
    equal(posterior.kl_map().flatten(1).sum(1), posterior.kl_to_standard_normal())
    equal(StandardNormal().log_prob(z), standard.log_prob(z))
    equal(StandardNormal().kl(posterior), distributions.kl_divergence(expected, standard))
    equal(posterior.std, expected.base_dist.stddev)
    assert torch.equal(posterior.mode(), mean)


def test_a_sample_is_that_of_torch_for_the_same_noise() -> None:
    mean, logvar = moments((2, 4, 8, 8), torch.float32)
    torch.manual_seed(3)
    expected = distributions.Normal(mean, (0.5 * logvar).exp()).rsample()
    torch.manual_seed(3)
    actual = DiagonalGaussian(mean, logvar).sample(torch.randn(mean.shape))
    torch.testing.assert_close(actual, expected)


def test_samples_have_the_moments_of_the_posterior() -> None:
    mean, logvar = torch.tensor([[1.5, -0.5]], dtype=torch.float64), torch.tensor([[-2.0, 1.0]], dtype=torch.float64)
    draws, generator = 200_000, torch.Generator().manual_seed(0)
    noise = torch.randn(draws, 2, generator=generator, dtype=torch.float64)
    samples = DiagonalGaussian(mean.expand(draws, 2), logvar.expand(draws, 2)).sample(noise)
    variance = logvar.exp()
    # Five standard errors of a mean and of a variance.
    assert ((samples.mean(0) - mean).abs() < 5 * (variance / draws).sqrt()).all()
    assert ((samples.var(0) - variance).abs() < 5 * variance * math.sqrt(2 / draws)).all()


def test_gradients_match_finite_differences() -> None:
    mean, logvar = (x.requires_grad_() for x in moments((2, 3)))
    noise, z = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    for function in (
        lambda m, v: DiagonalGaussian(m, v).kl_to_standard_normal(),
        lambda m, v: DiagonalGaussian(m, v).log_prob(z),
        lambda m, v: DiagonalGaussian(m, v).sample(noise),
        lambda m, v: DiagonalGaussian(m, v).entropy() + 0 * m.sum(),
    ):
        assert torch.autograd.gradcheck(function, (mean, logvar))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_so_that_extreme_log_variances_stay_finite(half: torch.dtype) -> None:
    mean, logvar = torch.zeros(1, 4, dtype=half), torch.tensor([[-30.0, 20.0, 15.0, 0.0]], dtype=half)
    posterior = DiagonalGaussian(mean, logvar)
    assert posterior.mean.dtype == posterior.logvar.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kl, density = posterior.kl_to_standard_normal(), posterior.log_prob(mean)
    assert kl.dtype == density.dtype == torch.float32
    # 0.5 * (exp(v) - 1 - v) by hand; exp(20) is beyond fp16.
    expected = sum(0.5 * (math.exp(v) - 1 - v) for v in (-30.0, 20.0, 15.0, 0.0))
    assert kl.item() == pytest.approx(expected, rel=1e-6)
    assert density.isfinite().all()


def test_precision_follows_the_wider_moment_and_float64_stays() -> None:
    assert DiagonalGaussian(torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 2)).mean.dtype == torch.float64
    assert DiagonalGaussian(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.float16)).logvar.dtype == torch.float32


def test_mismatched_or_batchless_moments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 1\)"):
        DiagonalGaussian(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="batch axis"):
        DiagonalGaussian(torch.zeros(3), torch.zeros(3))
