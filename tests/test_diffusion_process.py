"""The path between latents and noise, its velocity, and the times at which it is trained and validated."""

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion import times
from diffusion.config import ProcessConfig
from diffusion.process import build, flow

TIMES = [ProcessConfig(), ProcessConfig(t_mean=0.8, t_std=0.6), ProcessConfig(t_mean=-0.5, t_std=1.4)]


def logit_normal(config: ProcessConfig, t: np.ndarray) -> np.ndarray:
    """The distribution function of sigmoid(N(mean, std**2)) (Atchison & Shen 1980)."""
    return scipy.stats.norm.cdf(scipy.special.logit(t), config.t_mean, config.t_std)


def pair(shape: tuple[int, ...] = (5, 3, 4, 4), dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=rng, dtype=dtype), torch.randn(shape, generator=rng, dtype=dtype)


def test_the_path_runs_from_latents_to_noise_each_sample_at_its_own_time() -> None:
    latents, noise = pair()
    assert torch.equal(flow().noisy(latents, noise, torch.zeros(5, dtype=torch.float64)), latents)
    assert torch.equal(flow().noisy(latents, noise, torch.ones(5, dtype=torch.float64)), noise)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    whole = flow().noisy(latents, noise, t)
    for i in range(5):
        expected = (1 - float(t[i])) * latents[i].numpy() + float(t[i]) * noise[i].numpy()
        np.testing.assert_allclose(whole[i].numpy(), expected, rtol=1e-14)


class Copies(TorchDispatchMode):
    """Counts copies from the CPU to another device, for each of which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        told = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" != torch.device(told.get("device") or "cpu").type:
            self.count += 1
        return func(*args, **told)


def test_a_training_step_copies_no_table_to_its_device() -> None:
    config = ProcessConfig(name="vp", times="uniform", weight="likelihood")
    made = build(config)
    latents, t = torch.empty(5, 3, 4, 4, device="meta"), torch.empty(5, device="meta")

    def step() -> int:
        with Copies() as copies:
            output = made.noisy(latents, latents, t)
            made.squared_error(output, latents, latents, t)
            times.weight(config, t)
        return copies.count

    assert step() > 0
    assert step() == 0


@pytest.mark.parametrize("at", [0.0, 0.3, 0.999])
def test_the_velocity_is_the_paths_derivative(at: float) -> None:
    latents, noise = pair()
    t, h = torch.full((5,), at, dtype=torch.float64), 1e-3
    difference = (flow().noisy(latents, noise, t + h) - flow().noisy(latents, noise, t - h)) / (2 * h)
    torch.testing.assert_close(flow().target(latents, noise, t), difference, rtol=1e-10, atol=1e-10)


def test_the_squared_error_is_a_mean_over_each_samples_values() -> None:
    latents, noise = pair()
    t = torch.full((5,), 0.3, dtype=torch.float64)
    predicted = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = ((predicted - (noise - latents)).numpy() ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(flow().squared_error(predicted, latents, noise, t).numpy(), expected, rtol=1e-13)
    assert torch.equal(flow().squared_error(noise - latents, latents, noise, t), torch.zeros(5, dtype=torch.float64))


def test_a_network_that_gives_nothing_has_the_error_that_the_docstring_says() -> None:
    latents, noise = pair((4000, 1, 4, 4))
    latents = 2 * latents + 1
    error = float(flow().squared_error(torch.zeros_like(latents), latents, noise, torch.rand(4000)).mean())
    # 64,000 values: a standard error of the mean of about 0.04.
    assert error == pytest.approx(1 + float(latents.square().mean()), abs=0.15)


def test_the_squared_error_of_half_precision_is_taken_in_float32() -> None:
    latents, noise = pair(dtype=torch.float32)
    t = torch.full((5,), 0.3)
    predicted = (noise - latents).to(torch.bfloat16)
    error = flow().squared_error(predicted, latents, noise, t)
    assert error.dtype == torch.float32
    # bfloat16 keeps 8 bits: relative rounding errors up to 2**-9, and not the 2**-8 of a difference that is rounded as well.
    assert 0 < float(error.max()) < float((noise - latents).abs().max()) ** 2 * 2.0**-18


@pytest.mark.parametrize("config", TIMES)
def test_training_times_are_logit_normal(config: ProcessConfig) -> None:
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    t = times.training_time(config, normal).numpy()
    assert 0 < t.min() < t.max() < 1
    assert scipy.stats.kstest(t, lambda x: logit_normal(config, x)).pvalue > 1e-3
    other = ProcessConfig(t_mean=config.t_mean + 0.1, t_std=config.t_std)
    assert scipy.stats.kstest(t, lambda x: logit_normal(other, x)).pvalue < 1e-6


@pytest.mark.parametrize("config", TIMES)
@pytest.mark.parametrize("count", [1, 8])
def test_validation_times_are_the_middles_of_equally_probable_stretches(config: ProcessConfig, count: int) -> None:
    found = np.array(times.validation_times(config, count))
    np.testing.assert_allclose(logit_normal(config, found), (np.arange(count) + 0.5) / count, rtol=1e-10)


def test_the_mean_over_validation_times_is_the_expectation_over_training_times() -> None:
    config = TIMES[1]

    def loss(t: np.ndarray) -> np.ndarray:
        return 1 / (0.1 + t) + t**2

    def density(z: float) -> float:
        return float(loss(scipy.special.expit(config.t_mean + config.t_std * z)) * scipy.stats.norm.pdf(z))

    expected = scipy.integrate.quad(density, -8, 8)[0]
    assert loss(np.array(times.validation_times(config, 8))).mean() == pytest.approx(expected, rel=0.01)
