"""p(x|z): what makes a reconstruction error nats.

Images and reconstructions are (B, ...) in [-1, 1]; e = images - reconstruction. Log-likelihoods are in nats, summed over all but the
batch axis, (B,). Half-precision inputs are raised to float32, float64 stays float64; the scale takes the images' precision.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class Likelihood(ABC):
    """A distribution of each value around the decoder's output, independent between values.

    Args:
        scale: width of the distribution where images span [-1, 1], above 0; a number, or a tensor that broadcasts to the images.
            Gradients reach a tensor; only a number's sign is checked.
    """

    name: ClassVar[str]
    discrete: ClassVar[bool] = False
    levels: int | None = None
    """Levels of a value where the distribution is over levels."""

    def __init__(self, scale: float | Tensor) -> None:
        if not isinstance(scale, Tensor) and not (0 < scale < math.inf):
            raise ValueError(f"scale is {scale}; give a finite number above 0")
        self.scale = scale

    def log_prob(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """log p(images | reconstruction) in nats, (B,).

        Raises:
            ValueError: shapes that differ, no batch axis, or pixels (integers) for images.
        """
        if images.shape != reconstruction.shape:
            raise ValueError(f"images {tuple(images.shape)} and reconstruction {tuple(reconstruction.shape)} differ in shape")
        if images.ndim < 2:
            raise ValueError(f"images have shape {tuple(images.shape)}; give a batch axis and at least one more")
        if not (images.is_floating_point() and reconstruction.is_floating_point()):
            raise ValueError(f"images are {images.dtype}, reconstruction {reconstruction.dtype}; give floating-point images in [-1, 1]")
        dtype = torch.promote_types(torch.promote_types(images.dtype, reconstruction.dtype), torch.float32)
        images, reconstruction = images.to(dtype), reconstruction.to(dtype)
        scale = self.scale
        # A fill is queued on the device, where a copy of a host scalar would wait for it.
        scale = scale.to(images) if isinstance(scale, Tensor) else torch.full((), scale, dtype=dtype, device=images.device)
        return self._log_prob(images, images - reconstruction, scale).flatten(1).sum(1)

    @abstractmethod
    def _log_prob(self, images: Tensor, error: Tensor, scale: Tensor) -> Tensor:
        """log p of each value in nats, the shape of `images`."""

    @staticmethod
    @abstractmethod
    def moment(error: Tensor) -> Tensor:
        """The moment of the error (B, ...) that fixes the scale, a mean over each image, (B,)."""

    @staticmethod
    @abstractmethod
    def scale_from_moment(moment: Tensor) -> Tensor:
        """The scale that fits errors with this (mean) moment."""


class Gaussian(Likelihood):
    """N(reconstruction, sigma**2): log p = -e**2 / (2 sigma**2) - ln(sigma sqrt(2 pi)). Best fit: sigma**2 = mean e**2."""

    name = "gaussian"

    def _log_prob(self, images: Tensor, error: Tensor, scale: Tensor) -> Tensor:
        return -0.5 * (error / scale).square() - (scale.log() + 0.5 * math.log(2 * math.pi))

    @staticmethod
    def moment(error: Tensor) -> Tensor:
        """Mean squared error, (B,)."""
        return error.square().flatten(1).mean(1)

    @staticmethod
    def scale_from_moment(moment: Tensor) -> Tensor:
        """sigma = sqrt(mean e**2), the maximum-likelihood value."""
        return moment.sqrt()


class Laplace(Likelihood):
    """Laplace(reconstruction, b): log p = -|e| / b - ln 2b. Best fit: b = mean |e|."""

    name = "laplace"

    def _log_prob(self, images: Tensor, error: Tensor, scale: Tensor) -> Tensor:
        return -error.abs() / scale - (2 * scale).log()

    @staticmethod
    def moment(error: Tensor) -> Tensor:
        """Mean absolute error, (B,)."""
        return error.abs().flatten(1).mean(1)

    @staticmethod
    def scale_from_moment(moment: Tensor) -> Tensor:
        """b = mean |e|, the maximum-likelihood value."""
        return moment


class _Discretized(Likelihood):
    """A continuous distribution F integrated over the bins of `levels` equally spaced values, k = 0 ... L - 1 at x = 2k / (L - 1) - 1.

    P(k) = F((x + d - mu) / s) - F((x - d - mu) / s) with d = 1 / (L - 1); the first bin reaches to -infinity, the last to infinity
    (Salimans et al. 2017, sec. 2.1), so that the L probabilities sum to 1. Images must lie on the grid: a bin is taken around each
    value as it is, and one nearer than d to -1 or 1 is the first or last. log P is at most 0.
    """

    discrete = True

    def __init__(self, scale: float | Tensor, levels: int = 256) -> None:
        super().__init__(scale)
        if levels < 2:
            raise ValueError(f"levels is {levels}; give at least 2")
        self.levels: int = levels

    def _log_prob(self, images: Tensor, error: Tensor, scale: Tensor) -> Tensor:
        half = 1 / (self.levels - 1)
        return self._log_bin(error / scale, half / scale, images < -1 + half, images > 1 - half)

    @staticmethod
    @abstractmethod
    def _log_bin(center: Tensor, half: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """ln[F(center + half) - F(center - half)] of the standard distribution; the first bin has no lower bound, the last no upper."""


class DiscretizedGaussian(_Discretized):
    """A Gaussian of standard deviation `scale` over the bins of `levels` values."""

    name = "discretized_gaussian"
    moment = staticmethod(Gaussian.moment)
    scale_from_moment = staticmethod(Gaussian.scale_from_moment)

    @staticmethod
    def _log_bin(center: Tensor, half: Tensor, first: Tensor, last: Tensor) -> Tensor:
        # Both bounds are mirrored into the left tail, where ln Phi keeps its relative precision.
        tail = torch.where(first, center, torch.where(last, -center, -center.abs()))
        log_upper = _log_ndtr(tail + half)
        # In a bin over which the density hardly changes, the difference of two nearly equal ln Phi has no digits left.
        inside, flat = ~(first | last), (center.abs() * half < 0.5) & (half < 0.5)
        # ln Phi falls by at least the integral of its slope's bound -x, here also where rounding swallows `half`.
        drop = torch.maximum(log_upper - _log_ndtr(tail - half), 2 * center.abs() * half)
        steep = log_upper + (inside & ~flat) * _log1mexp(torch.where(inside & ~flat, drop, 1.0))
        return torch.where(inside & flat, _log_narrow_gaussian_bin(center, half), steep)


class DiscretizedLogistic(_Discretized):
    """A logistic distribution of scale `scale` over the bins of `levels` values."""

    name = "discretized_logistic"

    @staticmethod
    def _log_bin(center: Tensor, half: Tensor, first: Tensor, last: Tensor) -> Tensor:
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)): nothing to cancel. An infinite bound leaves one factor.
        above = torch.where(last, 0.0, logsigmoid(center + half))
        below = torch.where(first, 0.0, logsigmoid(half - center))
        return above + below + torch.where(first | last, 0.0, _log1mexp(2 * half))

    @staticmethod
    def moment(error: Tensor) -> Tensor:
        """Mean absolute error, (B,)."""
        return error.abs().flatten(1).mean(1)

    @staticmethod
    def scale_from_moment(moment: Tensor) -> Tensor:
        """s = mean |e| / (2 ln 2), as a logistic has mean |e| = 2 ln(2) s: an estimate from the moment, not the likelihood's maximum."""
        return moment / (2 * math.log(2))


LIKELIHOODS: dict[str, type[Likelihood]] = {kind.name: kind for kind in (Gaussian, Laplace, DiscretizedGaussian, DiscretizedLogistic)}
"""The likelihoods by the name that a configuration gives them."""


def build_likelihood(name: str, scale: float | Tensor, levels: int) -> Likelihood:
    """The likelihood of this name; `levels` matters to the discretised ones.

    Raises:
        ValueError: no such name.
    """
    if name not in LIKELIHOODS:
        raise ValueError(f"likelihood is {name!r}; give one of {', '.join(LIKELIHOODS)}")
    kind = LIKELIHOODS[name]
    return kind(scale, levels) if issubclass(kind, _Discretized) else kind(scale)


class _LogNdtr(torch.autograd.Function):
    """ln Phi whose slope phi / Phi is taken by erfcx: torch's own slope has no right digits left in the far left tail."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.special.log_ndtr(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * math.sqrt(2 / math.pi) / torch.special.erfcx(-x * math.sqrt(0.5))


def _log_ndtr(x: Tensor) -> Tensor:
    """ln Phi(x)."""
    value: Tensor = _LogNdtr.apply(x)
    return value


def _log1mexp(x: Tensor) -> Tensor:
    """ln(1 - exp(-x)) for x > 0."""
    return (-torch.expm1(-x)).log()


GAUSS_LEGENDRE = (
    (0.2386191860831969, 0.46791393457269104),
    (0.6612093864662645, 0.3607615730481386),
    (0.932469514203152, 0.1713244923791704),
)
"""Positive nodes and weights of the six-point rule on [-1, 1] (Abramowitz & Stegun 1964, table 25.4)."""


def _log_narrow_gaussian_bin(center: Tensor, half: Tensor) -> Tensor:
    """ln of the standard normal's mass in center +- half, for half < 0.5 and |center| * half < 0.5 (values beyond are taken there).

    mass = 2 half phi(center) * mean over t in [-1, 1] of exp(-(half t)**2 / 2) cosh(center half t), by six-point Gauss-Legendre quadrature:
    exact to double precision on so smooth an integrand.
    """
    slope = (center * half).clamp(-0.5, 0.5)
    mean = torch.zeros_like(slope)
    for node, weight in GAUSS_LEGENDRE:
        mean = mean + weight * (-0.5 * (half * node).square()).exp() * (slope * node).cosh()
    return -0.5 * center.square() - 0.5 * math.log(2 * math.pi) + (2 * half).log() + mean.log()
