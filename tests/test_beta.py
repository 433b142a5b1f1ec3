"""Effective beta, implied scale and equivalent weights, against gradients and worked examples."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from autoencoder.beta import CONVENTIONS, best_scale, effective_beta, equivalent_weights, family, implied_scale
from autoencoder.likelihood import LIKELIHOODS
from autoencoder.objective import Objective
from autoencoder.objective_config import KLConfig, LikelihoodConfig, ObjectiveConfig
from autoencoder.posterior import DiagonalGaussian

OBJECTIVES = [
    ("ldm", "laplace", "analytic"),
    ("monai", "laplace", "analytic"),
    ("diffusers", "laplace", "analytic"),
    ("elbo", "laplace", "fixed"),
    ("elbo", "gaussian", "fixed"),
    ("elbo", "laplace", "analytic"),
    ("elbo", "gaussian", "analytic"),
]


def configured(convention: str, name: str = "laplace", scale: str = "analytic", *, weight: float = 0.03) -> ObjectiveConfig:
    likelihood: dict[str, Any] = {"name": name, "scale": scale, "value": 0.3}
    return ObjectiveConfig(convention=convention, kl=KLConfig(weight=weight), likelihood=LikelihoodConfig(**likelihood))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("convention", "weight", "dims", "absolute", "squared", "beta"),
    [
        # LDM's published 1e-6, on sum|e|.
        ("ldm", 1e-6, 3 * 256**2, 0.05, 0.005, 2e-5),
        # MONAI's 2-D tutorial: mean|e| over 64 x 64 grey values, 1e-6.
        ("monai", 1e-6, 64**2, 0.02, 0.001, 0.2048),
        # PyTorch-VAE: mean e**2 over 3 x 64 x 64 values, M_N = 2.5e-4; times D, that is a weight beside sum e**2.
        ("diffusers", 2.5e-4 * 12288, 12288, 0.1, 0.02, 76.8),
        # A sum of squares beside the whole KL, with a modern network's error.
        ("diffusers", 1.0, 3 * 256**2, 0.05, 0.005, 100.0),
    ],
)
def test_well_known_recipes(convention: str, weight: float, dims: int, absolute: float, squared: float, beta: float) -> None:
    config = configured(convention, weight=weight)
    errors = {"mean_absolute_error": absolute, "mean_squared_error": squared}
    assert effective_beta(config, **errors, dims=dims) == pytest.approx(beta, rel=1e-12)


def of_batch(config: ObjectiveConfig) -> tuple[dict[str, float], tuple[Tensor, Tensor], Any]:
    """Errors of a batch, the loss's gradients by reconstruction and posterior mean, and how to get those of another beta-VAE."""
    torch.manual_seed(1)
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    reconstruction = (images + 0.1 * torch.randn_like(images)).requires_grad_()
    mean = torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def posterior() -> DiagonalGaussian:
        return DiagonalGaussian(mean, torch.zeros_like(mean))

    error = (images - reconstruction).detach()
    errors = {"mean_absolute_error": error.abs().mean().item(), "mean_squared_error": error.square().mean().item()}
    scale = 0.3 if config.likelihood.scale == "fixed" else best_scale(config.likelihood.name, **errors)
    terms = Objective(config, None)(
        images, posterior(), reconstruction, scale=torch.tensor(scale, dtype=torch.float64), kl_weight=config.kl.weight
    )

    def gradients(loss: Tensor) -> tuple[Tensor, Tensor]:
        by_reconstruction, by_mean = torch.autograd.grad(loss.mean(), (reconstruction, mean))
        return by_reconstruction, by_mean

    def beta_vae(scale: float, beta: float) -> tuple[Tensor, Tensor]:
        nll = -LIKELIHOODS[family(config)](scale).log_prob(images, reconstruction)
        return gradients(nll + beta * posterior().kl_to_standard_normal())

    return errors, gradients(terms.loss), beta_vae


def assert_proportional(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    torch.testing.assert_close(ratios[0], ratios[0].mean().expand_as(ratios[0]))
    torch.testing.assert_close(ratios[1], ratios[0].mean().expand_as(ratios[1]))


@pytest.mark.parametrize(("convention", "name", "scale"), OBJECTIVES)
def test_effective_beta_leaves_the_gradient_of_a_beta_vae(convention: str, name: str, scale: str) -> None:
    """At the best scale, the loss's gradient is proportional to that of NLL + beta KL."""
    config = configured(convention, name, scale)
    errors, gradients, beta_vae = of_batch(config)
    beta = effective_beta(config, **errors, dims=192)
    assert_proportional(gradients, beta_vae(best_scale(family(config), **errors), beta))


@pytest.mark.parametrize(("convention", "name", "scale"), OBJECTIVES)
def test_the_implied_scale_leaves_the_gradient_of_an_elbo(convention: str, name: str, scale: str) -> None:
    config = configured(convention, name, scale)
    errors, gradients, beta_vae = of_batch(config)
    assert_proportional(gradients, beta_vae(implied_scale(config, **errors, dims=192), 1.0))


@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_the_best_scale_is_the_likelihoods_own(name: str) -> None:
    error = torch.randn(1, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kind = LIKELIHOODS[name]
    errors = {"mean_absolute_error": error.abs().mean().item(), "mean_squared_error": error.square().mean().item()}
    assert best_scale(name, **errors) == pytest.approx(kind.scale_from_moment(kind.moment(error)).item())


@pytest.mark.parametrize(
    ("convention", "name", "scale"), [*OBJECTIVES, ("elbo", "discretized_logistic", "fixed"), ("elbo", "laplace", "pixel")]
)
@pytest.mark.parametrize("other", CONVENTIONS)
def test_equivalent_weights_have_the_same_effective_beta(convention: str, name: str, scale: str, other: str) -> None:
    errors = {"mean_absolute_error": 0.04, "mean_squared_error": 0.003}
    beta = effective_beta(configured(convention, name, scale), **errors, dims=3072)
    weight = equivalent_weights(beta, **errors, dims=3072)[other]
    assert effective_beta(configured(other, weight=weight), **errors, dims=3072) == pytest.approx(beta)


@pytest.mark.parametrize("convention", ["elbo", *CONVENTIONS])
def test_the_weight_in_force_counts(convention: str) -> None:
    errors = {"mean_absolute_error": 0.04, "mean_squared_error": 0.003}
    configuration = configured(convention, weight=0.03)
    half = effective_beta(configuration, **errors, dims=192, weight=0.015)
    assert half == pytest.approx(effective_beta(configuration, **errors, dims=192) / 2)


def test_only_the_mean_convention_depends_on_the_resolution() -> None:
    errors = {"mean_absolute_error": 0.04, "mean_squared_error": 0.003}
    for convention in ("elbo", *CONVENTIONS):
        small, large = (effective_beta(configured(convention), **errors, dims=3 * side**2) for side in (32, 64))
        assert large / small == pytest.approx(4 if convention == "monai" else 1)


def test_a_loss_without_a_scale_of_its_own_has_no_finite_beta_at_zero_error() -> None:
    errors = {"mean_absolute_error": 0.0, "mean_squared_error": 0.0}
    assert effective_beta(configured("ldm"), **errors, dims=192) == math.inf
    assert effective_beta(configured("elbo"), **errors, dims=192) == 0.03
