"""What a diffusion model is measured by, on data for which the best model and its loss have closed forms."""

import numpy as np
import pytest
import scipy.spatial.distance
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusion import sampling, times
from diffusion.config import ProcessConfig, SamplingConfig
from diffusion.denoiser import NULL_CLASS, null_labels
from diffusion.evaluation import LEVELS, Nothing, draw_samples, nearest, two_sample, validation_loss
from diffusion.frechet import frechet_distance
from diffusion.process import flow
from tests import gaussian
from tests.gaussian import MEAN, STD

SHAPE = (2, 8, 8)


class Rows:
    """Held-out draws of N(MEAN, STD**2), as `ValidationRows` gives them."""

    def __init__(self, count: int) -> None:
        rng = torch.Generator().manual_seed(0)
        self.latents, self.noise = MEAN + STD * torch.randn(count, *SHAPE, generator=rng), torch.randn(count, *SHAPE, generator=rng)

    def __len__(self) -> int:
        return len(self.latents)

    def read(self, part: range) -> tuple[Tensor, Tensor, Tensor]:
        places = list(part)
        return self.latents[places], self.noise[places], torch.full((len(places),), NULL_CLASS)


class Perfect(gaussian.Perfect):
    """E[noise - latents | x_t]."""

    def __init__(self) -> None:
        super().__init__(flow())


def losses(network: nn.Module, rows: Rows, batch_size: int = 64) -> np.ndarray:
    found = validation_loss(network, rows, flow(), ProcessConfig(), accelerator=Accelerator(cpu=True), batch_size=batch_size)  # type: ignore[arg-type]
    assert [level.t for level in found] == times.validation_times(ProcessConfig(), LEVELS)
    return np.array([level.loss for level in found])


def test_the_best_networks_loss_is_the_velocitys_conditional_variance() -> None:
    # Var[noise - latents | x_t] = s**2 / ((1 - t)**2 s**2 + t**2) for jointly Gaussian latents and noise.
    expected = [STD**2 / (((1 - t) * STD) ** 2 + t**2) for t in times.validation_times(ProcessConfig(), LEVELS)]
    # 300 x 128 values: a relative standard error of sqrt(2 / 38,400).
    np.testing.assert_allclose(losses(Perfect(), Rows(300)), expected, rtol=5 * np.sqrt(2 / 38_400))


def test_the_loss_is_a_mean_over_all_rows_whatever_the_batches() -> None:
    rows = Rows(37)
    expected = float((rows.noise - rows.latents).double().square().mean())
    for batch_size in (1, 10, 37, 64):
        np.testing.assert_allclose(losses(Nothing(), rows, batch_size), expected, rtol=1e-6)


def test_a_perfect_models_samples_are_as_far_as_the_floor_and_noise_is_farther() -> None:
    config, number = SamplingConfig(steps=20), 400
    samples, start = (
        draw_samples(network, null_labels(number), config, process=flow(), seed=1, shape=SHAPE, guidance=1, batch_size=100)
        for network in (Perfect(), Nothing())
    )
    rng = torch.Generator().manual_seed(1)
    held_out, training = (MEAN + STD * torch.randn(number, *SHAPE, generator=rng) for _ in range(2))
    # An untrained network's flow stays where it starts.
    torch.testing.assert_close(start, sampling.noise(1, range(number), SHAPE))
    found = two_sample(samples, held_out, training, start)
    assert found.number == number
    assert found.samples == pytest.approx(found.floor, rel=0.1)
    # N(0, 1) against N(m, s**2) in each value, and what finite sets add.
    apart = 128 * (MEAN**2 + (1 - STD) ** 2)
    assert apart < found.untrained < 1.5 * apart + found.floor
    vectors = [values.flatten(1).double().numpy() for values in (start, held_out)]
    assert found.untrained == pytest.approx(frechet_distance(*vectors))


def test_samples_do_not_depend_on_how_they_are_batched() -> None:
    def drawn(batch_size: int) -> Tensor:
        config, labels = SamplingConfig(steps=4), null_labels(7)
        return draw_samples(Perfect(), labels, config, process=flow(), seed=3, shape=SHAPE, guidance=1, batch_size=batch_size)

    assert torch.equal(drawn(7), drawn(3))
    assert drawn(7).shape == (7, *SHAPE)


def test_the_nearest_is_found_by_euclidean_distance_whatever_the_chunks() -> None:
    rng = np.random.default_rng(0)
    samples, candidates = (rng.standard_normal((number, *SHAPE)) for number in (20, 50))
    distances = scipy.spatial.distance.cdist(samples.reshape(20, -1), candidates.reshape(50, -1))
    expected = candidates[distances.argmin(1)].astype(np.float32)
    known = torch.from_numpy(candidates).float()
    for size in (50, 7, 1):
        np.testing.assert_array_equal(nearest(torch.from_numpy(samples).float(), known.split(size)).numpy(), expected)
