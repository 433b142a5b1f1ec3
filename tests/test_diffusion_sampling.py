"""Samplers against the flow of Gaussian data, which has a closed form; their grids, against diffusers'; guidance; noise by number."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from autoencoder.runtime.errors import ConfigError
from diffusion import sampling
from diffusion.config import ConditioningConfig, ProcessConfig, SamplingConfig, TrainDiffusionConfig
from diffusion.denoiser import NULL_CLASS, null_labels
from diffusion.process import Process, build, flow
from diffusion.sampling import Level
from diffusion.schedulers import LEAST_LOG_SNR, build_scheduler, check_sampler
from tests.gaussian import MEAN, PROCESSES, STD, Perfect, expected, flow_map


def starts() -> Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def trained_levels(process: Process, steps: int) -> list[Level]:
    """steps + 1 levels at which a network is trained."""
    return sampling.levels(process, steps) if process.head == "velocity" else sampling.levels(process, steps + 1)[:-1]


def at(process: Process, *times: float) -> list[Level]:
    return [sampling.level(process, t) for t in times]


class Linear(nn.Module):
    """A stand-in network whose output tells label, time and latents apart; it counts how often it is asked, and with how many."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.rows.append(len(x))
        number = torch.where(labels == NULL_CLASS, -1.0, labels.to(x.dtype))
        return x * t.view(-1, 1, 1, 1) + number.view(-1, 1, 1, 1)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_closed_form_is_the_probability_flow(name: str) -> None:
    # dx/dt = alpha' E[latents | x] + sigma' E[noise | x], here within one interval of the tables, where alpha and sigma are smooth.
    process, x, t, h = build(PROCESSES[name]), starts(), 0.4005, 1e-5
    before, now, after = at(process, t - h, t, t + h)
    slope = (flow_map(x, now, after) - flow_map(x, now, before)) / (2 * h)
    latents, noise = expected(x, now)
    drift = ((after.alpha - before.alpha) * latents + (after.sigma - before.sigma) * noise) / (2 * h)
    torch.testing.assert_close(slope, drift, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("name", PROCESSES)
def test_samplers_converge_at_their_order(name: str, sampler: str, order: int) -> None:
    process, x, counts = build(PROCESSES[name]), starts(), [128, 256, 512]
    estimate = sampling.estimates(process, sampling.guided(Perfect(process), null_labels(64), 1))
    errors = []
    for steps in counts:
        grid = trained_levels(process, steps)
        end = sampling.SAMPLERS[sampler](estimate, x, grid)
        errors.append(float((end - flow_map(x, grid[0], grid[-1])).abs().max()))
    measured = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert measured == pytest.approx(order, abs=0.2)
    assert errors[-1] < {1: 1e-2, 2: 1e-4}[order]


@pytest.mark.parametrize(
    ("name", "sampler"),
    [(n, s) for n in PROCESSES for s in ("euler", "heun", "dpm++", "ddim") if s != "ddim" or n not in ("flow", "epsilon, cosine")],
)
def test_samples_come_to_the_data(name: str, sampler: str) -> None:
    process = build(PROCESSES[name])
    x = starts().view(-1, 1, 1, 1)
    made = sampling.sample(Perfect(process), x, null_labels(64), process=process, sampler=sampler, steps=100, guidance=1)
    # From noise to the data's quantiles; the first-order ones have an error of a few hundredths at this number of steps.
    first, last = sampling.levels(process, 100)[0], sampling.levels(process, 100)[-1]
    wide = 0.06 if sampler in ("euler", "ddim") else 0.005 if name != "v, scaled" else 0.03
    torch.testing.assert_close(made, flow_map(x, first, last), rtol=0, atol=wide)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++", "ddim"])
def test_one_model_samples_alike_whatever_its_head(sampler: str) -> None:
    x = starts().view(-1, 1, 1, 1)

    def drawn(name: str) -> Tensor:
        process = build(PROCESSES[name])
        return sampling.sample(Perfect(process), x, null_labels(64), process=process, sampler=sampler, steps=12, guidance=1)

    # The stock solvers compute in float32, where a noise's latents have the error of 1 / alpha = 157 roundings.
    torch.testing.assert_close(drawn("v"), drawn("epsilon"), rtol=0, atol=1e-10 if sampler in sampling.SAMPLERS else 1e-4)


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
@pytest.mark.parametrize("name", ["flow", "v"])
def test_both_are_exact_where_latents_and_noise_are_the_same_all_along(name: str, sampler: str) -> None:
    grid, known = at(build(PROCESSES[name]), 0.9, 0.2, 0.0), (starts() * 0.3 + 1, starts() - 2)
    begin, wanted = (level.alpha * known[0] + level.sigma * known[1] for level in (grid[0], grid[-1]))
    end = sampling.SAMPLERS[sampler](lambda x, level: known, begin, grid)
    torch.testing.assert_close(end, wanted, rtol=1e-13, atol=1e-13)


def test_heun_evaluates_twice_a_step_at_the_grids_times_and_euler_once() -> None:
    seen: list[float] = []

    def noted(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        seen.append(level.t)
        return x, x

    grid = at(flow(), 0.9, 0.5, 0.0)
    sampling.euler(noted, starts(), grid)
    assert seen == [0.9, 0.5]
    seen.clear()
    sampling.heun(noted, starts(), grid)
    assert seen == [0.9, 0.5, 0.5, 0.0]
    seen.clear()
    # Where no network is trained none is asked.
    sampling.heun(noted, starts(), [*at(build(PROCESSES["v"]), 0.9, 0.0), sampling.CLEAN])
    assert seen == [0.9, 0.0, 0.0]


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 8, 20, 50, 250])
def test_a_flows_grid_is_diffusers_flow_schedulers_shifted_or_not(steps: int, shift: float) -> None:
    scheduler = build_scheduler(ProcessConfig(), shift)
    scheduler.set_timesteps(steps)
    ours = [level.sigma for level in sampling.levels(flow(), steps, shift)]
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_shift_lowers_every_log_snr_by_as_much(shift: float) -> None:
    plain, moved = (sampling.levels(flow(), 10, s)[:-1] for s in (1.0, shift))
    for before, after in zip(plain, moved, strict=True):
        ratio = (before.alpha / before.sigma) / (after.alpha / after.sigma)
        assert ratio == pytest.approx(shift, rel=1e-9)


@pytest.mark.parametrize("name", [name for name in PROCESSES if name != "flow"])
def test_a_tables_grid_begins_where_stocks_does_and_ends_without_noise(name: str) -> None:
    process = build(PROCESSES[name])
    scheduler = build_scheduler(PROCESSES[name])
    scheduler.set_timesteps(10)
    grid = sampling.levels(process, 10)
    assert len(grid) == 11
    # Ours begins at the log SNR itself, stock at the last whole timestep before it.
    assert abs(grid[0].t * 1000 - int(scheduler.timesteps[0])) < 2
    assert float(process.path.log_snr(torch.tensor(grid[0].t, dtype=torch.float64))) > LEAST_LOG_SNR - 1e-6
    assert grid[-2].t == 0
    assert (grid[-1].alpha, grid[-1].sigma, grid[-1].trained) == (1, 0, False)
    assert all(a.t > b.t for a, b in pairwise(grid[:-1]))
    assert len(sampling.levels(process, 1)) == 2


@pytest.mark.parametrize("name", PROCESSES)
def test_stock_solvers_get_the_processs_own_table(name: str) -> None:
    from diffusion import schedulers

    process = build(PROCESSES[name])
    for solver in ("dpm++",) if name == "flow" else ("dpm++", "ddim"):
        ours, named = schedulers._solver(solver, process, 1.0), build_scheduler(PROCESSES[name])
        assert ours.config["prediction_type"] == named.config["prediction_type"]
        torch.testing.assert_close(ours.alphas_cumprod, named.alphas_cumprod, rtol=1e-4, atol=0)
        for scheduler in (ours, named):
            scheduler.set_timesteps(20)
        if solver == "dpm++":
            assert torch.equal(ours.timesteps, named.timesteps)


def test_guidance_is_given_inside_its_interval_and_costs_nothing_outside() -> None:
    process, labels = build(PROCESSES["v"]), torch.tensor([4, 0])
    network, x = Linear(), torch.ones(2, 1, 2, 2)
    output = sampling.guided(network, labels, 3.0, (0.25, 0.75))
    for t, rows in ((0.2, 2), (0.25, 4), (0.5, 4), (0.75, 4), (0.8, 2)):
        network.rows.clear()
        guidance = 3.0 if rows == 4 else 1.0
        wanted = x * t + (-1 + guidance * (labels + 1)).view(-1, 1, 1, 1)
        torch.testing.assert_close(output(x, t), wanted)
        assert network.rows == [rows]

    def drawn(guidance: float, interval: tuple[float, float]) -> Tensor:
        return sampling.sample(Linear(), x, labels, process=process, sampler="heun", steps=6, guidance=guidance, guidance_interval=interval)

    assert torch.equal(drawn(3.0, (0.0, 1.0)), drawn(3.0, (0.0, 0.999)))
    # No time of this grid is in the interval.
    assert torch.equal(drawn(3.0, (0.01, 0.02)), drawn(1.0, (0.0, 1.0)))
    assert not torch.equal(drawn(3.0, (0.25, 0.75)), drawn(3.0, (0.0, 1.0)))


def refused(*, process: ProcessConfig = PROCESSES["flow"], dropout: float = 0.1, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        TrainDiffusionConfig(
            latents="a", out="b", process=process, conditioning=ConditioningConfig(dropout=dropout), sampling=SamplingConfig(**settings)
        )
    return str(caught.value)


def test_settings_that_do_nothing_or_cannot_be_are_refused() -> None:
    assert "sampling.time_shift: got 2.0; a variance-preserving process has" in refused(process=PROCESSES["v"], time_shift=2.0)
    assert "sampling.sampler: got 'ddim'; DDIM is for variance-preserving" in refused(sampler="ddim")
    assert "DDIM begins where the cosine table has no signal" in refused(process=PROCESSES["epsilon, cosine"], sampler="ddim")
    assert "guidance_interval: got [0.2, 0.8]; guidance is 1" in refused(guidance=1, guidance_interval=(0.2, 0.8))
    assert "where none is ever dropped, nothing is guided" in refused(dropout=0, guidance_interval=(0.2, 0.8))
    for interval in ((0.8, 0.2), (-0.1, 0.5), (0.5, 1.5), (0.5, 0.5)):
        assert "give [low, high] with 0 <= low < high <= 1" in refused(guidance_interval=interval)
    assert "time_shift: got 0; give a shift above 0" in refused(time_shift=0)
    assert "steps: got 1001; dpm++ is diffusers' and has 1000 timesteps" in refused(sampler="dpm++", steps=1001)
    for process, sampler, shift in (("flow", "ddim", 1), ("v", "euler", 2), ("epsilon, cosine", "ddim", 1)):
        with pytest.raises(ConfigError):
            check_sampler(build(PROCESSES[process]), sampler, shift)
    for process, sampler, shift in (("flow", "dpm++", 2), ("v", "ddim", 1), ("v, cosine", "ddim", 1), ("epsilon", "ddim", 1)):
        check_sampler(build(PROCESSES[process]), sampler, shift)


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
    start = sampling.noise(0, range(200), (1, 8, 8))
    drawn = sampling.sample(Perfect(flow()), start, null_labels(200), process=flow(), sampler="heun", steps=50, guidance=1)
    assert drawn.dtype == torch.float32
    assert scipy.stats.kstest(drawn.flatten().numpy(), "norm", args=(MEAN, STD)).pvalue > 1e-3
