"""At which times a network is trained, and how its error counts there: densities, importance weights, the bound's units."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from autoencoder.runtime.errors import ConfigError
from diffusion import process, times
from diffusion.config import ProcessConfig

DRAWS = 20_000
LIKELIHOOD = {
    "flow": ProcessConfig(times="likelihood"),
    "v": ProcessConfig(name="vp", times="likelihood", schedule="scaled_linear"),
    "epsilon": ProcessConfig(name="vp", prediction="epsilon", times="likelihood", log_snr=(-6.0, 5.0)),
}
LOW_HIGH = {"flow": (-10.0, 10.0), "v": None, "epsilon": (-6.0, 5.0)}
"""Log SNRs between which the bound is taken; None: the path's own ends."""
BELOW: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    # Integrals over log SNR of 0.5 alpha**2 by hand: alpha = sigmoid(x / 2), alpha**2 = sigmoid(x), and 0.5 for the noise itself.
    "flow": lambda x: np.logaddexp(0, x / 2) - scipy.special.expit(x / 2),
    "v": lambda x: 0.5 * np.logaddexp(0, x),
    "epsilon": lambda x: 0.5 * x,
}
WEIGHTED = [
    ProcessConfig(times="uniform", weight="likelihood"),
    ProcessConfig(t_mean=-0.8, t_std=2.5, weight="likelihood", log_snr=(-5.0, 6.0)),
    ProcessConfig(name="vp", times="uniform", weight="likelihood"),
    ProcessConfig(name="vp", prediction="epsilon", t_std=1.6, weight="likelihood", log_snr=(-4.0, 3.0)),
]


def drawn(config: ProcessConfig) -> Tensor:
    normal = torch.randn(DRAWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return times.training_time(config, normal)


def ends(name: str) -> tuple[float, float]:
    known = LOW_HIGH[name]
    if known is not None:
        return known
    squares = process.alphas_cumprod(LIKELIHOOD[name].schedule)
    return float(scipy.special.logit(squares[-1])), float(scipy.special.logit(squares[0]))


def error(log_snr: float) -> float:
    """Some network's squared error over log SNR."""
    return 1 + 0.8 * math.sin(0.7 * log_snr) + 0.05 * log_snr**2


def integral(config: ProcessConfig, of: Callable[[Tensor], Tensor]) -> float:
    """E[of(t)] over training times, by quadrature in the logit of the share of the path, where the ends are far away."""
    first, last = process.build(config).path.times
    logit = torch.linspace(-18, 18, 400_001, dtype=torch.float64)
    share = torch.sigmoid(logit)
    t = first + (last - first) * share
    uniform, normal = (share * (1 - share)).numpy(), scipy.stats.norm.pdf(logit.numpy(), config.t_mean, config.t_std)
    return float(scipy.integrate.trapezoid(of(t).numpy() * (uniform if config.times == "uniform" else normal), logit.numpy()))


def test_uniform_times_are_uniform_over_the_path() -> None:
    flow, vp = drawn(ProcessConfig(times="uniform")), drawn(ProcessConfig(name="vp", times="uniform"))
    assert scipy.stats.kstest(flow.numpy(), "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(vp.numpy(), scipy.stats.uniform(0, 0.999).cdf).pvalue > 1e-3
    assert 0.998 < float(vp.max()) < 0.999


def test_times_of_a_table_stay_within_it() -> None:
    config = ProcessConfig(name="vp", t_mean=1.0)
    logit = scipy.special.logit(drawn(config).numpy() / 0.999)
    assert scipy.stats.kstest(logit, scipy.stats.norm(1.0, 1.0).cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", LIKELIHOOD)
def test_likelihood_times_are_distributed_as_the_bounds_integrand(name: str) -> None:
    low, high = ends(name)
    log_snr = process.build(LIKELIHOOD[name]).path.log_snr(drawn(LIKELIHOOD[name])).numpy()
    assert low - 1e-9 <= log_snr.min() < log_snr.max() <= high + 1e-9
    below, whole = BELOW[name](np.array([low])), BELOW[name](np.array([high])) - BELOW[name](np.array([low]))
    assert scipy.stats.kstest(log_snr, lambda x: (BELOW[name](x) - below) / whole).pvalue > 1e-3
    # A tenth more nats on one side would have been seen.
    assert scipy.stats.kstest(log_snr, lambda x: ((BELOW[name](x) - below) / whole) ** 1.1).pvalue < 1e-6


@pytest.mark.parametrize("name", LIKELIHOOD)
def test_the_table_of_likelihood_times_is_exact(name: str) -> None:
    # Quantiles at evenly spread probabilities: no draw, so that the tolerance is the table's own.
    low, high = ends(name)
    probabilities = (np.arange(200) + 0.5) / 200
    log_snr = process.build(LIKELIHOOD[name]).path.log_snr(torch.tensor(times.validation_times(LIKELIHOOD[name], 200))).double().numpy()
    below, whole = BELOW[name](np.array([low])), BELOW[name](np.array([high])) - BELOW[name](np.array([low]))
    # Times in float32, whose log SNRs have errors of up to 1e-4 at the clean end.
    np.testing.assert_allclose(1 - (BELOW[name](log_snr) - below) / whole, probabilities, atol=3e-5)
    assert times.nats_per_loss(LIKELIHOOD[name]) == pytest.approx(float(whole[0]), rel=1e-6)


def test_likelihood_times_of_flows_have_the_density_one_over_t_minus_one() -> None:
    # 0.5 (1 - t)**2 nats a unit of log SNR, and d log SNR / dt = -2 / (t (1 - t)).
    first, last = (1 / (1 + math.exp(x / 2)) for x in (10, -10))
    whole = scipy.integrate.quad(lambda t: 1 / t - 1, first, last)[0]
    assert times.nats_per_loss(LIKELIHOOD["flow"]) == pytest.approx(whole, rel=1e-6)
    below = lambda t: (np.log(t / first) - (t - first)) / whole  # noqa: E731
    assert scipy.stats.kstest(drawn(LIKELIHOOD["flow"]).numpy(), below).pvalue > 1e-3


@pytest.mark.parametrize("name", LIKELIHOOD)
def test_a_mean_loss_is_the_bounds_term_in_nats_per_loss(name: str) -> None:
    config, path = LIKELIHOOD[name], process.build(LIKELIHOOD[name]).path
    nats = {"flow": lambda x: 0.5 * scipy.special.expit(x / 2) ** 2, "v": lambda x: 0.5 * scipy.special.expit(x), "epsilon": lambda x: 0.5}
    expected = scipy.integrate.quad(lambda x: nats[name](x) * error(x), *ends(name), limit=200)[0]
    log_snr = path.log_snr(torch.tensor(times.validation_times(config, 20_000), dtype=torch.float64))
    mean = float(np.mean([error(float(x)) for x in log_snr]))
    assert times.nats_per_loss(config) * mean == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("config", WEIGHTED)
def test_importance_weights_make_other_times_those_of_the_bound(config: ProcessConfig) -> None:
    path = process.build(config).path
    assert integral(config, lambda t: times.weight(config, t)) == pytest.approx(1, rel=1e-3)
    same = ProcessConfig(name=config.name, prediction=config.prediction, times="likelihood", log_snr=config.log_snr)
    exact = path.log_snr(torch.tensor(times.validation_times(same, 20_000), dtype=torch.float64))
    expected = float(np.mean([error(float(x)) for x in exact]))

    def weighted(t: Tensor) -> Tensor:
        # Log SNRs at the path's ends are infinite; there, the weight is 0.
        log_snr = path.log_snr(t).clamp(-50, 50)
        return times.weight(config, t) * (1 + 0.8 * torch.sin(0.7 * log_snr) + 0.05 * log_snr**2)

    assert integral(config, weighted) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("config", WEIGHTED)
def test_importance_weights_are_finite_at_the_ends(config: ProcessConfig) -> None:
    first, last = process.build(config).path.times
    inside = torch.tensor([first, first + 1e-7, last - 1e-7, last])
    assert torch.isfinite(times.weight(config, inside)).all()


@pytest.mark.parametrize(
    "config",
    [
        ProcessConfig(weight="min_snr"),
        ProcessConfig(name="vp", weight="min_snr", min_snr_gamma=2.0),
        ProcessConfig(name="vp", prediction="epsilon", weight="min_snr"),
    ],
)
def test_min_snr_counts_an_error_of_the_latents_by_its_snr_up_to_gamma(config: ProcessConfig) -> None:
    made = process.build(config)
    t = torch.tensor([0.01, 0.1, 0.2, 0.35, 0.6, 0.9, 0.99], dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    latents, noise, output = (torch.randn(len(t), 3, 4, 4, generator=rng, dtype=torch.float64) for _ in range(3))
    wrong = (made.denoised(made.noisy(latents, noise, t), output, t) - latents).square().flatten(1).mean(1)
    alpha, sigma = made.path.scales(t)
    snr = (alpha / sigma) ** 2
    assert bool((snr > config.min_snr_gamma).any()) and bool((snr < config.min_snr_gamma).any())
    expected = snr.clamp(max=config.min_snr_gamma) * wrong
    torch.testing.assert_close(times.weight(config, t) * made.squared_error(output, latents, noise, t), expected, rtol=1e-9, atol=0)


def test_min_snr_is_finite_where_a_flow_begins_and_ends() -> None:
    assert times.weight(ProcessConfig(weight="min_snr"), torch.tensor([0.0, 1.0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("config", [ProcessConfig(), ProcessConfig(t_mean=0.4, t_std=0.7)])
def test_logit_normal_times_of_flows_are_the_plain_formula_to_the_bit(config: ProcessConfig) -> None:
    normal = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(times.training_time(config, normal), torch.sigmoid(config.t_mean + config.t_std * normal))
    assert torch.equal(times.weight(config, normal.sigmoid()), torch.ones(1000))


@pytest.mark.parametrize("config", [ProcessConfig(times="uniform"), *LIKELIHOOD.values()])
def test_times_grow_with_their_draw_and_keep_its_precision(config: ProcessConfig) -> None:
    t = times.training_time(config, torch.linspace(-5, 5, 101))
    assert t.dtype == torch.float32
    assert bool((t.diff() > 0).all())
    first, last = process.build(config).path.times
    assert first <= float(t[0]) < float(t[-1]) <= last


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"times": "likelihood", "weight": "likelihood"}, "weight: got 'likelihood'; process.times=likelihood draws by the bound already"),
        ({"log_snr": (-1.0, 1.0)}, "log_snr: got (-1.0, 1.0); it would have no effect"),
        ({"times": "likelihood", "log_snr": (1.0, -1.0)}, "the lower one first"),
        ({"times": "likelihood", "log_snr": (-math.inf, 5.0)}, "give two finite log SNRs"),
        ({"weight": "min_snr", "min_snr_gamma": 0.0}, "min_snr_gamma"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ProcessConfig(**given)  # type: ignore[arg-type]
    assert said in str(refused.value)


def test_ends_beyond_a_table_are_refused_with_the_tables_own() -> None:
    config = ProcessConfig(name="vp", times="likelihood", log_snr=(12.0, 15.0))
    with pytest.raises(ConfigError, match=r"process\.log_snr: got \(12\.0, 15\.0\); vp of the linear table, v goes from -10\.1 to 9\.21"):
        times.training_time(config, torch.zeros(1))


def test_the_introduction_says_what_a_loss_of_one_is() -> None:
    said = times.described(LIKELIHOOD["flow"])
    assert f"a loss of 1 is {times.nats_per_loss(LIKELIHOOD['flow']):.4g} nats a latent value" in said
    assert "from log SNR -10 to 10" in said
    assert "nats" not in times.described(ProcessConfig(weight="min_snr"))
    other = times.described(ProcessConfig(times="likelihood", weight="min_snr"))
    assert "nats" not in other and "from log SNR -10 to 10, min-SNR weight of gamma 5" in other
