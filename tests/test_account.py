"""Accounts set against each other: only where their nats are nats of the same thing."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autoencoder.account import Measure, check_comparable, compare, paired_difference
from autoencoder.elbo import ElboTerms, evaluate_elbo
from autoencoder.likelihood import DiscretizedGaussian, DiscretizedLogistic, Gaussian, Laplace, Likelihood, PixelScale
from autoencoder.posterior import DiagonalGaussian
from autoencoder.prior import StandardNormal

IMAGES = torch.randint(0, 256, (5, 3, 2, 2), generator=torch.Generator().manual_seed(0)).double() / 127.5 - 1
FITTED = torch.tensor(0.3)


def account(likelihood: Likelihood, *, images: Tensor = IMAGES, mean: float = 0.5) -> ElboTerms:
    channels = images.shape[1] * (2 if isinstance(likelihood, PixelScale) else 1)
    decoded = torch.zeros(len(images), channels, *images.shape[2:], dtype=images.dtype)
    return evaluate_elbo(
        images,
        encode=lambda x: DiagonalGaussian(torch.full((len(x), 2), mean, dtype=x.dtype), torch.zeros(len(x), 2, dtype=x.dtype)),
        decode=lambda z: decoded,
        likelihood=likelihood,
        prior=StandardNormal(),
        generator=torch.Generator().manual_seed(0),
    )


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (Laplace(FITTED), Gaussian(FITTED), "likelihood: laplace against gaussian"),
        (DiscretizedGaussian(FITTED), DiscretizedLogistic(FITTED), "likelihood: discretized_gaussian against discretized_logistic"),
        (DiscretizedGaussian(FITTED), Gaussian(FITTED), r"support: levels against reals \(.*; levels: 256 against none"),
        (DiscretizedLogistic(FITTED), DiscretizedLogistic(FITTED, 65536), "levels: 256 against 65536"),
        (Gaussian(0.1), Gaussian(0.2), "scale: 0.1 against 0.2"),
        (Gaussian(0.1), Gaussian(FITTED), "scale: 0.1 against fitted"),
        (Gaussian(0.1), PixelScale("gaussian"), "scale: 0.1 against fitted"),
    ],
)
def test_accounts_of_different_things_are_not_compared(first: Likelihood, second: Likelihood, said: str) -> None:
    for a, b in ((first, second), (second, first)):
        with pytest.raises(ValueError, match="cannot be compared") as refusal:
            compare(account(a), account(b))
        # Why, in brackets behind both values.
        assert " (" in str(refusal.value)
    with pytest.raises(ValueError, match=said):
        compare(account(first), account(second))


def test_other_sizes_and_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dims: 12 against 6"):
        compare(account(Laplace(0.1)), account(Laplace(0.1), images=IMAGES[..., :1]))
    with pytest.raises(ValueError, match=r"\(5,\) and \(3,\)"):
        compare(account(Laplace(0.1)), account(Laplace(0.1), images=IMAGES[:3]))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda: Laplace(0.1), lambda: Laplace(0.1)),
        (lambda: Laplace(FITTED), lambda: Laplace(2 * FITTED)),
        (lambda: DiscretizedLogistic(FITTED), lambda: PixelScale("discretized_logistic")),
    ],
)
def test_a_comparison_is_of_the_same_images_pair_by_pair(first: Callable[[], Likelihood], second: Callable[[], Likelihood]) -> None:
    a, b = account(first(), mean=0.5), account(second(), mean=1.5)
    found = compare(a, b)
    for name in ("elbo", "nll", "kl"):
        difference = getattr(a, name) - getattr(b, name)
        assert getattr(found, name).mean == pytest.approx(difference.mean().item(), rel=1e-12)
        assert getattr(found, name).standard_error == pytest.approx(difference.std(correction=1).item() / math.sqrt(5), rel=1e-9, abs=1e-12)
    # KL to N(0, 1) of two latents with means 0.5 and 1.5: (0.25 - 2.25) / 2 each.
    assert found.kl.mean == pytest.approx(-2.0)
    assert found.kl.standard_error == pytest.approx(0, abs=1e-12)
    assert found.elbo.mean == pytest.approx(-found.nll.mean - found.kl.mean)


def test_the_standard_error_is_the_spread_of_repeated_experiments() -> None:
    generator = torch.Generator().manual_seed(0)
    # A strong common part, as images have: only the pairing takes it out.
    common = 100 * torch.randn(400, 50, generator=generator)
    a, b = common + torch.randn(400, 50, generator=generator), common + 0.3 + torch.randn(400, 50, generator=generator)
    found = [paired_difference(x, y) for x, y in zip(a, b, strict=True)]
    means = torch.tensor([f.mean for f in found])
    assert means.mean().item() == pytest.approx(-0.3, abs=5 * 0.2 / 20)
    claimed = sum(f.standard_error for f in found) / len(found)
    assert claimed == pytest.approx(means.std().item(), rel=0.15)
    assert claimed == pytest.approx(math.sqrt(2 / 50), rel=0.05)
    assert math.isnan(paired_difference(a[0, :1], b[0, :1]).standard_error)


def test_a_measure_survives_json_and_a_foreign_one_is_refused() -> None:
    for likelihood in (Laplace(0.25), Gaussian(FITTED), DiscretizedLogistic(FITTED, 65536), PixelScale("discretized_gaussian")):
        measure = account(likelihood, images=torch.ones(2, 3)).measure
        assert measure.dims == 3
        assert Measure.from_json(json.loads(json.dumps(measure.to_json()))) == measure
        check_comparable(measure, measure)
    with pytest.raises(ValueError, match=r"has the keys dims, levels.*got dims, nats"):
        Measure.from_json({"dims": 3, "nats": 1})
    with pytest.raises(ValueError, match="got none"):
        Measure.from_json({})
