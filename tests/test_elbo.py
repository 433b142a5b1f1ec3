import math
from dataclasses import astuple

import pytest
import torch
from torch import Tensor

from autoencoder.elbo import ElboTerms, bits_per_dim, evaluate_elbo
from autoencoder.likelihood import DiscretizedLogistic, Gaussian, Laplace
from autoencoder.posterior import DiagonalGaussian
from autoencoder.prior import StandardNormal

IMAGE, LATENT, NOISE_STD = 12, 4, 0.3


class LinearGaussian:
    """x = W z + mu + sigma * noise with z ~ N(0, I): everything is known in closed form (Tipping & Bishop 1999)."""

    def __init__(self, *, orthogonal: bool = False) -> None:
        generator = torch.Generator().manual_seed(7)
        weight = torch.randn(IMAGE, LATENT, generator=generator, dtype=torch.float64)
        # With orthogonal columns the true posterior is a diagonal Gaussian, so that a DiagonalGaussian can equal it.
        self.weight = torch.linalg.qr(weight)[0] * torch.tensor([0.4, 1.0, 2.0, 3.0]).double() if orthogonal else weight
        self.mu = torch.randn(IMAGE, generator=generator, dtype=torch.float64)
        covariance = self.weight @ self.weight.T + NOISE_STD**2 * torch.eye(IMAGE, dtype=torch.float64)
        self.evidence = torch.distributions.MultivariateNormal(self.mu, covariance)
        self.precision = torch.eye(LATENT, dtype=torch.float64) + self.weight.T @ self.weight / NOISE_STD**2
        self.images = self.mu + torch.randn(6, IMAGE, generator=generator, dtype=torch.float64)

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.weight.T + self.mu

    def true_posterior(self, images: Tensor) -> torch.distributions.MultivariateNormal:
        mean = torch.linalg.solve(self.precision, self.weight.T @ (images - self.mu).T / NOISE_STD**2).T
        return torch.distributions.MultivariateNormal(mean, precision_matrix=self.precision)

    def true_diagonal(self, images: Tensor) -> DiagonalGaussian:
        posterior = self.true_posterior(images)
        return DiagonalGaussian(posterior.mean, -self.precision.diagonal().log().expand(posterior.mean.shape))

    def arbitrary_encode(self, images: Tensor) -> DiagonalGaussian:
        mean = self.true_posterior(images).mean + 0.05 * images[:, :LATENT]
        return DiagonalGaussian(mean, torch.linspace(-5, -3, LATENT, dtype=torch.float64).expand(mean.shape))

    def evaluate(self, encode: object, *, images: Tensor | None = None, samples: int = 1, seed: int = 0) -> ElboTerms:
        return evaluate_elbo(
            self.images if images is None else images,
            encode=encode,  # type: ignore[arg-type]
            decode=self.decode,
            likelihood=Gaussian(NOISE_STD),
            prior=StandardNormal(),
            samples=samples,
            generator=torch.Generator().manual_seed(seed),
        )


@pytest.mark.parametrize("samples", [1, 3])
def test_log_weights_under_the_true_posterior_are_the_evidence_whatever_is_drawn(samples: int) -> None:
    model = LinearGaussian(orthogonal=True)
    terms = model.evaluate(model.true_diagonal, samples=samples)
    torch.testing.assert_close(terms.iwae, model.evidence.log_prob(model.images), rtol=0, atol=1e-9)
    torch.testing.assert_close(terms.effective_sample_size, torch.full((6,), float(samples), dtype=torch.float64), rtol=1e-9, atol=0)


def gap_to_true_posterior(model: LinearGaussian, q: DiagonalGaussian) -> Tensor:
    """KL(q || p(z|x)) in nats, (B,)."""
    ours = torch.distributions.MultivariateNormal(q.mean, torch.diag_embed(q.logvar.exp()))
    return torch.distributions.kl_divergence(ours, model.true_posterior(model.images))


def expected_nll(model: LinearGaussian, q: DiagonalGaussian) -> Tensor:
    """E_q[-log p(x|z)] of a linear decoder in closed form."""
    squared = (model.images - model.decode(q.mean)).square().sum(1) + (q.logvar.exp() @ model.weight.square().sum(0))
    return squared / (2 * NOISE_STD**2) + IMAGE * math.log(NOISE_STD * math.sqrt(2 * math.pi))


def test_elbo_and_gap_make_the_evidence() -> None:
    model = LinearGaussian()
    q = model.arbitrary_encode(model.images)
    samples = 4000
    terms = model.evaluate(model.arbitrary_encode, samples=samples)
    gap = gap_to_true_posterior(model, q)
    exact = -expected_nll(model, q) - terms.kl
    # The identity holds to rounding with the closed form of the NLL; the estimate agrees with it within its noise.
    torch.testing.assert_close(exact + gap, model.evidence.log_prob(model.images), rtol=0, atol=1e-9)
    assert (gap > 0.1).all()
    draws = torch.stack([model.evaluate(model.arbitrary_encode, seed=s).nll for s in range(200)])
    standard_error = draws.std(0) / math.sqrt(samples)
    assert ((terms.elbo - exact).abs() < 5 * standard_error).all()


def test_elbo_of_exact_expectation_points_is_the_evidence_less_the_gap() -> None:
    # The NLL of a linear decoder is quadratic in z: the 2 q sigma points mean +- sqrt(q) std average it exactly.
    model = LinearGaussian()
    q = model.arbitrary_encode(model.images)
    points = iter(math.sqrt(LATENT) * sign * torch.eye(LATENT, dtype=torch.float64)[i] for i in range(LATENT) for sign in (-1, 1))

    class SigmaPoints(DiagonalGaussian):
        def sample(self, noise: Tensor) -> Tensor:
            return super().sample(next(points).expand(noise.shape))

    terms = model.evaluate(lambda x: SigmaPoints(q.mean, q.logvar), samples=2 * LATENT)
    gap = gap_to_true_posterior(model, q)
    torch.testing.assert_close(terms.elbo + gap, model.evidence.log_prob(model.images), rtol=0, atol=1e-9)


def test_importance_weighting_tightens_with_samples_and_stays_below_the_evidence() -> None:
    model, repeats = LinearGaussian(), 3000
    image = model.images[:1].expand(repeats, IMAGE)
    bounds = [model.evaluate(model.arbitrary_encode, images=image, samples=k, seed=k).iwae for k in (1, 4, 16)]
    evidence = model.evidence.log_prob(model.images[:1]).item()
    means = [b.mean().item() for b in bounds]
    errors = [b.std().item() / math.sqrt(repeats) for b in bounds]
    for i in range(2):
        assert means[i + 1] - means[i] > 3 * math.hypot(errors[i], errors[i + 1])
    assert means[-1] < evidence + 3 * errors[-1]


def test_one_sample_of_the_importance_weighted_bound_is_an_elbo_estimate() -> None:
    model = LinearGaussian()
    terms = model.evaluate(model.arbitrary_encode)
    q = model.arbitrary_encode(model.images)
    z = q.sample(torch.randn(q.mean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    weight = Gaussian(NOISE_STD).log_prob(model.images, model.decode(z)) + StandardNormal().log_prob(z) - q.log_prob(z)
    torch.testing.assert_close(terms.iwae, weight)
    torch.testing.assert_close(terms.elbo, -terms.nll - terms.kl)
    assert torch.equal(terms.kl, q.kl_to_standard_normal())


def test_effective_sample_size_of_known_weights() -> None:
    # Two samples whose weights are as 3 to 1: (3 + 1)**2 / (9 + 1).
    weights = iter([math.log(3.0), 0.0])

    class Known:
        def log_prob(self, z: Tensor) -> Tensor:
            return posterior.log_prob(z) + next(weights)

    images, posterior = torch.zeros(2, 3), DiagonalGaussian(torch.zeros(2, 5), torch.zeros(2, 5))
    terms = evaluate_elbo(
        images, encode=lambda x: posterior, decode=lambda z: torch.zeros(2, 3), likelihood=Laplace(0.5), prior=Known(), samples=2
    )
    torch.testing.assert_close(terms.effective_sample_size, torch.full((2,), 1.6))
    # A prior without a closed form has its divergence from the samples: the mean of minus the two log ratios.
    torch.testing.assert_close(terms.kl, torch.full((2,), -math.log(3.0) / 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("image", "latent"), [((3, 8, 8), (4, 2, 2)), ((7,), (2,)), ((1, 4, 4, 4), (5,))])
def test_any_shapes_and_precisions(image: tuple[int, ...], latent: tuple[int, ...], dtype: torch.dtype) -> None:
    images = torch.zeros(3, *image, dtype=dtype)
    terms = evaluate_elbo(
        images,
        encode=lambda x: DiagonalGaussian(torch.zeros(3, *latent, dtype=dtype), torch.zeros(3, *latent, dtype=dtype)),
        decode=lambda z: z.flatten(1).mean(1).view(3, *[1] * len(image)).expand(images.shape).to(dtype),
        likelihood=DiscretizedLogistic(0.1),
        prior=StandardNormal(),
        samples=2,
    )
    for value in astuple(terms):
        assert value.shape == (3,) and value.isfinite().all()
        assert value.dtype == torch.promote_types(dtype, torch.float32)


def test_the_same_generator_state_gives_the_same_estimate_and_leaves_the_global_one_alone() -> None:
    model = LinearGaussian()
    before = torch.get_rng_state()
    first, again, other = (model.evaluate(model.arbitrary_encode, seed=s) for s in (5, 5, 6))
    assert torch.equal(first.nll, again.nll) and not torch.equal(first.nll, other.nll)
    assert torch.equal(before, torch.get_rng_state())


def test_bits_per_dim_of_a_uniform_code_is_eight() -> None:
    # 256 equally likely levels: log p = -D ln 256.
    assert bits_per_dim(-768 * math.log(256), 768) == pytest.approx(8, rel=1e-12)
    torch.testing.assert_close(bits_per_dim(torch.tensor([-10 * math.log(2)]), 5), torch.tensor([2.0]))


def refused(message: str, **changed: object) -> None:
    arguments: dict[str, object] = {
        "encode": lambda x: DiagonalGaussian(torch.zeros(2, 3), torch.zeros(2, 3)),
        "decode": lambda z: torch.zeros(2, 5),
        "likelihood": Gaussian(1.0),
        "prior": StandardNormal(),
    }
    with pytest.raises(ValueError, match=message):
        evaluate_elbo(changed.pop("images", torch.zeros(2, 5)), **(arguments | changed))  # type: ignore[arg-type]


def test_refusals_say_what_does_not_fit() -> None:
    refused("samples is 0", samples=0)
    refused("batch axis", images=torch.zeros(5))
    refused("images: 1 of 10 values are not finite", images=torch.tensor([[math.nan, *[0.0] * 4], [0.0] * 5]))
    refused("3 posteriors of 2 images", encode=lambda x: DiagonalGaussian(torch.zeros(3, 3), torch.zeros(3, 3)))
    refused("posterior mean: 6 of 6", encode=lambda x: DiagonalGaussian(torch.full((2, 3), math.inf), torch.zeros(2, 3)))
    refused("posterior log-variance: 6 of 6", encode=lambda x: DiagonalGaussian(torch.zeros(2, 3), torch.full((2, 3), math.nan)))
    refused(r"decode made \(2, 4\)", decode=lambda z: torch.zeros(2, 4))
    refused("reconstruction: 10 of 10", decode=lambda z: torch.full((2, 5), math.nan))

    class Misshapen(StandardNormal):
        def log_prob(self, z: Tensor) -> Tensor:
            return super().log_prob(z).sum()

    class Infinite(StandardNormal):
        def kl(self, posterior: DiagonalGaussian) -> Tensor:
            return super().kl(posterior) * math.inf

    refused(r"log p\(z\) has shape \(\)", prior=Misshapen())
    refused("KL: 2 of 2", prior=Infinite(), encode=lambda x: DiagonalGaussian(torch.ones(2, 3), torch.zeros(2, 3)))
