"""The bound on -log p(z) and the ODE's value, against what Gaussians and mixtures of them are known to have."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor, nn

from diffusion.likelihood import (
    Denoise,
    Estimate,
    Latents,
    assemble,
    bound,
    evaluations,
    evenly,
    gaussian_levels,
    level_edges,
    log_snr_ends,
)
from diffusion.ode_likelihood import ode_values
from diffusion.pilot import highest_level, plan, planned_bounds
from diffusion.process import Process, alphas_cumprod, flow, variance_preserving

PROCESSES = {
    "flow": flow(),
    "vp v": variance_preserving("v", alphas_cumprod("linear")),
    "vp epsilon": variance_preserving("epsilon", alphas_cumprod("squaredcos_cap_v2")),
}
SHAPE = (3, 2, 2)
DIMS = math.prod(SHAPE)


class Gaussian:
    """Latents N(mean, covariance), with the denoiser that knows it."""

    def __init__(self, *, scale: float = 1.0) -> None:
        draws = torch.Generator().manual_seed(0)
        turned = torch.linalg.qr(torch.randn(DIMS, DIMS, generator=draws, dtype=torch.float64))[0]
        self.axes, self.variances = turned, torch.linspace(0.3, 1.7, DIMS, dtype=torch.float64)
        self.mean = 0.3 * torch.randn(DIMS, generator=draws, dtype=torch.float64)
        self.scale = scale

    def rows(self, number: int, first: int = 0) -> Latents:
        normal = torch.randn(number, DIMS, generator=torch.Generator().manual_seed(first + 1), dtype=torch.float64)
        values = self.mean + (normal * self.variances.sqrt()) @ self.axes.T
        return Latents(values.view(number, *SHAPE), torch.zeros(number, dtype=torch.int64), range(first, first + number))

    def nats(self, rows: Latents, added: float = 0.0) -> Tensor:
        """-log p(z), (N,), with this variance added."""
        covariance = self.axes @ torch.diag(self.variances + added) @ self.axes.T
        return -torch.distributions.MultivariateNormal(self.mean, covariance).log_prob(rows.values.flatten(1))

    def denoiser(self, process: Process) -> Denoise:
        """E[z | z_t], times `scale`, in the process's own terms."""

        def output(noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            alpha, sigma = (scale.view(-1, 1) for scale in process.path.scales(t))
            share = alpha * self.variances / (alpha**2 * self.variances + sigma**2)
            denoised = self.mean + ((noisy.flatten(1) - alpha * self.mean) @ self.axes * share) @ self.axes.T
            return process.output(noisy, (self.scale * denoised).view_as(noisy), t)

        return output


@pytest.mark.parametrize("name", PROCESSES)
def test_the_bound_of_the_analytic_denoiser_is_the_gaussians_cross_entropy(name: str) -> None:
    process, truth = PROCESSES[name], Gaussian()
    denoiser, rows = truth.denoiser(process), truth.rows(2000, 10_000)
    chosen = plan(denoiser, truth.rows(500), process, seed=0)
    # A fitted coefficient costs half a nat over the rows of its fit, as in AIC.
    allowed = (0.0, chosen.calibration.coefficients.numel() / (2 * 500))
    for terms, more in zip(planned_bounds(denoiser, rows, process, chosen, draws=48, seed=0), allowed, strict=True):
        above = Estimate.of((terms.nats - truth.nats(rows))[None])
        assert -3 * above.standard_error - 1e-3 * DIMS < above.mean < 3 * above.standard_error + 1e-3 * DIMS + more
        assert above.standard_error < 2e-3 * DIMS
        torch.testing.assert_close(terms.channels.sum(1), terms.nats)
        torch.testing.assert_close(terms.first.sum(1) + terms.levels.sum((1, 2)) + terms.last.sum(1), terms.nats)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_odes_value_is_the_density_of_what_it_samples(name: str) -> None:
    process, truth = PROCESSES[name], Gaussian()
    rows, (low, high) = truth.rows(4), log_snr_ends(process)
    denoiser = truth.denoiser(process)
    exact = ode_values(denoiser, rows, process, low=low, high=high, rtol=1e-6, atol=1e-6)
    # The flow takes each axis from N(alpha mean, alpha**2 v + sigma**2) at one end to the same at the other, where it is held to N(0, 1).
    (a, b), along = (torch.sigmoid(torch.tensor(end, dtype=torch.float64)) for end in (high, low)), truth.mean @ truth.axes
    begins, ends = a * truth.variances + 1 - a, b * truth.variances + 1 - b
    arrived = (ends / begins * a).sqrt() * ((rows.values.flatten(1) - truth.mean) @ truth.axes) + b.sqrt() * along
    expected = 0.5 * (arrived.square() + math.log(2 * math.pi) - (ends / begins).log() - a.log()).sum(1)
    torch.testing.assert_close(exact.nats, expected, atol=1e-3, rtol=0)
    assert (exact.nats - truth.nats(rows)).mean().abs() < 1e-3 * DIMS
    assert exact.errors.eq(0).all() and exact.evaluations > 10
    probed = ode_values(denoiser, rows, process, low=low, high=high, probes=64, rtol=1e-4, atol=1e-4)
    assert ((probed.nats - exact.nats).abs() < 4 * probed.errors).all()
    assert (probed.errors < 0.2 * DIMS).all()


def test_a_wrong_denoiser_costs_what_quadrature_says() -> None:
    process, truth = flow(), Gaussian(scale=0.8)
    truth.mean.zero_()
    rows, sampler = truth.rows(2000), evenly(level_edges(process))
    found = Estimate.of(bound(truth.denoiser(process), rows, process, sampler, draws=60, seed=0).nats[None])

    def integrand(log_snr: float, variance: float) -> float:
        # E|z - s E[z|z_t]|**2 r / 2, where E[z|z_t] has the variance v**2 r / (v r + 1) and that covariance with z.
        r = math.exp(log_snr)
        return 0.5 * r * (variance - (2 * 0.8 - 0.8**2) * variance**2 * r / (variance * r + 1))

    low, high = log_snr_ends(process)
    levels = sum(quad(integrand, low, high, args=(v,), limit=500)[0] for v in truth.variances.tolist())
    last = 0.5 * DIMS * (math.log(2 * math.pi * math.e) - high)
    assert found.mean == pytest.approx(levels + last, abs=4 * found.standard_error)
    assert found.mean > truth.nats(rows).mean() + 10 * found.standard_error


def test_the_sampler_is_unbiased_and_better_than_even_draws() -> None:
    process, truth = flow(), Gaussian()
    denoiser, rows = truth.denoiser(process), truth.rows(400)
    chosen = plan(denoiser, truth.rows(200, 5000), process, seed=0)
    even = evenly(chosen.sampler.edges)

    def replicates(sampler: object, number: int) -> Tensor:
        made = [dataclasses.replace(rows, numbers=range(400 * k, 400 * (k + 1))) for k in range(number)]
        return torch.stack([bound(denoiser, m, process, sampler, draws=4, seed=0).nats for m in made])  # type: ignore[arg-type]

    planned, plainly = Estimate.of(replicates(chosen.sampler, 6)), Estimate.of(replicates(even, 6))
    reference = Estimate.of(bound(denoiser, rows, process, even, draws=200, seed=1).nats[None]).mean
    for found in (planned, plainly):
        assert found.mean == pytest.approx(reference, abs=4 * found.monte_carlo + 0.01)
    assert planned.monte_carlo < 0.7 * plainly.monte_carlo
    # Each level alone is as unbiased as the whole.
    levels = torch.stack([bound(denoiser, rows, process, s, draws=100, seed=2).levels.sum(2).mean(0) for s in (chosen.sampler, even)])
    torch.testing.assert_close(levels[0], levels[1], atol=0.04, rtol=0.03)


def test_draws_follow_the_density() -> None:
    edges = torch.tensor([-3.0, -1.0, 0.0, 4.0], dtype=torch.float64)
    sampler = dataclasses.replace(evenly(edges), probabilities=torch.tensor([0.5, 0.1, 0.4], dtype=torch.float64))
    uniform = torch.arange(0, 1, 1e-4, dtype=torch.float64)
    log_snr, weight, level = sampler.draw(uniform)
    assert np.bincount(level.numpy()).tolist() == [5000, 1000, 4000]
    assert (log_snr.diff() > 0).all() and log_snr.min() >= -3 and log_snr.max() < 4
    # The mean of f / density is the integral of f.
    assert float((weight * log_snr.square()).mean()) == pytest.approx((4**3 + 3**3) / 3, rel=1e-3)


def test_a_prior_that_is_gaussian_has_its_density_in_levels_and_ends() -> None:
    process, rows = flow(), Gaussian().rows(5)
    mean, std = torch.tensor([0.3, -1.0, 0.1]), torch.tensor([0.5, 1.3, 2.0])
    edges = torch.linspace(-30, 40, 5, dtype=torch.float64)
    differences = gaussian_levels(rows.values, mean, std, edges) - gaussian_levels(rows.values, torch.zeros(3), torch.ones(3), edges)
    terms = assemble(rows.values, process, edges, differences)
    exact = -torch.distributions.Normal(mean.view(-1, 1, 1).double(), std.view(-1, 1, 1).double()).log_prob(rows.values).flatten(2).sum(2)
    torch.testing.assert_close(terms.channels, exact, atol=1e-6, rtol=0)


def test_a_rows_figure_is_its_own_in_whatever_batch() -> None:
    process, truth = PROCESSES["vp v"], Gaussian()
    denoiser, rows, sampler = truth.denoiser(process), truth.rows(7), evenly(level_edges(process))
    whole = bound(denoiser, rows, process, sampler, draws=8, seed=3, batch_size=1000).levels
    torch.testing.assert_close(
        bound(denoiser, rows, process, sampler, draws=8, seed=3, batch_size=16).levels, whole, rtol=1e-12, atol=1e-12
    )
    alone = Latents(rows.values[4:5], rows.labels[4:5], [4])
    torch.testing.assert_close(bound(denoiser, alone, process, sampler, draws=8, seed=3).levels, whole[4:5], rtol=1e-12, atol=1e-12)
    assert not torch.equal(bound(denoiser, rows, process, sampler, draws=8, seed=4).levels, whole)


def test_what_training_has_starved_is_left_out_or_calibrated_away() -> None:
    process, truth = flow(), Gaussian()
    knows = truth.denoiser(process)

    def starved(noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        log_snr = process.path.log_snr(t).view(-1, 1, 1, 1)
        wrong = torch.where(log_snr > 0, 1.5, 1.0)
        return process.output(noisy, wrong * process.denoised(noisy, knows(noisy, t, labels), t), t)

    chosen = plan(starved, truth.rows(400), process, seed=0)
    edges, rows = chosen.sampler.edges, truth.rows(1000, 9000)
    assert -1 <= edges[chosen.levels] <= 1 and chosen.calibrated_levels > chosen.levels
    own, calibrated = planned_bounds(starved, rows, process, chosen, draws=32, seed=0)
    exact = truth.nats(rows)
    gaps = [Estimate.of((terms.nats - exact)[None]) for terms in (own, calibrated)]
    assert gaps[0].mean > 0.05 * DIMS and gaps[1].mean < 0.3 * gaps[0].mean
    assert gaps[1].mean > -3 * gaps[1].standard_error


def test_the_highest_level_is_the_lowest_of_equals() -> None:
    edges = torch.arange(5, dtype=torch.float64)
    assert highest_level(torch.tensor([1.0, 1.5, 2.5, 1.9]).double(), edges, 4) == 2
    # 0.5 nats a value and unit is what the last term pays: a level at just that is nothing won.
    assert highest_level(torch.tensor([1.0, 2.0, 2.0, 2.0]).double(), edges, 4) == 1


def test_a_calibration_is_the_least_squares_of_its_level() -> None:
    process, truth = flow(), Gaussian(scale=0.6)
    denoiser, rows = truth.denoiser(process), truth.rows(50)
    chosen = plan(denoiser, rows, process, seed=0)
    (evaluated,) = evaluations(
        denoiser, rows, process, evenly(level_edges(process)), draws=30, seed=0, batch_size=5000, stream="likelihood pilot"
    )
    level, channel = 14, 1
    at = [values[:, level, channel].flatten() for values in (evaluated.noise_hat, evaluated.denoised, evaluated.noise)]
    expected = np.linalg.lstsq(torch.stack(at[:2], 1).numpy(), at[2].numpy(), rcond=None)[0]
    np.testing.assert_allclose(chosen.calibration.coefficients[level, channel].numpy(), expected, rtol=1e-6)


def test_standard_errors_are_the_spread_of_repeated_studies() -> None:
    draws = torch.Generator().manual_seed(0)
    images, crops = 40, 3
    found, means = [], []
    for _ in range(400):
        rows = torch.randn(images, 1, generator=draws) + 0.5 * torch.randn(images, crops, generator=draws)
        values = rows.flatten() + 0.7 * torch.randn(2, images * crops, generator=draws)
        estimate = Estimate.of(values.double(), torch.arange(images).repeat_interleave(crops))
        found.append(estimate)
        means.append(estimate.mean)
    assert float(np.mean([e.standard_error for e in found])) == pytest.approx(float(np.std(means)), rel=0.1)
    assert float(np.mean([e.monte_carlo for e in found])) == pytest.approx(0.7 / math.sqrt(2 * images * crops), rel=0.05)
    assert math.isnan(Estimate.of(torch.ones(1, 4)).monte_carlo) and math.isnan(Estimate.of(torch.ones(2, 1)).standard_error)


class Small(nn.Module):
    """A denoiser of one value."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        x, s = noisy.flatten(1), t[:, None]
        features = [x, s, x * s, (3 * s).sin(), (3 * s).cos(), (8 * s).sin(), (8 * s).cos(), x / (s + 0.2)]
        return self.layers(torch.cat(features, 1)).view_as(noisy)


def test_a_trained_networks_bound_is_above_the_entropy_of_a_mixture_and_near_it() -> None:
    torch.manual_seed(0)
    process, network, width, apart = flow(), Small(), 0.3, 1.0

    def draw(number: int) -> Tensor:
        return (torch.randint(0, 2, (number, 1, 1, 1)) * 2 - 1) * apart + width * torch.randn(number, 1, 1, 1)

    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for _ in range(1000):
        latents, noise, t = draw(384), torch.randn(384, 1, 1, 1), torch.sigmoid(1.5 * torch.randn(384))
        labels = torch.zeros(384, dtype=torch.int64)
        loss = process.squared_error(network(process.noisy(latents, noise, t), t, labels), latents, noise, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.requires_grad_(False)
    rows, pilot = (Latents(draw(n), torch.zeros(n, dtype=torch.int64), range(n)) for n in (6000, 2000))
    chosen = plan(network, pilot, process, seed=0, batch_size=50_000)

    def log_density(x: Tensor) -> Tensor:
        parts = torch.stack([torch.distributions.Normal(sign * apart, width).log_prob(x) for sign in (-1, 1)])
        return parts.logsumexp(0) - math.log(2)

    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    entropy = float(torch.trapezoid(-log_density(grid).exp() * log_density(grid), grid))
    exact = -log_density(rows.values.flatten().double())
    # The same rows' own -log p(z) for what these rows happen to be: less noisy than the bound alone.
    for terms in planned_bounds(network, rows, process, chosen, draws=64, seed=0, batch_size=50_000):
        above = Estimate.of((terms.nats - exact)[None])
        assert above.mean > -2 * above.standard_error
        assert above.mean < 0.05
        assert float(terms.nats.mean()) - entropy == pytest.approx(above.mean, abs=4 * float(exact.std()) / math.sqrt(6000))
