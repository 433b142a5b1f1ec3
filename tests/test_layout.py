"""Channels last: the norm against float64, the network against stock code's, and what training leaves."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoencoder import layout
from autoencoder.config import ModelConfig
from autoencoder.model import Autoencoder, build
from autoencoder.runtime.config import OptimizerConfig
from autoencoder.runtime.optim import build_optimizers

LAST = torch.channels_last


def exact(x: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor, *, silu: bool) -> list[Tensor]:
    """Result and gradients by torch in float64."""
    x, weight, bias = (tensor.detach().double().requires_grad_() for tensor in (x, weight, bias))
    result = functional.group_norm(x, 4, weight, bias, 1e-6)
    result = functional.silu(result) if silu else result
    result.backward(gradient.double())
    return [result.detach(), *(tensor.grad for tensor in (x, weight, bias) if tensor.grad is not None)]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_the_norm_and_its_gradients_are_those_of_float64(dtype: torch.dtype, tolerance: float, silu: bool, offset: float) -> None:
    rng = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(3, 16, 6, 5, generator=rng) + offset).to(dtype).contiguous(memory_format=LAST).requires_grad_()
    weight, bias = (torch.randn(16, generator=rng).requires_grad_() for _ in range(2))
    gradient = torch.randn(3, 16, 6, 5, generator=rng).to(dtype)
    result = layout.group_norm(x, weight, bias, 4, 1e-6, silu=silu)
    assert result.dtype == dtype and result.is_contiguous(memory_format=LAST)
    result.backward(gradient)
    expected = exact(x, weight, bias, gradient, silu=silu)
    for found, true in zip((result, x.grad, weight.grad, bias.grad), expected, strict=True):
        assert found is not None
        assert (found.double() - true).norm() < tolerance * true.norm()


def test_gradients_of_parts_are_as_of_all() -> None:
    """Weights that are frozen have none, and an input that needs none is no matter."""
    x, weight, bias = torch.randn(2, 8, 4, 4), torch.ones(8), torch.zeros(8, requires_grad=True)
    layout.group_norm(x, weight, bias, 2, 1e-6, silu=True).sum().backward()
    assert weight.grad is None and bias.grad is not None


def step(network: Autoencoder, images: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The reconstruction and the gradients of a step in bf16."""
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = network(images, noise)
    (output.decoded - images).square().sum().backward()
    return output.decoded.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.fixture
def both() -> tuple[Autoencoder, Autoencoder]:
    """A network as stock code has it, and the same channels last."""
    torch.manual_seed(0)
    stock = Autoencoder(build(ModelConfig(preset="tiny", block_out_channels=(16, 32, 32), attention=True), channels=3, resolution=32))
    last = copy.deepcopy(stock)
    layout.to_channels_last(last.vae)
    return stock, last


def test_a_step_is_as_near_to_fp32_as_stock_codes(both: tuple[Autoencoder, Autoencoder]) -> None:
    stock, last = both
    rng = torch.Generator().manual_seed(1)
    images, noise = torch.rand(4, 3, 32, 32, generator=rng) * 2 - 1, torch.randn(4, 4, 8, 8, generator=rng)
    output = stock(images, noise)
    (output.decoded - images).square().sum().backward()
    true = {name: p.grad.clone() for name, p in stock.named_parameters() if p.grad is not None}
    (plain, plain_gradients), (quick, quick_gradients) = step(stock, images, noise), step(last, images, noise)

    def error(found: dict[str, Tensor]) -> float:
        return float(sum((found[name] - value).square().sum() for name, value in true.items()) ** 0.5)  # type: ignore[arg-type]

    assert (quick - output.decoded).norm() < 1.2 * (plain - output.decoded).norm()
    assert true.keys() == quick_gradients.keys()
    assert error(quick_gradients) < 1.2 * error(plain_gradients)
    blocks = [module for module in last.modules() if isinstance(module, layout.ResnetBlock)]
    assert len(blocks) == sum(type(module).__name__ == "ResnetBlock2D" for module in stock.modules()) > 0


def test_without_gradient_or_bf16_and_back_in_the_stock_layout_results_are_stock_codes(both: tuple[Autoencoder, Autoencoder]) -> None:
    stock, last = both
    images, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 8, 8)
    assert torch.allclose(last(images, noise).decoded, stock(images, noise).decoded, atol=1e-5)
    layout.to_stock_layout(last.vae)
    assert all(parameter.is_contiguous() for parameter in last.parameters())
    with torch.no_grad():
        assert torch.equal(last(images, noise).decoded, stock(images, noise).decoded)
    for (name, value), (same, other) in zip(last.state_dict().items(), stock.state_dict().items(), strict=True):
        assert name == same and torch.equal(value, other)


def test_blocks_of_other_kinds_stay() -> None:
    from diffusers.models.resnet import ResnetBlock2D

    timed, scaled = (
        ResnetBlock2D(in_channels=32, temb_channels=8),
        ResnetBlock2D(in_channels=32, temb_channels=None, output_scale_factor=2.0),
    )
    network = nn.ModuleList([timed, scaled])
    layout.to_channels_last(network)
    assert type(timed) is type(scaled) is ResnetBlock2D and isinstance(timed.norm1, layout.GroupNorm)
    assert timed(torch.randn(1, 32, 4, 4), torch.randn(1, 8)).shape == (1, 32, 4, 4)


def test_it_is_for_processors_in_bf16_alone() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert layout.helps(cpu, "bf16", compiled=False)
    assert not any(
        (layout.helps(cpu, "no", compiled=False), layout.helps(gpu, "bf16", compiled=False), layout.helps(cpu, "bf16", compiled=True))
    )


def test_optimizers_state_lies_as_its_weights_do_when_it_comes_back(both: tuple[Autoencoder, Autoencoder]) -> None:
    """The fused kernel walks through weights, gradients and moments by the same memory order."""
    network = both[1]
    rng = torch.Generator().manual_seed(1)
    images, noise = torch.rand(4, 3, 32, 32, generator=rng) * 2 - 1, torch.randn(4, 4, 8, 8, generator=rng)
    optimizers = build_optimizers(network, OptimizerConfig(), edges=("vae.encoder.conv_in",))

    def weights_after_a_step() -> dict[str, Tensor]:
        step(network, images, noise)
        optimizers.step(1.0, torch.zeros(()))
        return {name: value.clone() for name, value in network.state_dict().items()}

    before = weights_after_a_step()
    saved = {name: value.clone(memory_format=torch.contiguous_format) for name, value in optimizers.tensors().items()}
    whole = weights_after_a_step()
    network.load_state_dict(before)
    optimizers.load_tensors(saved)
    resumed = weights_after_a_step()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert any(not torch.equal(value, before[name]) for name, value in whole.items())
