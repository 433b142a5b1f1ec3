"""Optimisers against torch's own, schedules, the skip flag, the average."""

import math

import pytest
import torch
from torch import nn

from autoencoder.runtime.config import OptimizerConfig, count
from autoencoder.runtime.ema import Ema
from autoencoder.runtime.errors import ConfigError
from autoencoder.runtime.optim import Muon, build_optimizers, learning_rate_factor, orthogonalize

ZERO, ONE = torch.zeros(()), torch.ones(())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 2, 3))


def set_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_orthogonalize_keeps_the_singular_vectors_and_levels_the_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    matrix = u @ torch.diag_embed(torch.linspace(0.05, 1, min(shape)).expand(3, -1)) @ v
    result = orthogonalize(matrix)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6
    assert values.max() < 1.25
    diagonal = u.mT @ result @ v.mT
    torch.testing.assert_close(diagonal, torch.diag_embed(diagonal.diagonal(dim1=1, dim2=2)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_muon_is_torchs_muon_on_matrices(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    muon = Muon([ours], lr=0.02, momentum=0.9, weight_decay=0.1, dtype=torch.bfloat16)
    reference = torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="original")
    for step in range(5):
        torch.manual_seed(step)
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        muon.step()
        reference.step()
    # Both iterate in bf16, in another order of operations.
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)
    assert (ours - start).abs().max() > 0.02


def test_kernels_of_one_shape_are_updated_like_each_alone() -> None:
    module, alone = network(), network()
    together = build_optimizers(module, OptimizerConfig(name="muon"))
    for step in range(3):
        set_gradients(module, step)
        together.step(1.0, ZERO)
    for name, parameter in alone.named_parameters():
        if parameter.ndim < 2:
            continue
        muon = Muon([parameter], lr=0.02, momentum=0.95, weight_decay=0.0, dtype=torch.float32)
        for step in range(3):
            set_gradients(alone, step)
            muon.step()
        torch.testing.assert_close(parameter, module.get_parameter(name), atol=1e-6, rtol=1e-5)


def test_muon_leaves_edges_and_vectors_to_adamw() -> None:
    optimizers = build_optimizers(network(), OptimizerConfig(name="muon"), edges=("0.", "3."))
    of = {key: {optimizers.names[p] for g in part.param_groups for p in g["params"]} for key, part in optimizers.parts.items()}
    assert of["muon"] == {"1.weight", "2.weight"}
    assert of["adamw"] == {"0.weight", "3.weight", "0.bias", "1.bias", "2.bias", "3.bias"}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_flagged_step_leaves_weights_and_state_as_they_were(name: str) -> None:
    module = network()
    optimizers = build_optimizers(module, OptimizerConfig(name=name, weight_decay=0.1))  # type: ignore[arg-type]
    set_gradients(module, 0)
    optimizers.step(1.0, ZERO)
    weights = {k: v.clone() for k, v in module.state_dict().items()}
    state = {k: v.clone() for k, v in optimizers.tensors().items()}
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizers.step(1.0, ONE)
    assert all(torch.equal(weights[k], v) for k, v in module.state_dict().items())
    assert all(torch.equal(state[k], v) for k, v in optimizers.tensors().items())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_goes_through_tensors_unchanged(name: str) -> None:
    one, other = network(), network()
    config = OptimizerConfig(name=name)  # type: ignore[arg-type]
    first, second = build_optimizers(one, config), build_optimizers(other, config)
    set_gradients(one, 0)
    first.step(1.0, ZERO)
    other.load_state_dict(one.state_dict())
    second.load_tensors({k: v.clone() for k, v in first.tensors().items()})
    for module, optimizers in ((one, first), (other, second)):
        set_gradients(module, 1)
        optimizers.step(0.5, ZERO)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


def test_schedules_warm_up_and_fall_to_their_end() -> None:
    cosine = OptimizerConfig(schedule="cosine", warmup_images=100, final_lr=0.1)
    assert learning_rate_factor(cosine, 49, 1100) == 0.5
    assert learning_rate_factor(cosine, 100, 1100) == 1.0
    assert learning_rate_factor(cosine, 600, 1100) == pytest.approx(0.55)
    assert learning_rate_factor(cosine, 1100, 1100) == pytest.approx(0.1)
    assert learning_rate_factor(OptimizerConfig(schedule="linear"), 300, 1000) == pytest.approx(0.7)
    assert learning_rate_factor(OptimizerConfig(schedule="constant"), 999, 1000) == 1.0


def test_counts_of_images_have_units() -> None:
    assert [count(v, "images") for v in (7, "20k", "1.5M", " 300 ", "1e6", "2.5E3")] == [7, 20_000, 1_500_000, 300, 1_000_000, 2500]
    with pytest.raises(ConfigError, match="20q"):
        count("20q", "images")


def test_the_average_halves_its_distance_in_a_half_life() -> None:
    source = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(source.weight)
    ema = Ema(source, halflife=100, rampup=1.0)
    nn.init.ones_(source.weight)
    for images in range(1010, 1111, 10):
        if images > 1010:
            ema.update(images, 10, ZERO)
    assert ema.module.weight.item() == pytest.approx(0.5)
    ema.update(2000, 10, ONE)
    assert ema.module.weight.item() == pytest.approx(0.5)


def test_the_average_is_no_longer_than_its_share_of_the_run() -> None:
    ema = Ema(nn.Linear(1, 1), halflife=10**6, rampup=0.05)
    # 0.05 of 2,000 images is a half-life of 100.
    assert ema.decay(2000, 100) == pytest.approx(0.5)
    assert ema.decay(10**9, 10**6) == pytest.approx(0.5)
