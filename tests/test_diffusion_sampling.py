"""Samplers against the flow of Gaussian data, whose velocity and flow map have closed forms; guidance; noise by number."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from diffusion import sampling
from diffusion.denoiser import NULL_CLASS
from diffusion.pipeline import build_scheduler

MEAN, STD = 0.7, 0.5
"""Of the data: N(m, s**2) in each value."""


def spread(t: float) -> float:
    """The standard deviation of x_t = (1 - t) latents + t noise."""
    return math.sqrt(((1 - t) * STD) ** 2 + t**2)


def gaussian_velocity(x: Tensor, t: float) -> Tensor:
    """E[noise - latents | x_t = x]: latents, noise and x_t are jointly Gaussian."""
    slope = (t - (1 - t) * STD**2) / spread(t) ** 2
    return -MEAN + slope * (x - (1 - t) * MEAN)


def flow_map(x: Tensor, start: float, end: float) -> Tensor:
    """Where the flow takes x: one dimension's flow maps quantile to quantile, here N((1 - t) m, spread(t)**2) to its like."""
    return (1 - end) * MEAN + spread(end) / spread(start) * (x - (1 - start) * MEAN)


def starts() -> Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Linear(nn.Module):
    """A stand-in network whose velocity tells label, time and latents apart; it counts how often it is asked, and with how many."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.rows.append(len(x))
        number = torch.where(labels == NULL_CLASS, -1.0, labels.to(x.dtype))
        return x * t.view(-1, 1, 1, 1) + number.view(-1, 1, 1, 1)


def test_the_closed_form_is_the_flows_velocity() -> None:
    # d/dt of the flow map along itself.
    x, t, h = starts(), 0.4, 1e-5
    difference = (flow_map(x, t, t + h) - flow_map(x, t, t - h)) / (2 * h)
    torch.testing.assert_close(gaussian_velocity(x, t), difference, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_samplers_converge_at_their_order(name: str, order: int) -> None:
    x, counts = starts(), [32, 64, 128, 256]
    errors = []
    for steps in counts:
        grid = sampling.times(steps)
        end = sampling.SAMPLERS[name](gaussian_velocity, x, grid)
        errors.append(float((end - flow_map(x, grid[0], 0)).abs().max()))
    measured = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert measured == pytest.approx(order, abs=0.1)
    assert errors[-1] < {1: 2e-2, 2: 1e-4}[order]


def test_both_are_exact_where_the_path_is_straight() -> None:
    x = starts()
    for run in sampling.SAMPLERS.values():
        torch.testing.assert_close(run(lambda x, t: torch.full_like(x, 3.0), x, [0.9, 0.2, 0.0]), x - 2.7, rtol=1e-14, atol=1e-14)


def test_heun_evaluates_twice_a_step_at_the_grids_times_and_euler_once() -> None:
    seen: list[float] = []

    def noted(x: Tensor, t: float) -> Tensor:
        seen.append(t)
        return x

    sampling.euler(noted, starts(), [0.9, 0.5, 0.0])
    assert seen == [0.9, 0.5]
    seen.clear()
    sampling.heun(noted, starts(), [0.9, 0.5, 0.0])
    assert seen == [0.9, 0.5, 0.5, 0.0]


@pytest.mark.parametrize("steps", [1, 2, 8, 20, 50, 250])
def test_the_grid_is_diffusers_flow_schedulers(steps: int) -> None:
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(sampling.times(steps), scheduler.sigmas.numpy(), rtol=0, atol=1e-7)


def test_guidance_moves_away_from_the_null_classs_velocity() -> None:
    x, labels = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([4, 0, 2])
    network, t, w = Linear(), 0.3, 2.5
    # x t + label against x t - 1: the labels' part alone is extrapolated.
    expected = x * t + (-1 + w * (labels + 1)).view(-1, 1, 1, 1)
    torch.testing.assert_close(sampling.guided(network, labels, w)(x, t), expected)
    assert network.rows == [6]
    torch.testing.assert_close(sampling.guided(network, labels, 1)(x, t), x * t + labels.view(-1, 1, 1, 1))
    assert network.rows == [6, 3]


def test_guidance_without_a_class_is_none_and_costs_nothing() -> None:
    x, network = torch.ones(2, 1, 2, 2), Linear()
    torch.testing.assert_close(sampling.guided(network, torch.full((2,), NULL_CLASS), 3.0)(x, 0.5), x * 0.5 - 1)
    assert network.rows == [2]
    # One without a class beside one with: no class is no direction.
    mixed = sampling.guided(network, torch.tensor([5, NULL_CLASS]), 3.0)(x, 0.5)
    torch.testing.assert_close(mixed, x * 0.5 + torch.tensor([17.0, -1.0]).view(-1, 1, 1, 1))


def test_noise_is_a_function_of_seed_and_number() -> None:
    shape = (4, 8, 8)
    whole = sampling.noise(3, range(10), shape)
    assert torch.equal(sampling.noise(3, [7, 2], shape), whole[[7, 2]])
    assert torch.equal(torch.cat([sampling.noise(3, range(i, i + 5), shape) for i in (0, 5)]), whole)
    assert len({tuple(row.tolist()) for row in whole.flatten(1)}) == 10
    assert not torch.equal(sampling.noise(4, range(10), shape), whole)


def test_noise_is_standard_normal_within_and_between_numbers() -> None:
    values = sampling.noise(0, range(400), (1, 8, 8)).flatten(1).double().numpy()
    assert scipy.stats.kstest(values.ravel(), "norm").pvalue > 1e-3
    # 200 pairs of neighbouring numbers over 64 values each: a correlation's standard error is 1 / sqrt(12,800).
    neighbours = np.corrcoef(values[::2].ravel(), values[1::2].ravel())[0, 1]
    assert abs(neighbours) < 4 / math.sqrt(12_800)


def test_samples_of_a_perfect_network_have_the_datas_distribution() -> None:
    class Perfect(nn.Module):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return gaussian_velocity(x, float(t[0]))

    start = sampling.noise(0, range(200), (1, 8, 8))
    drawn = sampling.sample(Perfect(), start, torch.full((200,), NULL_CLASS), sampler="heun", steps=50, guidance=1)
    assert drawn.dtype == torch.float32
    assert scipy.stats.kstest(drawn.flatten().numpy(), "norm", args=(MEAN, STD)).pvalue > 1e-3
