"""Flows and priors against autograd's Jacobian, quadrature, torch.distributions and linear-Gaussian models."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from autoencoder.experimental.coupling import CouplingFlow
from autoencoder.experimental.flow_posterior import FlowPosterior
from autoencoder.experimental.flow_prior import FlowPrior
from autoencoder.experimental.iwae import importance_weighted
from autoencoder.experimental.mixture_prior import Mixture, MixturePrior
from autoencoder.experimental.vamp_prior import VampPrior
from autoencoder.objective import Terms
from autoencoder.posterior import DiagonalGaussian


def random_flow(channels: int, context: int = 0, *, spread: float = 0.3) -> CouplingFlow:
    """A flow in float64 that is far from the identity."""
    torch.manual_seed(0)
    flow = CouplingFlow(channels, couplings=8, width=8, context=context).double()
    for name, parameter in flow.named_parameters():
        if ".last." in name:
            nn.init.normal_(parameter, std=spread)
    return flow.requires_grad_(False)


def gaussian(*shape: int) -> DiagonalGaussian:
    return DiagonalGaussian(torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64) - 1)


@pytest.mark.parametrize("shape", [(2, 3, 2), (1, 2, 3), (3, 1, 1)])
@pytest.mark.parametrize("with_context", [False, True])
def test_the_flows_log_determinant_is_that_of_autograds_jacobian(shape: tuple[int, int, int], with_context: bool) -> None:
    flow = random_flow(shape[0], 5 if with_context else 0)
    x = torch.randn(2, *shape, dtype=torch.float64)
    context = torch.randn(2, 5, *shape[1:], dtype=torch.float64) if with_context else None
    y, log_det = flow(x, context)
    for i in range(2):
        of_one = None if context is None else context[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(lambda v, c=of_one: flow(v.view(1, *shape), c)[0].flatten(), x[i].flatten())
        torch.testing.assert_close(log_det[i], torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-10, atol=1e-10)
    back, inverse_log_det = flow.inverse(y, context)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-9, atol=1e-9)


def test_every_value_of_a_flow_depends_on_others_and_none_at_its_start() -> None:
    shape = (4, 4, 4)
    flow = random_flow(4)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v.view(1, *shape))[0].flatten(), torch.randn(64, dtype=torch.float64))
    assert ((jacobian.abs() > 1e-6).sum(1) > 1).all()
    x = torch.randn(3, *shape)
    y, log_det = CouplingFlow(4, couplings=4, width=8)(x)
    assert torch.equal(y, x)
    assert torch.equal(log_det, torch.zeros(3))


GRID = torch.linspace(-10, 10, 201, dtype=torch.float64)


def mass(log_prob: Tensor) -> float:
    """Integral over GRID x GRID of exp(log_prob), by the trapezoidal rule: to machine precision on a smooth density that ends within it."""
    return float(torch.trapezoid(torch.trapezoid(log_prob.exp().view(len(GRID), len(GRID)), GRID), GRID))


def test_densities_of_two_latents_integrate_to_one() -> None:
    points = torch.cartesian_prod(GRID, GRID).view(-1, 2, 1, 1)
    flow, base = random_flow(2, spread=0.1), gaussian(1, 2, 1, 1)
    assert mass(FlowPrior(flow).log_prob(points)) == pytest.approx(1, abs=1e-4)
    everywhere = DiagonalGaussian(base.mean.expand(len(points), -1, -1, -1), base.logvar.expand(len(points), -1, -1, -1))
    assert mass(FlowPosterior(everywhere, random_flow(2, 4, spread=0.1)).log_prob(points)) == pytest.approx(1, abs=1e-4)
    assert mass(MixturePrior(Mixture(2, 5).double()).log_prob(points).detach()) == pytest.approx(1, abs=1e-9)
    assert mass(VampPrior(gaussian(3, 2, 1, 1)).log_prob(points)) == pytest.approx(1, abs=1e-9)


def mixture_of(mean: Tensor, logvar: Tensor, logit: Tensor) -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(logits=logit), Independent(Normal(mean, (0.5 * logvar).exp()), 1))


def test_the_mixture_prior_is_torchs_mixture_at_every_site() -> None:
    torch.manual_seed(0)
    mixture = Mixture(3, 6).double().requires_grad_(False)
    for parameter in mixture.parameters():
        nn.init.normal_(parameter)
    z = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    expected = mixture_of(mixture.mean, mixture.logvar, mixture.logit).log_prob(z.permute(0, 2, 3, 1)).sum((1, 2))
    torch.testing.assert_close(MixturePrior(mixture).log_prob(z), expected, rtol=1e-12, atol=1e-12)


def test_the_vamp_prior_is_torchs_mixture_of_posteriors() -> None:
    torch.manual_seed(0)
    posteriors, z = gaussian(6, 3, 2, 2), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    expected = mixture_of(posteriors.mean.flatten(1), posteriors.logvar.flatten(1), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(VampPrior(posteriors).log_prob(z), expected.log_prob(z.flatten(1)), rtol=1e-12, atol=1e-12)


def test_a_mixture_starts_with_the_moments_of_the_standard_normal() -> None:
    torch.manual_seed(0)
    mixture = Mixture(2, 4000)
    variance = mixture.mean.var(0) + mixture.logvar.exp().mean(0)
    torch.testing.assert_close(variance, torch.ones(2), rtol=0.02, atol=0)
    torch.testing.assert_close(mixture.mean.mean(0), torch.zeros(2), rtol=0, atol=0.02)


def test_a_flow_posteriors_density_is_that_of_its_samples() -> None:
    torch.manual_seed(0)
    posterior = FlowPosterior(gaussian(5, 2, 3, 3), random_flow(2, 4))
    noise = torch.randn(5, 2, 3, 3)
    z, log_q = posterior.sample_with_log_prob(noise)
    assert torch.equal(posterior.sample(noise), z)
    torch.testing.assert_close(posterior.log_prob(z), log_q, rtol=1e-9, atol=1e-9)
    base = posterior.base
    start = FlowPosterior(base, CouplingFlow(2, couplings=2, width=4, context=4).double())
    torch.testing.assert_close(start.log_prob(z), base.log_prob(z))
    assert torch.equal(start.mode(), base.mode())


def test_a_flow_prior_samples_what_it_gives_density_to() -> None:
    flow, noise = random_flow(2), torch.randn(4, 2, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(flow(FlowPrior(flow).sample(noise))[0], noise, rtol=1e-9, atol=1e-9)


class Linear:
    """x = W z + sigma e with c latents: everything about it is known."""

    def __init__(self, dims: int, latents: int, sigma: float) -> None:
        generator = torch.Generator().manual_seed(1)
        # Positive columns are near to each other: latents that the images hardly tell apart.
        self.weight = 0.5 + torch.rand(dims, latents, generator=generator, dtype=torch.float64)
        self.sigma = sigma
        self.precision = torch.eye(latents, dtype=torch.float64) + self.weight.T @ self.weight / sigma**2
        self.images = torch.randn(200, latents, generator=generator, dtype=torch.float64) @ self.weight.T
        self.images = self.images + sigma * torch.randn(200, dims, generator=generator, dtype=torch.float64)
        covariance = self.weight @ self.weight.T + sigma**2 * torch.eye(dims, dtype=torch.float64)
        self.log_evidence = MultivariateNormal(torch.zeros(dims, dtype=torch.float64), covariance).log_prob(self.images)
        self.posterior_mean = self.images @ self.weight @ torch.linalg.inv(self.precision) / sigma**2

    def log_joint(self, images: Tensor, z: Tensor) -> Tensor:
        """log p(x|z) + log p(z) for z (..., c)."""
        prior = Normal(0, 1).log_prob(z).sum(-1)
        return Normal(z @ self.weight.T, self.sigma).log_prob(images).sum(-1) + prior


def iwae(model: Linear, q: MultivariateNormal, samples: int) -> Terms:
    """Terms of k samples an image, combined."""
    torch.manual_seed(0)
    z = q.sample((samples,)).movedim(0, 1)  # (B, k, c)
    log_weights = model.log_joint(model.images[:, None], z) - q.log_prob(z.movedim(1, 0)).movedim(0, 1)
    loss = -log_weights.flatten()
    return importance_weighted(Terms(loss, {"elbo_nats": -loss}), samples)


def test_the_importance_weighted_bound_is_exact_where_q_is_the_true_posterior() -> None:
    model = Linear(6, 3, 0.7)
    q = MultivariateNormal(model.posterior_mean, precision_matrix=model.precision)
    terms = iwae(model, q, 5)
    torch.testing.assert_close(-terms.loss, model.log_evidence, rtol=0, atol=1e-9)
    torch.testing.assert_close(terms.named["iwae_nats"], model.log_evidence, rtol=0, atol=1e-9)


def test_the_importance_weighted_bound_lies_between_the_elbo_and_the_evidence() -> None:
    model = Linear(6, 3, 0.7)
    wide = MultivariateNormal(model.posterior_mean + 0.2, precision_matrix=0.6 * model.precision)
    bounds = []
    for samples in (1, 4, 64):
        terms = iwae(model, wide, samples)
        # On the same samples, whatever they are: the logarithm of a mean is at least the mean of logarithms.
        assert (terms.named["iwae_nats"] >= terms.named["elbo_nats"] - 1e-12).all()
        assert torch.equal(terms.loss, -terms.named["iwae_nats"])
        bounds.append(float(terms.named["iwae_nats"].mean()))
    assert bounds[0] < bounds[1] < bounds[2] < float(model.log_evidence.mean()) + 0.05


def test_a_flow_posterior_closes_the_gap_that_correlation_leaves() -> None:
    model = Linear(6, 2, 0.7)
    precision = model.precision
    # KL of the best diagonal Gaussian, whose variances are 1 / precision_ii, to the true posterior.
    diagonal_gap = 0.5 * float(precision.diagonal().log().sum() - torch.logdet(precision))
    assert diagonal_gap > 0.15
    torch.manual_seed(0)
    flow = CouplingFlow(2, couplings=4, width=8, context=4).double()
    shape = (len(model.images), 2, 1, 1)
    mean = model.posterior_mean.view(shape)
    logvar = (-precision.diagonal().log()).view(1, 2, 1, 1).expand(shape)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)

    def gap() -> Tensor:
        posterior = FlowPosterior(DiagonalGaussian(mean, logvar), flow)
        z, log_q = posterior.sample_with_log_prob(torch.randn(shape, dtype=torch.float64))
        return (model.log_evidence - model.log_joint(model.images, z.flatten(1)) + log_q).mean()

    with torch.no_grad():
        before = float(torch.stack([gap() for _ in range(100)]).mean())
    assert before == pytest.approx(diagonal_gap, abs=0.03)
    for _ in range(200):
        optimizer.zero_grad()
        gap().backward()
        optimizer.step()
    with torch.no_grad():
        after = float(torch.stack([gap() for _ in range(100)]).mean())
    assert -0.02 < after < 0.2 * diagonal_gap
