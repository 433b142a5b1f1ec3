"""How near reconstructions are to their images, image by image.

Images span [-1, 1]. Of 8-bit ones `psnr` and `ssim` look at what a viewer would see, clamped and rounded to 8 bits; of others at the values
themselves, clamped, where -1 to 1 is the range that the pixel recipe states for each band: the peak is high - low.
"""

import numpy as np
import pytorch_msssim
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional

from autoencoder.missing import observed_mean


def psnr(images: Tensor, reconstruction: Tensor, *, eight_bit: bool = True, valid: Tensor | None = None) -> Tensor:
    """10 log10(peak**2 / mean squared error) in dB, (B,); infinite where the values are identical.

    The peak is 255 with 8-bit pixels, else 2, the span of images: over a range low .. high of source values, high - low (bands with ranges
    of their own count alike). `valid` (B, 1, H, W) leaves missing pixels out.
    """
    _check_same_shape(images, reconstruction)
    shown, peak = (_eight_bit, 255) if eight_bit else (_clamped, 2)
    squared = observed_mean((shown(images) - shown(reconstruction)).square(), valid)
    return 10 * (peak**2 / squared).log10()


def ssim(images: Tensor, reconstruction: Tensor, *, eight_bit: bool = True, valid: Tensor | None = None) -> Tensor:
    """SSIM, mean over channels, (B,): an 11 x 11 Gaussian window, sigma 1.5 (Wang et al. 2004); the same values and peak as `psnr`.

    Images with a side below 11 take the largest odd window that fits them, sigma in proportion. `valid`: see `structural_similarity`.
    """
    _check_same_shape(images, reconstruction)
    side = min(images.shape[-2:])
    window = min(11, side - 1 + side % 2)
    shown, peak = (_eight_bit, 255.0) if eight_bit else (_clamped, 2.0)
    return structural_similarity(shown(images), shown(reconstruction), window=window, data_range=peak, valid=valid)


def structural_similarity(images: Tensor, reconstruction: Tensor, *, window: int, data_range: float, valid: Tensor | None = None) -> Tensor:
    """Mean SSIM of (B, C, H, W) over channels and over the places where the whole window lies inside the image, (B,).

    SSIM = (2 mx my + c1)(2 sxy + c2) / ((mx**2 + my**2 + c1)(sx**2 + sy**2 + c2)) under a Gaussian window of `window` pixels a side and
    sigma = 1.5 * window / 11, with c1 = (0.01 data_range)**2 and c2 = (0.03 data_range)**2 (Wang et al. 2004, eq. 13). In at least
    float32, outside autocast; differentiable everywhere.

    With missing pixels, those where `valid` (B, 1, H, W) does not hold, means and variances of a window are over its other pixels, and
    each place counts by their share of the window's weight (normalised convolution, Knutsson & Westin 1993).

    Raises:
        ValueError: shapes that differ or are not (B, C, H, W), or a window that is even or larger than the images.
    """
    _check_same_shape(images, reconstruction)
    if images.ndim != 4 or window % 2 == 0 or not 1 <= window <= min(images.shape[-2:]):
        raise ValueError(f"images are {tuple(images.shape)}, the window {window} pixels; give (B, C, H, W) and an odd window that fits")
    with torch.autocast(images.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(images.dtype, reconstruction.dtype), torch.float32)
        if valid is not None:
            return _similarity_of_observed(images.to(dtype), reconstruction.to(dtype), valid.to(dtype), window, data_range)
        similarity: Tensor = pytorch_msssim.ssim(
            images.to(dtype),
            reconstruction.to(dtype),
            data_range=data_range,
            size_average=False,
            win_size=window,
            win_sigma=1.5 * window / 11,
        )
        return similarity


def _similarity_of_observed(x: Tensor, y: Tensor, valid: Tensor, window: int, data_range: float) -> Tensor:
    offsets = torch.arange(window, dtype=x.dtype, device=x.device) - window // 2
    gaussian = torch.exp(-(offsets**2) / (2 * (1.5 * window / 11) ** 2))
    gaussian = gaussian / gaussian.sum()

    def blurred(values: Tensor) -> Tensor:
        planes = functional.conv2d(values.flatten(0, 1)[:, None], gaussian.view(1, 1, -1, 1))
        return functional.conv2d(planes, gaussian.view(1, 1, 1, -1)).unflatten(0, values.shape[:2])[:, :, 0]

    share = blurred(valid)  # (B, 1, places)
    known = share.clamp(min=torch.finfo(x.dtype).eps)

    def mean(values: Tensor) -> Tensor:
        return blurred(valid * values) / known

    mx, my, c1, c2 = mean(x), mean(y), (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    similarity = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    weighted: Tensor = (share * similarity).flatten(2).sum(2) / share.flatten(2).sum(2).clamp(min=torch.finfo(x.dtype).eps)
    return weighted.mean(1)


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
    return ((_clamped(images) + 1) * 127.5).round()


def _clamped(images: Tensor) -> Tensor:
    """Images within [-1, 1], at least float32."""
    return images.to(torch.promote_types(images.dtype, torch.float32)).clamp(-1, 1)


def _check_same_shape(images: Tensor, reconstruction: Tensor) -> None:
    if images.shape != reconstruction.shape:
        raise ValueError(f"images {tuple(images.shape)} and reconstruction {tuple(reconstruction.shape)} differ in shape")
