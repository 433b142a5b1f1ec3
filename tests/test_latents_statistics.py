"""Moments: what is merged is what one pass would give, and the total variance is that of draws."""

import functools
import itertools
import json

import numpy as np
import pytest

from autoencoder.latents.statistics import Moments


def rows(count: int, seed: int = 0, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Means and log-variances (count, 3, 4, 5) float32, of channels that differ."""
    rng = np.random.default_rng(seed)
    scale = np.array([0.5, 2.0, 10.0]).reshape(3, 1, 1)
    mean = offset + scale * (rng.standard_normal((count, 3, 4, 5)) + 0.3)
    return mean.astype(np.float32), (rng.standard_normal((count, 3, 4, 5)) - 1).astype(np.float32)


@pytest.mark.parametrize("cuts", [[], [1], [5, 6, 50], [0, 0, 37, 99, 100]])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_merged_in_parts_they_are_those_of_one_pass(cuts: list[int], offset: float) -> None:
    mean, logvar = rows(100, offset=offset)
    edges = [0, *cuts, 100]
    parts = [Moments.of(mean[a:b], logvar[a:b]) for a, b in itertools.pairwise(edges)]
    found = functools.reduce(Moments.merge, [Moments.from_json(json.loads(json.dumps(part.to_json()))) for part in parts]).statistics()
    exact = mean.astype(np.float64)
    posterior = np.exp(logvar.astype(np.float64)).mean((0, 2, 3))
    np.testing.assert_allclose(found["mean"], exact.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(found["posterior_variance"], posterior, rtol=1e-12)
    # Where values lie 1000 deviations from zero, a difference of squares would keep some ten digits fewer.
    np.testing.assert_allclose(found["std"], np.sqrt(exact.var((0, 2, 3)) + posterior), rtol=1e-10)
    assert found["values"] == 2000


def test_the_deviation_is_that_of_draws_from_the_posteriors() -> None:
    mean, logvar = rows(20_000)
    draws = mean + np.exp(0.5 * logvar) * np.random.default_rng(1).standard_normal(mean.shape)
    found = Moments.of(mean, logvar).statistics()
    # 400,000 draws a channel: their deviation is known to 0.3% or so, with tails as heavy as these.
    np.testing.assert_allclose(found["std"], draws.std((0, 2, 3)), rtol=0.01)
    normalised = (draws - np.array(found["mean"]).reshape(3, 1, 1)) / np.array(found["std"]).reshape(3, 1, 1)
    np.testing.assert_allclose(normalised.var((0, 2, 3)), 1, rtol=0.02)


def test_means_alone_and_half_precision_are_taken_as_stored() -> None:
    mean = rows(50)[0].astype(np.float16)
    found = Moments.of(mean[:20], None).merge(Moments.of(mean[20:], None)).statistics()
    assert found["posterior_variance"] is None
    np.testing.assert_allclose(found["std"], mean.astype(np.float64).std((0, 2, 3)), rtol=1e-12)


def test_no_rows_change_nothing() -> None:
    mean, logvar = rows(7)
    none, some = Moments.of(mean[:0], logvar[:0]), Moments.of(mean, logvar)
    for merged in (none.merge(some), some.merge(none), none.merge(none).merge(some)):
        assert merged.statistics() == some.statistics()


@pytest.mark.parametrize("stored", ["moments", "means"])
def test_folders_are_merged_by_what_their_manifests_say(stored: str) -> None:
    mean, logvar = rows(100, offset=10.0)
    given = logvar if stored == "moments" else None
    cut = [(mean[:30], given if given is None else given[:30]), (mean[30:], given if given is None else given[30:])]
    told = [json.loads(json.dumps(Moments.of(*part).statistics())) for part in cut]
    merged, whole = functools.reduce(Moments.merge, map(Moments.of_manifest, told)).statistics(), Moments.of(mean, given).statistics()
    for name in ("mean", "std", "values", "posterior_variance"):
        if whole[name] is None:
            assert merged[name] is None
        else:
            np.testing.assert_allclose(merged[name], whole[name], rtol=1e-12)
