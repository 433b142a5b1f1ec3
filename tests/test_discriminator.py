"""The discriminator's losses, penalty and network against written-out ones and finite differences."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, conv2d

from autoencoder.adversarial.losses import accuracy, discriminator_loss, generator_loss, r1_penalty
from autoencoder.adversarial.patchgan import PatchGAN, iterate_norms
from autoencoder.adversarial_config import AdversarialConfig


def test_the_losses_are_the_published_ones() -> None:
    torch.manual_seed(0)
    real, fake = torch.randn(3, 1, 2, 4), torch.randn(3, 1, 2, 4)
    for i in range(3):
        a, b = real[i].flatten().tolist(), fake[i].flatten().tolist()
        hinge = sum(0.5 * max(0, 1 - x) + 0.5 * max(0, 1 + y) for x, y in zip(a, b, strict=True)) / 8
        assert discriminator_loss("hinge", real, fake)[i].item() == pytest.approx(hinge, rel=1e-5)
        assert generator_loss("hinge", fake)[i].item() == pytest.approx(-sum(b) / 8, rel=1e-5)
        right = (sum(x > 0 for x in a) + sum(y < 0 for y in b)) / 16
        assert accuracy(real, fake)[i].item() == pytest.approx(right)
    entropy = 0.5 * (
        binary_cross_entropy_with_logits(real, torch.ones_like(real)) + binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
    )
    torch.testing.assert_close(discriminator_loss("non_saturating", real, fake).mean(), entropy)
    torch.testing.assert_close(generator_loss("non_saturating", fake).mean(), binary_cross_entropy_with_logits(fake, torch.ones_like(fake)))


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_least_side_leaves_one_patch_of_the_stated_size(layers: int) -> None:
    side = AdversarialConfig(layers=layers).smallest_side
    network = PatchGAN(1, width=2, layers=layers, norm="none")
    assert network(torch.zeros(1, 1, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 1, side - 1, side - 1))
    images = torch.rand(1, 1, 200, 200, requires_grad=True)
    logits = network(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert images.grad is not None
    rows = images.grad[0, 0].abs().sum(1).nonzero()
    assert rows.max() - rows.min() + 1 == {1: 16, 2: 34, 3: 70, 4: 142}[layers]


@pytest.mark.parametrize("norm", ["group", "none", "spectral"])
def test_no_image_of_a_batch_moves_anothers_logits(norm: str) -> None:
    network = PatchGAN(3, width=4, layers=2, norm=norm, seed=5)
    images = torch.rand(3, 3, 24, 24, requires_grad=True)
    logits = network(images)
    torch.testing.assert_close(logits[1:2], network(images[1:2]), rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(logits[1].sum(), images)
    assert gradient[1].abs().sum() > 0 and gradient[[0, 2]].abs().sum() == 0
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())


def test_weights_start_at_the_published_spread_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = PatchGAN(3, width=32, layers=2, seed=5).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    for norm in ("group", "spectral"):
        again = PatchGAN(3, width=32, layers=2, norm=norm, seed=5).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    again = PatchGAN(3, width=32, layers=2, seed=5).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    kernels = torch.cat([value.flatten() for value in one.values() if value.ndim == 4])
    assert kernels.std().item() == pytest.approx(0.02, rel=0.02) and abs(kernels.mean().item()) < 2e-4


def test_spectral_norms_move_once_a_step_and_reach_one() -> None:
    network = PatchGAN(3, width=4, layers=2, norm="spectral")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    network.eval()
    for _ in range(3):
        network(torch.rand(2, 3, 24, 24))
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())
    for _ in range(200):
        iterate_norms(network)
    for module in network.layers:
        if isinstance(module, nn.Conv2d):
            assert torch.linalg.matrix_norm(module.weight.flatten(1), ord=2).item() == pytest.approx(1, rel=1e-3)


def test_the_r1_penalty_is_the_squared_slope_and_trains_the_discriminator() -> None:
    torch.manual_seed(0)
    network = PatchGAN(1, width=2, layers=1, norm="group", seed=0).double()
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    penalty = r1_penalty(network, images)
    slopes = torch.zeros_like(images)
    for i in range(8):
        for j in range(8):
            step = torch.zeros_like(images)
            step[:, 0, i, j] = 1e-5
            with torch.no_grad():
                ahead, behind = (network(images + sign * step).flatten(1).mean(1) for sign in (1, -1))
            slopes[:, 0, i, j] = (ahead - behind) / 2e-5
    torch.testing.assert_close(penalty.detach(), slopes.square().flatten(1).sum(1), rtol=1e-5, atol=1e-12)
    kernel = network.layers[0].weight
    (gradient,) = torch.autograd.grad(penalty.sum(), kernel)
    with torch.no_grad():
        direction = torch.randn_like(kernel)
        values = []
        for sign in (1, -1):
            kernel += sign * 1e-6 * direction
            values.append(r1_penalty_value(network, images))
            kernel -= sign * 1e-6 * direction
    assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


def r1_penalty_value(network: nn.Module, images: Tensor) -> float:
    with torch.enable_grad():
        return r1_penalty(network, images).sum().item()


def reference_patchgan(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """Isola et al. 2017 with two layers that halve, GroupNorm of four channels' gcd with 32 behind the inner ones."""
    act: Callable[[Tensor], Tensor] = lambda x: torch.where(x > 0, x, 0.2 * x)  # noqa: E731
    x = act(conv2d(images, state["layers.0.weight"], state["layers.0.bias"], stride=2, padding=1))
    for index, stride in ((2, 2), (5, 1)):
        x = conv2d(x, state[f"layers.{index}.weight"], stride=stride, padding=1)
        channels = x.shape[1]
        groups = math.gcd(32, channels)
        y = x.reshape(len(x), groups, -1)
        y = (y - y.mean(2, keepdim=True)) / (y.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = act(y.view_as(x) * state[f"layers.{index + 1}.weight"].view(1, -1, 1, 1) + state[f"layers.{index + 1}.bias"].view(1, -1, 1, 1))
    return conv2d(x, state["layers.8.weight"], state["layers.8.bias"], padding=1)


def test_the_network_is_the_published_one() -> None:
    network = PatchGAN(3, width=4, layers=2, seed=3).double()
    images = torch.rand(4, 3, 24, 24, dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(network(images), reference_patchgan(network.state_dict(), images))
    widths = [m.out_channels for m in PatchGAN(3, width=64, layers=5, norm="none").layers if isinstance(m, nn.Conv2d)]
    assert widths == [64, 128, 256, 512, 512, 512, 1]
