"""The Fréchet distance between two sets of latents: a two-sample figure that needs no network of others."""

import numpy as np
from torch import Tensor
from torch.nn import functional

MOST_FEATURES = 256
"""Latents with more values are averaged over blocks until at most so many are left: a covariance needs more samples than that."""


def features(latents: Tensor) -> np.ndarray:
    """Normalised latents (N, c, h, w) as float64 vectors (N, d), averaged over blocks where they have more than `MOST_FEATURES` values."""
    k = block(tuple(latents.shape[1:]))
    pooled = latents if k == 1 else functional.avg_pool2d(latents, k)
    return pooled.flatten(1).double().cpu().numpy()


def block(shape: tuple[int, ...]) -> int:
    """Side of the blocks that latents (c, h, w) are averaged over: the smallest power of two that is enough."""
    channels, height, width = shape
    k = 1
    while channels * (height // k) * (width // k) > MOST_FEATURES and 2 * k <= min(height, width):
        k *= 2
    return k


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """|m1 - m2|**2 + Tr(C1 + C2 - 2 (C1 C2)**0.5) between the Gaussians fitted to vectors (N, d) and (M, d) (Dowson & Landau 1982).

    With C = R^T R from a QR decomposition of the centred vectors, the trace of (C1 C2)**0.5 is the sum of the singular
    values of R1 R2^T: no matrix square root, and no loss of accuracy where N < d.
    """
    means = first.mean(0), second.mean(0)
    roots = [np.linalg.qr(x - m, mode="r") / np.sqrt(len(x) - 1) for x, m in zip((first, second), means, strict=True)]
    traces = sum(float(np.square(root).sum()) for root in roots)
    overlap = float(np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum())
    return float(np.square(means[0] - means[1]).sum()) + traces - 2 * overlap
