"""How near reconstructions are to their images, image by image.

`psnr` and `ssim` look at what a viewer would see: images in [-1, 1], clamped and rounded to 8 bits.
"""

import numpy as np
import pytorch_msssim
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def psnr(images: Tensor, reconstruction: Tensor) -> Tensor:
    """10 log10(255**2 / mean squared error of the 8-bit pixels) in dB, (B,); infinite where the pixels are identical."""
    _check_same_shape(images, reconstruction)
    squared = (_eight_bit(images) - _eight_bit(reconstruction)).square().flatten(1).mean(1)
    return 10 * (255**2 / squared).log10()


def ssim(images: Tensor, reconstruction: Tensor) -> Tensor:
    """SSIM of the 8-bit pixels, mean over channels, (B,): an 11 x 11 Gaussian window, sigma 1.5 (Wang et al. 2004).

    Images with a side below 11 take the largest odd window that fits them, sigma in proportion.
    """
    _check_same_shape(images, reconstruction)
    side = min(images.shape[-2:])
    window = min(11, side - 1 + side % 2)
    return structural_similarity(_eight_bit(images), _eight_bit(reconstruction), window=window, data_range=255.0)


def structural_similarity(images: Tensor, reconstruction: Tensor, *, window: int, data_range: float) -> Tensor:
    """Mean SSIM of (B, C, H, W) over channels and over the places where the whole window lies inside the image, (B,).

    SSIM = (2 mx my + c1)(2 sxy + c2) / ((mx**2 + my**2 + c1)(sx**2 + sy**2 + c2)) under a Gaussian window of `window` pixels a side and
    sigma = 1.5 * window / 11, with c1 = (0.01 data_range)**2 and c2 = (0.03 data_range)**2 (Wang et al. 2004, eq. 13). In at least
    float32, outside autocast; differentiable everywhere.

    Raises:
        ValueError: shapes that differ or are not (B, C, H, W), or a window that is even or larger than the images.
    """
    _check_same_shape(images, reconstruction)
    if images.ndim != 4 or window % 2 == 0 or not 1 <= window <= min(images.shape[-2:]):
        raise ValueError(f"images are {tuple(images.shape)}, the window {window} pixels; give (B, C, H, W) and an odd window that fits")
    with torch.autocast(images.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(images.dtype, reconstruction.dtype), torch.float32)
        similarity: Tensor = pytorch_msssim.ssim(
            images.to(dtype),
            reconstruction.to(dtype),
            data_range=data_range,
            size_average=False,
            win_size=window,
            win_sigma=1.5 * window / 11,
        )
        return similarity


RESAMPLES = 2000
"""Draws of a bootstrap interval."""


def bootstrap_interval(values: ArrayLike, groups: ArrayLike | None = None, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Bounds of the mean of `values` (N,): their percentile bootstrap interval (Efron 1979), from 2,000 resamples.

    `groups` (N,) names what was sampled independently, such as the photo that a crop is from: whole groups are drawn, and the mean of a
    draw is over the values in it. Infinite values are allowed. Where a value is NaN or there are fewer than two groups the bounds are NaN.

    Raises:
        ValueError: no values, groups of another length, or a level outside (0, 1).
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0:
        raise ValueError(f"values have shape {data.shape}; give (N,) numbers, N at least 1")
    labels = np.arange(data.size) if groups is None else np.asarray(groups)
    if labels.shape != data.shape:
        raise ValueError(f"groups have shape {labels.shape}, values {data.shape}; give one group a value")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; give a number between 0 and 1")
    names, member = np.unique(labels, return_inverse=True)
    if len(names) < 2 or np.isnan(data).any():
        return float("nan"), float("nan")
    totals, sizes = np.zeros(len(names)), np.bincount(member)
    np.add.at(totals, member, data)
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = rng.integers(len(names), size=len(names))
        means[i] = totals[drawn].sum() / sizes[drawn].sum()
    # A quantile that is one of the means: interpolation between infinities is not a number.
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


def _eight_bit(images: Tensor) -> Tensor:
    """Images in [-1, 1] as floating-point pixels 0 ... 255, at least float32."""
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    return ((images.clamp(-1, 1) + 1) * 127.5).round()


def _check_same_shape(images: Tensor, reconstruction: Tensor) -> None:
    if images.shape != reconstruction.shape:
        raise ValueError(f"images {tuple(images.shape)} and reconstruction {tuple(reconstruction.shape)} differ in shape")
