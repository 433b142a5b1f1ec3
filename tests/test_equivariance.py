"""Equivariance regularisation: transformations against other libraries, images by seed and progress alone, an account that stays pure."""

import math

import pytest
import torch
from torch.nn.functional import interpolate

from autoencoder.config import DataConfig, ModelConfig, TrainAutoencoderConfig
from autoencoder.equivariance import Equivariance, Transformation, resize, transform, turn
from autoencoder.equivariance_config import EquivarianceConfig, check_equivariance
from autoencoder.experimental.config import ExperimentalConfig
from autoencoder.model import Autoencoder, build, decode, encode
from autoencoder.objective import Objective
from autoencoder.objective_config import LikelihoodConfig, ObjectiveConfig, PerceptualConfig
from autoencoder.posterior import DiagonalGaussian
from autoencoder.runtime.errors import ConfigError


@pytest.mark.parametrize(("size", "to"), [(8, 2), (8, 7), (32, 9), (10, 3), (16, 16), (4, 8)])
def test_resizing_is_torchs_antialiased_bilinear_interpolation(size: int, to: int) -> None:
    maps = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = interpolate(maps, (to, to), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(resize(maps, to), expected, rtol=0, atol=1e-14)


def test_resizing_keeps_its_precision_under_autocast() -> None:
    maps = torch.randn(1, 2, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resize(maps, 5), resize(maps.clone(), 5))
        assert resize(maps.bfloat16(), 5).dtype == torch.float32
    torch.testing.assert_close(resize(maps, 5), interpolate(maps, (5, 5), mode="bilinear", antialias=True))


def test_each_map_is_turned_by_its_own_number_of_quarters() -> None:
    maps = torch.arange(5 * 2 * 9.0).view(5, 2, 3, 3)
    turned = turn(maps, torch.tensor([0, 1, 2, 3, 1]))
    for row, quarters in enumerate((0, 1, 2, 3, 1)):
        assert torch.equal(turned[row], torch.rot90(maps[row], quarters, (1, 2)))


def test_scaling_has_an_exact_gradient() -> None:
    maps = torch.randn(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    how = Transformation(torch.tensor([0, 2]), torch.tensor([1, 3]), 3)
    assert torch.autograd.gradcheck(lambda x: transform(x, how), (maps,))


@pytest.mark.parametrize("share", [0.5, 0.3, 1.0])
def test_any_stretch_of_images_holds_its_share_but_for_one(share: float) -> None:
    plan = Equivariance(EquivarianceConfig(share=share), seed=7, latent_side=8)
    taken = [plan.taken(position) for position in range(3000)]
    for start in range(0, 2900, 37):
        for length in (1, 2, 5, 64):
            assert abs(sum(taken[start : start + length]) - share * length) < 1 + 1e-9


def test_what_is_transformed_does_not_depend_on_the_batch_split() -> None:
    plan = Equivariance(EquivarianceConfig(share=0.4), seed=3, latent_side=8)
    positions = list(range(100, 132))
    whole = plan.choose(positions)
    split = [plan.choose(positions[start : start + 5]) + torch.tensor([[start], [0]]) for start in range(0, 32, 5)]
    assert torch.equal(whole, torch.cat(split, 1))
    assert torch.equal(plan.choose([-1, *positions]), whole + torch.tensor([[1], [0]]))
    assert set(whole[1].tolist()) == {0, 1, 2, 3}


def test_all_scales_and_seeds_are_drawn() -> None:
    plan = Equivariance(EquivarianceConfig(share=0.5), seed=0, latent_side=32)
    drawn = [plan.side(step) for step in range(600)]
    # EQ-VAE's own scales at 256 pixels and a factor of 8: 8/32 to 31/32.
    assert set(drawn) == set(range(8, 32))
    other = Equivariance(EquivarianceConfig(share=0.5), seed=1, latent_side=32)
    assert drawn != [other.side(step) for step in range(600)]


@pytest.fixture(scope="module")
def network() -> Autoencoder:
    torch.manual_seed(0)
    shape = ModelConfig(preset="tiny", block_out_channels=(8, 8), norm_groups=4)
    return Autoencoder(build(shape, channels=3, resolution=16))


def test_forward_decodes_the_transformed_latents_as_well(network: Autoencoder) -> None:
    images, noise = torch.rand(4, 3, 16, 16) * 2 - 1, torch.randn(4, 4, 8, 8)
    how = Transformation(torch.tensor([1, 3]), torch.tensor([2, 1]), 5)
    plain, output = network(images, noise), network(images, noise, how)
    assert torch.equal(plain.decoded, output.decoded) and plain.transformed is None
    latents = encode(network.vae, images).sample(noise)
    expected = torch.cat([decode(network.vae, torch.rot90(resize(latents[row : row + 1], 5), k, (2, 3))) for row, k in ((1, 2), (3, 1))])
    torch.testing.assert_close(output.transformed, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("convention", ["elbo", "ldm", "monai", "diffusers"])
def test_the_distortion_is_the_loss_without_its_kl(convention: str) -> None:
    generator = torch.Generator().manual_seed(1)
    images, decoded = (torch.rand(3, 2, 9, 9, dtype=torch.float64, generator=generator) * 2 - 1 for _ in range(2))
    config = ObjectiveConfig(convention=convention, perceptual=PerceptualConfig(name="ssim", weight=0.3))  # type: ignore[arg-type]
    objective = Objective(config, _Distance())
    posterior = DiagonalGaussian(*(torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=generator) for _ in range(2)))
    scale = torch.tensor(0.2, dtype=torch.float64)
    terms = objective(images, posterior, decoded, scale=scale, kl_weight=0.7)
    torch.testing.assert_close(objective.distortion(images, decoded, scale=scale), terms.loss - 0.7 * terms.named["kl_nats"])
    torch.testing.assert_close(sum(terms.parts.values()), terms.loss)


class _Distance(torch.nn.Module):
    def forward(self, images: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
        return (images - reconstruction).abs().pow(1.5).flatten(1).mean(1)


def test_a_scale_below_one_site_is_refused_with_what_would_do() -> None:
    with pytest.raises(ConfigError, match=r"objective\.equivariance\.least_scale: got 0\.9; latents of side 4 .* at most 3/4"):
        check_equivariance(EquivarianceConfig(share=0.5, least_scale=0.9), latent_side=4, factor=4, least_image=1)


def test_images_too_small_for_the_perceptual_distance_are_refused_before_torch_is_needed() -> None:
    ssim = PerceptualConfig(name="ssim", window=11)
    chosen = ObjectiveConfig(perceptual=ssim, equivariance=EquivarianceConfig(share=0.5))
    data, tiny = DataConfig(resolution=32), ModelConfig(preset="tiny")
    with pytest.raises(ConfigError, match=r"takes images of 11 pixels and more, and the smallest would have 8: give at least 0\.375"):
        TrainAutoencoderConfig(out="x", data=data, model=tiny, objective=chosen)
    enough = ObjectiveConfig(perceptual=ssim, equivariance=EquivarianceConfig(share=0.5, least_scale=0.375))
    TrainAutoencoderConfig(out="x", data=data, model=tiny, objective=enough)


def test_importance_weighted_bounds_have_no_place_for_it() -> None:
    with pytest.raises(ConfigError, match=r"objective\.equivariance\.share"):
        TrainAutoencoderConfig(
            out="x",
            model=ModelConfig(preset="tiny"),
            objective=ObjectiveConfig(equivariance=EquivarianceConfig(share=0.5)),
            experimental=ExperimentalConfig(iwae_samples=4),
        )


@pytest.mark.parametrize(("key", "value"), [("share", 1.5), ("share", -0.1), ("weight", 0.0), ("least_scale", 1.0)])
def test_values_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        EquivarianceConfig(**{key: value})


def test_a_learned_scale_has_no_gradient_from_transformed_images() -> None:
    """The objective charges them at the scale that it is given; a detached one stays what it is."""
    objective = Objective(ObjectiveConfig(likelihood=LikelihoodConfig(name="laplace", scale="learned")), None)
    log_scale = torch.tensor(math.log(0.2), requires_grad=True)
    decoded = torch.zeros(2, 3, 4, 4, requires_grad=True)
    objective.distortion(torch.rand(2, 3, 4, 4), decoded, scale=log_scale.exp().detach()).sum().backward()
    assert log_scale.grad is None and decoded.grad is not None
