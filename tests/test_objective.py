"""The objective against written-out losses."""

import math

import pytest
import torch
from torch import Tensor, nn

from autoencoder.objective import Objective
from autoencoder.objective_config import KLConfig, LikelihoodConfig, ObjectiveConfig, PerceptualConfig
from autoencoder.posterior import DiagonalGaussian
from autoencoder.runtime.errors import ConfigError


class Distance(nn.Module):
    """Any distance, one number an image."""

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        return (images - reconstruction).abs().pow(1.5).flatten(1).mean(1)


@pytest.fixture
def batch() -> tuple[Tensor, DiagonalGaussian, Tensor]:
    torch.manual_seed(0)
    images = torch.rand(5, 3, 8, 8, dtype=torch.float64) * 2 - 1
    posterior = DiagonalGaussian(torch.randn(5, 4, 2, 2, dtype=torch.float64), torch.randn(5, 4, 2, 2, dtype=torch.float64))
    return images, posterior, images + 0.1 * torch.randn_like(images)


@pytest.mark.parametrize("logvar", [0.0, -1.3])
def test_ldm_convention_is_ldms_loss(batch: tuple[Tensor, DiagonalGaussian, Tensor], logvar: float) -> None:
    images, posterior, reconstruction = batch
    config = ObjectiveConfig(
        convention="ldm",
        ldm_logvar=logvar,
        kl=KLConfig(weight=1e-6),
        perceptual=PerceptualConfig(name="lpips", weight=0.7, weights="random"),
    )
    terms = Objective(config, Distance())(images, posterior, reconstruction, scale=torch.tensor(0.1), kl_weight=1e-6)

    p_loss = Distance()(images, reconstruction)[:, None, None, None]
    rec_loss = (images - reconstruction).abs() + 0.7 * p_loss
    nll_loss = rec_loss / math.exp(logvar) + logvar
    nll_loss = nll_loss.sum() / nll_loss.shape[0]
    mean, var = posterior.mean, posterior.logvar.exp()
    kl_loss = 0.5 * torch.sum(mean.pow(2) + var - 1.0 - posterior.logvar, dim=[1, 2, 3])
    expected = nll_loss + 1e-6 * kl_loss.sum() / kl_loss.shape[0]
    assert terms.loss.mean().item() == pytest.approx(expected.item(), rel=1e-6)


def test_diffusers_convention_is_its_trainers_loss(batch: tuple[Tensor, DiagonalGaussian, Tensor]) -> None:
    images, posterior, reconstruction = batch
    config = ObjectiveConfig(convention="diffusers", perceptual=PerceptualConfig(name="ssim", weight=0.5))
    terms = Objective(config, Distance())(images, posterior, reconstruction, scale=torch.tensor(0.1), kl_weight=1e-6)
    rec_loss = (
        nn.functional.mse_loss(reconstruction, images, reduction="none") + 0.5 * Distance()(images, reconstruction)[:, None, None, None]
    )
    expected = rec_loss.sum() / 5 + 1e-6 * posterior.kl_to_standard_normal().sum() / 5
    assert terms.loss.mean().item() == pytest.approx(expected.item(), rel=1e-12)


def test_monai_convention_is_its_tutorials_loss(batch: tuple[Tensor, DiagonalGaussian, Tensor]) -> None:
    images, posterior, reconstruction = batch
    config = ObjectiveConfig(convention="monai", perceptual=PerceptualConfig(name="ssim", weight=0.001))
    terms = Objective(config, Distance())(images, posterior, reconstruction, scale=torch.tensor(0.1), kl_weight=1e-6)
    sigma = posterior.std
    kl_loss = 0.5 * torch.sum(posterior.mean.pow(2) + sigma.pow(2) - torch.log(sigma.pow(2)) - 1, dim=[1, 2, 3])
    expected = nn.functional.l1_loss(reconstruction, images) + 0.001 * Distance()(images, reconstruction).mean() + 1e-6 * kl_loss.sum() / 5
    assert terms.loss.mean().item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("name", ["laplace", "gaussian"])
def test_elbo_convention_is_nats_against_nats(batch: tuple[Tensor, DiagonalGaussian, Tensor], name: str) -> None:
    images, posterior, reconstruction = batch
    config = ObjectiveConfig(likelihood=LikelihoodConfig(name=name), kl=KLConfig(weight=0.25))  # type: ignore[arg-type]
    scale = torch.tensor(0.2, dtype=torch.float64)
    terms = Objective(config, None)(images, posterior, reconstruction, scale=scale, kl_weight=0.25)
    kind = {"laplace": torch.distributions.Laplace, "gaussian": torch.distributions.Normal}[name]
    nll = -kind(reconstruction, scale).log_prob(images).sum((1, 2, 3))
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(terms.loss, nll + 0.25 * kl)
    # The reported ELBO is at beta = 1, whatever is optimised.
    torch.testing.assert_close(terms.named["elbo_nats"], -nll - kl)
    assert "perceptual" not in terms.named


def test_reported_terms_carry_no_gradient(batch: tuple[Tensor, DiagonalGaussian, Tensor]) -> None:
    images, posterior, reconstruction = batch
    terms = Objective(ObjectiveConfig(), None)(images, posterior, reconstruction.requires_grad_(), scale=torch.tensor(0.1), kl_weight=1.0)
    assert terms.loss.requires_grad
    assert not any(value.requires_grad for value in terms.named.values())


def test_a_learned_scale_outside_the_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"likelihood\.scale.*ldm"):
        ObjectiveConfig(convention="ldm", likelihood=LikelihoodConfig(scale="learned"))
