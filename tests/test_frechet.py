"""The Fréchet distance against its definition with a matrix square root, and against Gaussians that are known."""

import numpy as np
import pytest
import scipy.linalg
import torch

from diffusion.frechet import MOST_FEATURES, block, features, frechet_distance


def by_definition(first: np.ndarray, second: np.ndarray) -> float:
    """|m1 - m2|**2 + Tr(C1 + C2 - 2 (C1 C2)**0.5), as it is written."""
    m1, m2, c1, c2 = first.mean(0), second.mean(0), np.cov(first.T), np.cov(second.T)
    # C1**0.5 C2 C1**0.5 has the eigenvalues of C1 C2 and is symmetric. Its rank is below either number of vectors; roots of the
    # rounding errors that eigensolvers give for the other eigenvalues would not be small.
    root = np.real(scipy.linalg.sqrtm(c1))
    eigenvalues = scipy.linalg.eigvalsh(root @ c2 @ root)[::-1][: min(len(first), len(second)) - 1]
    overlap = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    return float(np.square(m1 - m2).sum() + np.trace(c1) + np.trace(c2) - 2 * overlap)


def two_sets(numbers: tuple[int, int], width: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((numbers[0], width)) @ rng.standard_normal((width, width)) + rng.standard_normal(width)
    second = rng.standard_normal((numbers[1], width)) @ rng.standard_normal((width, width))
    return first, second


@pytest.mark.parametrize(("numbers", "width"), [((200, 300), 16), ((500, 40), 64), ((30, 20), 64), ((2, 3), 8)])
def test_it_equals_its_definition(numbers: tuple[int, int], width: int) -> None:
    first, second = two_sets(numbers, width)
    assert frechet_distance(first, second) == pytest.approx(by_definition(first, second), rel=1e-8)


def test_scipys_square_root_of_the_product_itself_gives_the_same_where_it_is_regular() -> None:
    first, second = two_sets((300, 400), 12)
    c1, c2 = np.cov(first.T), np.cov(second.T)
    root = np.trace(scipy.linalg.sqrtm(c1 @ c2)).real
    expected = np.square(first.mean(0) - second.mean(0)).sum() + np.trace(c1) + np.trace(c2) - 2 * root
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("numbers", [(200, 200), (20, 20)])
def test_a_set_is_at_no_distance_from_itself_and_distances_are_symmetric(numbers: tuple[int, int]) -> None:
    first, second = two_sets(numbers, 32)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-12)


def test_a_shift_adds_its_square_and_a_scale_the_square_of_what_it_adds() -> None:
    first, _ = two_sets((100, 100), 6)
    shift = np.arange(6.0)
    assert frechet_distance(first, first + shift) == pytest.approx(np.square(shift).sum(), rel=1e-9)
    # (1 + k**2 - 2 k) Tr C for a set scaled by k about its mean.
    scaled = first.mean(0) + 3 * (first - first.mean(0))
    assert frechet_distance(first, scaled) == pytest.approx(4 * first.var(0, ddof=1).sum(), rel=1e-9)


def test_draws_of_known_gaussians_are_at_their_distance() -> None:
    rng = np.random.default_rng(1)
    means, stds = np.array([[0.0, 1.0, -2.0], [0.5, 1.0, 0.0]]), np.array([[1.0, 2.0, 0.5], [1.5, 1.0, 0.5]])
    first, second = (m + s * rng.standard_normal((100_000, 3)) for m, s in zip(means, stds, strict=True))
    expected = np.square(means[0] - means[1]).sum() + np.square(stds[0] - stds[1]).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((4, 8, 8), 1), ((4, 16, 16), 2), ((4, 32, 32), 4), ((16, 16, 16), 4), ((3, 9, 9), 1), ((3, 10, 10), 2), ((300, 4, 4), 4)],
)
def test_blocks_are_the_smallest_power_of_two_that_leaves_few_enough_features(shape: tuple[int, ...], expected: int) -> None:
    k = block(shape)
    assert k == expected
    kept = features(torch.zeros(2, *shape)).shape[1]
    assert kept == shape[0] * (shape[1] // k) * (shape[2] // k)
    assert kept <= MOST_FEATURES or k == min(shape[1:])


def test_features_are_the_values_themselves_or_the_means_of_blocks() -> None:
    small = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(features(small), small.numpy().reshape(3, -1).astype(np.float64))
    large = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    means = large.numpy().reshape(3, 4, 8, 2, 8, 2).mean(axis=(3, 5), dtype=np.float64)
    assert features(large).dtype == np.float64
    np.testing.assert_allclose(features(large), means.reshape(3, -1), atol=1e-6)
