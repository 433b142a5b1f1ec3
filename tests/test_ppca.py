"""pPCA and the linear VAE: log p(x), rate, active units and optimum are known in closed form."""

import math

import pytest
import torch
from torch import Tensor

from autoencoder.diagnostics import LatentStatistics
from autoencoder.objective import Objective
from autoencoder.objective_config import KLConfig, LikelihoodConfig, ObjectiveConfig
from autoencoder.runtime.config import OptimizerConfig
from tests.linear_vae import PPCA, LinearVAE, account, train

DIMS = 12


def random_images(seed: int, count: int = 400) -> Tensor:
    """Images (count, DIMS) of a random mean and covariance, whose spectrum falls by a factor of about a hundred."""
    generator = torch.Generator().manual_seed(seed)
    mixing, noise, mean = (torch.randn(n, DIMS, generator=generator, dtype=torch.float64) for n in (DIMS, count, 1))
    rotation = torch.linalg.qr(mixing)[0]
    return noise * torch.logspace(0, -1, DIMS, dtype=torch.float64) @ rotation.T + mean


def statistics_of(vae: LinearVAE, images: Tensor) -> LatentStatistics:
    statistics = LatentStatistics()
    with torch.no_grad():
        statistics.add(vae.encode(images), torch.ones(len(images)))
    return statistics


@pytest.mark.parametrize("units", [1, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_one_log_weight_under_the_optimal_linear_vae_is_log_p(seed: int, units: int) -> None:
    images = random_images(seed)
    ppca = PPCA.fit(images, units)
    terms, evidence = account(ppca.linear_vae(), images, ppca.sigma, seed=seed), ppca.evidence.log_prob(images)
    torch.testing.assert_close(terms.iwae, evidence, rtol=0, atol=1e-9)
    assert evidence.mean().item() == pytest.approx(ppca.log_likelihood, abs=1e-9)
    assert terms.kl.mean().item() == pytest.approx(ppca.rate, abs=1e-9)
    # With the KL in closed form the reconstruction alone is sampled, and nothing cancels its noise.
    noise = terms.elbo - evidence
    assert 0 < abs(noise.mean().item()) < 4 * noise.std().item() / math.sqrt(len(images))


def test_no_other_noise_variance_makes_the_images_likelier() -> None:
    images = random_images(0)
    ppca = PPCA.fit(images, 3)
    for factor in (0.9, 1.1):
        other = ppca.at(factor * ppca.noise_variance.item(), 1.0)
        assert other.evidence.log_prob(images).mean().item() < ppca.log_likelihood - 1e-3


def exact_loss(vae: LinearVAE, images: Tensor, *, sigma: float, beta: float) -> Tensor:
    """The objective's expectation: the NLL is quadratic in z, so that mean +- sqrt(q) std along each axis averages it exactly."""
    config = ObjectiveConfig(likelihood=LikelihoodConfig(name="gaussian", scale="fixed", value=sigma), kl=KLConfig(weight=beta))
    axes = math.sqrt(len(vae.logvar)) * torch.eye(len(vae.logvar), dtype=images.dtype)
    posterior, losses = vae.encode(images), []
    for point in (*axes, *-axes):
        decoded = vae.decode(posterior.sample(point.expand(posterior.mean.shape)))
        losses.append(Objective(config, None)(images, posterior, decoded, scale=images.new_tensor(sigma), kl_weight=beta).loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("beta", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("active", [2, 5])
def test_under_beta_the_objective_is_least_where_units_beyond_beta_sigma_squared_alone_are_active(active: int, beta: float) -> None:
    images = random_images(active)
    ppca = PPCA.fit(images, 5).keeping(active, beta=beta)
    vae = ppca.linear_vae()
    loss = exact_loss(vae, images, sigma=ppca.sigma, beta=beta)
    for gradient in torch.autograd.grad(loss, list(vae.parameters())):
        assert gradient.abs().max().item() < 1e-9 * loss.abs().item()

    optimal, generator = {k: v.clone() for k, v in vae.state_dict().items()}, torch.Generator().manual_seed(active)
    with torch.no_grad():
        for size in (1e-3, 1e-2, 1e-1, 1.0):
            for _ in range(5):
                for name, parameter in vae.named_parameters():
                    step = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                    parameter.copy_(optimal[name] + size * step)
                assert exact_loss(vae, images, sigma=ppca.sigma, beta=beta) > loss

    statistics = statistics_of(ppca.linear_vae(), images)
    assert statistics.active_units().tolist() == ppca.active.tolist() == [True] * active + [False] * (5 - active)
    channels = statistics.channels()
    assert sum(c.kl_nats for c in channels) == pytest.approx(ppca.rate, abs=1e-9)
    # Var_x of an active unit's mean is 1 - beta sigma**2 / l: with its posterior variance it makes the prior's, 1.
    assert [c.mean_variance + c.posterior_std**2 for c in channels] == pytest.approx([1.0] * 5, abs=1e-9)


ADAM = OptimizerConfig(lr=1e-1, betas=(0.9, 0.95))


def test_a_linear_vae_trained_with_the_objective_reaches_log_p() -> None:
    images, units = random_images(1, count=1000), 3
    torch.manual_seed(0)
    vae = LinearVAE(torch.zeros(DIMS, dtype=torch.float64), units)
    config = ObjectiveConfig(likelihood=LikelihoodConfig(name="gaussian", scale="analytic", value=1.0, decay=0.95))
    *_, end = train(vae, images, config, ADAM, batch=len(images), steps=1000, every=1000)
    ppca = PPCA.fit(images, units)
    with torch.no_grad():
        elbo, rate = -exact_loss(vae, images, sigma=end.sigma, beta=1.0), vae.encode(images).kl_to_standard_normal().mean()
    assert 0 <= ppca.log_likelihood - elbo.item() < 0.01
    assert rate.item() == pytest.approx(ppca.rate, abs=0.05)


@pytest.mark.parametrize("active", [2, 4])
def test_a_linear_vae_trained_under_beta_keeps_the_units_beyond_beta_sigma_squared(active: int) -> None:
    images, units, beta = random_images(2, count=1000), 6, 3.0
    ppca = PPCA.fit(images, units).keeping(active, beta=beta)
    torch.manual_seed(0)
    vae = LinearVAE(torch.zeros(DIMS, dtype=torch.float64), units)
    config = ObjectiveConfig(likelihood=LikelihoodConfig(name="gaussian", scale="fixed", value=ppca.sigma), kl=KLConfig(weight=beta))
    list(train(vae, images, config, ADAM, batch=len(images), steps=400, every=400))
    assert int(statistics_of(vae, images).active_units().sum()) == active == int(ppca.active.sum())
