import math

import pytest
import torch
from torch import Tensor

from autoencoder.elbo import ElboTerms, bits_per_dim, evaluate_elbo
from autoencoder.likelihood import DiscretizedLogistic, Gaussian, Laplace, PixelScale
from autoencoder.posterior import DiagonalGaussian
from autoencoder.prior import StandardNormal

IMAGE, LATENT, NOISE_STD = 12, 4, 0.3


class LinearGaussian:
    """x = W z + mu + sigma * noise with z ~ N(0, I): everything is known in closed form (Tipping & Bishop 1999)."""

    def __init__(self, seed: int = 7, *, orthogonal: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(IMAGE, LATENT, generator=generator, dtype=torch.float64)
        # With orthogonal columns the true posterior is a diagonal Gaussian, so that a DiagonalGaussian can equal it.
        self.weight = torch.linalg.qr(weight)[0] * torch.tensor([0.4, 1.0, 2.0, 3.0]).double() if orthogonal else weight
        self.mu = torch.randn(IMAGE, generator=generator, dtype=torch.float64)
        covariance = self.weight @ self.weight.T + NOISE_STD**2 * torch.eye(IMAGE, dtype=torch.float64)
        self.evidence = torch.distributions.MultivariateNormal(self.mu, covariance)
        self.precision = torch.eye(LATENT, dtype=torch.float64) + self.weight.T @ self.weight / NOISE_STD**2
        self.images = self.mu + torch.randn(6, IMAGE, generator=generator, dtype=torch.float64)
        self.random_logvar = 2 * torch.randn(6, LATENT, generator=generator, dtype=torch.float64) - 4

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

    def random_posterior(self) -> DiagonalGaussian:
        mean = self.true_posterior(self.images).mean
        return DiagonalGaussian(mean + self.random_logvar.sin(), self.random_logvar)

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
@pytest.mark.parametrize("seed", range(3))
def test_log_weights_under_the_true_posterior_are_the_evidence_whatever_is_drawn(seed: int, samples: int) -> None:
    model = LinearGaussian(seed, orthogonal=True)
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


@pytest.mark.parametrize("seed", range(10))
def test_elbo_of_exact_expectation_points_is_the_evidence_less_the_gap(seed: int) -> None:
    # The NLL of a linear decoder is quadratic in z: the 2 q sigma points mean +- sqrt(q) std average it exactly.
    model = LinearGaussian(seed)
    q = model.random_posterior()
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


class Correlated:
    """The true posterior of a linear-Gaussian model, with nothing but what `evaluate_elbo` may ask of a posterior."""

    def __init__(self, posterior: torch.distributions.MultivariateNormal) -> None:
        self._posterior, self.shape = posterior, posterior.mean.shape

    def sample(self, noise: Tensor) -> Tensor:
        return self._posterior.mean + (self._posterior.scale_tril @ noise[..., None])[..., 0]

    def log_prob(self, z: Tensor) -> Tensor:
        raise AssertionError("an inverse that is not needed")

    def sample_with_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        z = self.sample(noise)
        return z, self._posterior.log_prob(z)


def test_a_posterior_of_any_kind_is_measured_by_its_samples_densities() -> None:
    # Columns that are not orthogonal: no diagonal Gaussian is the posterior.
    model = LinearGaussian()
    terms = model.evaluate(lambda x: Correlated(model.true_posterior(x)), samples=3)
    evidence = model.evidence.log_prob(model.images)
    for estimate in (terms.elbo, terms.iwae):
        torch.testing.assert_close(estimate, evidence, rtol=0, atol=1e-9)


def test_a_decoder_of_scales_is_measured_with_its_own() -> None:
    images = torch.randint(0, 256, (4, 3, 2, 2), generator=torch.Generator().manual_seed(0)).double() / 127.5 - 1
    scale = torch.linspace(0.05, 0.8, 48, dtype=torch.float64).view(4, 3, 2, 2)
    reconstruction = images.flip(0)

    def evaluate(decoded: Tensor, likelihood: PixelScale | DiscretizedLogistic) -> ElboTerms:
        return evaluate_elbo(
            images,
            encode=lambda x: DiagonalGaussian(torch.ones(4, 2).double(), torch.zeros(4, 2).double()),
            decode=lambda z: decoded,
            likelihood=likelihood,
            prior=StandardNormal(),
            generator=torch.Generator().manual_seed(0),
        )

    ours = evaluate(torch.cat((reconstruction, scale.log()), dim=1), PixelScale("discretized_logistic"))
    expected = evaluate(reconstruction, DiscretizedLogistic(scale))
    torch.testing.assert_close(ours.nll, expected.nll, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.elbo, expected.elbo, rtol=1e-6, atol=0)
    assert ours.measure == expected.measure


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
        likelihood=Laplace(0.1),
        prior=StandardNormal(),
        samples=2,
    )
    for value in (terms.nll, terms.kl, terms.elbo, terms.iwae, terms.effective_sample_size):
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

    refused("images are torch.uint8", images=torch.zeros(2, 5, dtype=torch.uint8))
    refused(r"shape \(0, 5\)", images=torch.zeros(0, 5))
    refused(r"span \[0, 255\], outside the support of discretized_logistic", images=torch.full((2, 5), 255.0) * torch.eye(2, 5),
            likelihood=DiscretizedLogistic(0.1))  # fmt: skip
    refused(r"decode made \(2, 10\) of latents \(2, 3\).*`PixelScale`", decode=lambda z: torch.zeros(2, 10))
    refused(r"decode made \(2, 5\).*2C channels", likelihood=PixelScale("laplace"))
    refused("latents: 6 of 6", encode=lambda x: DiagonalGaussian(torch.zeros(2, 3), torch.full((2, 3), 200.0)))

    class Misshapen(StandardNormal):
        def log_prob(self, z: Tensor) -> Tensor:
            return super().log_prob(z).sum()

    class Infinite(StandardNormal):
        def kl(self, posterior: DiagonalGaussian) -> Tensor:
            return super().kl(posterior) * math.inf

    refused(r"log p\(z\) has shape \(\)", prior=Misshapen())
    refused("KL: 2 of 2", prior=Infinite(), encode=lambda x: DiagonalGaussian(torch.ones(2, 3), torch.zeros(2, 3)))


def test_images_between_the_levels_are_warned_of_once_an_account() -> None:
    with pytest.warns(UserWarning, match="10 of 10 values lie between the 256 levels") as caught:
        terms = evaluate_elbo(
            torch.zeros(2, 5),
            encode=lambda x: DiagonalGaussian(torch.zeros(2, 3), torch.zeros(2, 3)),
            decode=lambda z: torch.zeros(2, 5),
            likelihood=DiscretizedLogistic(0.1),
            prior=StandardNormal(),
            samples=3,
        )
    assert len(caught) == 1
    assert terms.nll.isfinite().all()
