"""p(x|z): what makes a reconstruction error nats.

Images and reconstructions are (B, ...) in [-1, 1]; e = images - reconstruction. Log-likelihoods are in nats, summed over all but the
batch axis, (B,). Half-precision inputs are raised to float32, float64 stays float64; the scale takes the images' precision.

Values of an image are independent given its latents, so that the probability of those that were observed is the product over them:
`Likelihood.observed` leaves the missing ones out, and what follows is a bound on log p of the observed values (Mattei & Frellsen 2019).
"""

import copy
import math
import warnings
from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from autoencoder.bins import log1mexp, log_narrow_gaussian_bin, log_ndtr
from autoencoder.objective_config import LEAST_SPAN


class Likelihood(ABC):
    """A distribution of each value around a reconstruction, independent between values, given what the decoder makes of latents."""

    name: str
    """The family's."""
    discrete: bool = False
    """Whether it is over levels, so that its nats are the length of a code; else a density over the reals."""
    levels: int | None = None
    """Levels of a value where it is over levels."""
    valid: Tensor | None = None
    """Which values were observed, bool, broadcast to the images; None: all."""

    def observed(self, valid: Tensor | None) -> Self:
        """The likelihood of images of which only the values where `valid` (B, 1, H, W) holds were observed; None: all were."""
        of_observed = copy.copy(self)
        of_observed.valid = valid
        return of_observed

    @abstractmethod
    def log_prob(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """log p(images | decoded) in nats, (B,); `reconstruction` is all that the decoder made.

        Raises:
            ValueError: shapes that do not fit, no batch axis, or pixels (integers) for images.
        """

    @abstractmethod
    def moment(self, error: Tensor) -> Tensor:
        """The moment of the error (B, ...) that fixes the family's scale, a mean over each image, (B,)."""

    @property
    def fixed_scale(self) -> float | None:
        """The scale where it was chosen; None where it was fitted."""
        return None

    def described(self) -> dict[str, Any]:
        """Name and levels, and what there is to say of the scale, for JSON."""
        return {"name": self.name, "levels": self.levels}

    def reconstruction(self, decoded: Tensor) -> Tensor:
        """The part of what the decoder made that lies where the images do: all of it."""
        return decoded

    def check_decoded(self, images: Tensor, decoded: Tensor) -> None:
        """Raise `ValueError` where the decoder made other shapes than this likelihood takes for these images."""
        if images.ndim < 2:
            raise ValueError(f"images have shape {tuple(images.shape)}; give a batch axis and at least one more")
        if not (images.is_floating_point() and decoded.is_floating_point()):
            raise ValueError(f"images are {images.dtype}, reconstruction {decoded.dtype}; give floating-point images in [-1, 1]")
        if images.shape != decoded.shape:
            doubled = decoded.shape == (len(images), 2 * images.shape[1], *images.shape[2:])
            remedy = "; for a decoder that makes a log scale beside each value take `PixelScale`" if doubled else ""
            raise ValueError(f"images {tuple(images.shape)} and reconstruction {tuple(decoded.shape)} differ in shape{remedy}")

    def check_images(self, images: Tensor) -> None:  # noqa: B027  (the reals hold every image)
        """Raise `ValueError` where images lie outside the support. Looks at every value: for measuring, not for a training step."""


class LocationScale(Likelihood):
    """A family with one parameter beside the reconstruction.

    Args:
        scale: width of the distribution where images span [-1, 1], above 0; a number, or a tensor that broadcasts to the images.
            Gradients reach a tensor; only a number's sign is checked. A number counts as chosen, a tensor as fitted.
    """

    def __init__(self, scale: float | Tensor) -> None:
        if not isinstance(scale, Tensor) and not (0 < scale < math.inf):
            raise ValueError(f"scale is {scale}; give a finite number above 0")
        self.scale = scale

    @property
    def fixed_scale(self) -> float | None:
        """The scale where it is a number."""
        return None if isinstance(self.scale, Tensor) else float(self.scale)

    def described(self) -> dict[str, Any]:
        """Name, levels and scale, for JSON."""
        return super().described() | {"scale": float(self.scale)}

    def log_prob(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """log p(images | reconstruction) in nats, (B,).

        Raises:
            ValueError: shapes that differ, no batch axis, or pixels (integers) for images.
        """
        self.check_decoded(images, reconstruction)
        dtype = torch.promote_types(torch.promote_types(images.dtype, reconstruction.dtype), torch.float32)
        images, reconstruction = images.to(dtype), reconstruction.to(dtype)
        scale = self.scale
        # A fill is queued on the device, where a copy of a host scalar would wait for it.
        scale = scale.to(images) if isinstance(scale, Tensor) else torch.full((), scale, dtype=dtype, device=images.device)
        values = self._log_prob(images, images - reconstruction, scale)
        if self.valid is not None:
            values = torch.where(self.valid, values, 0.0)
        return values.flatten(1).sum(1)

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


class Gaussian(LocationScale):
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


class Laplace(LocationScale):
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


class _Discretized(LocationScale):
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

    def check_images(self, images: Tensor) -> None:
        """Refuse images beyond [-1, 1]; warn of values off the grid of levels, of whose bins the probabilities do not sum to 1."""
        rounding = 4 * torch.finfo(images.dtype).eps
        if self.valid is not None:
            images = images[self.valid.expand_as(images)]
            if not images.numel():
                return
        low, high = images.min().item(), images.max().item()
        if low < -1 - rounding or high > 1 + rounding:
            raise ValueError(
                f"images span [{low:g}, {high:g}], outside the support of {self.name}, [-1, 1]; scale them to [-1, 1] "
                "(8-bit pixels k to k / 127.5 - 1), or take `Gaussian` or `Laplace`"
            )
        position = (images.to(torch.promote_types(images.dtype, torch.float32)) + 1) * ((self.levels - 1) / 2)
        off = ((position - position.round()).abs() > max(1e-3, rounding * self.levels)).sum().item()
        if off:
            warnings.warn(
                f"{off} of {images.numel()} values lie between the {self.levels} levels of {self.name}: a bin is taken around each as "
                "it is, and its nats are no code length. Give images as they come from pixels, or the `levels` that they have",
                stacklevel=3,
            )

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
        log_upper = log_ndtr(tail + half)
        # In a bin over which the density hardly changes, the difference of two nearly equal ln Phi has no digits left.
        inside, flat = ~(first | last), (center.abs() * half < 0.5) & (half < 0.5)
        # ln Phi falls by at least the integral of its slope's bound -x, here also where rounding swallows `half`.
        drop = torch.maximum(log_upper - log_ndtr(tail - half), 2 * center.abs() * half)
        steep = log_upper + (inside & ~flat) * log1mexp(torch.where(inside & ~flat, drop, 1.0))
        return torch.where(inside & flat, log_narrow_gaussian_bin(center, half), steep)


class DiscretizedLogistic(_Discretized):
    """A logistic distribution of scale `scale` over the bins of `levels` values."""

    name = "discretized_logistic"

    @staticmethod
    def _log_bin(center: Tensor, half: Tensor, first: Tensor, last: Tensor) -> Tensor:
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)): nothing to cancel. An infinite bound leaves one factor.
        above = torch.where(last, 0.0, logsigmoid(center + half))
        below = torch.where(first, 0.0, logsigmoid(half - center))
        return above + below + torch.where(first | last, 0.0, log1mexp(2 * half))

    @staticmethod
    def moment(error: Tensor) -> Tensor:
        """Mean absolute error, (B,)."""
        return error.abs().flatten(1).mean(1)

    @staticmethod
    def scale_from_moment(moment: Tensor) -> Tensor:
        """s = mean |e| / (2 ln 2), as a logistic has mean |e| = 2 ln(2) s: an estimate from the moment, not the likelihood's maximum."""
        return moment / (2 * math.log(2))


LIKELIHOODS: dict[str, type[LocationScale]] = {kind.name: kind for kind in (Gaussian, Laplace, DiscretizedGaussian, DiscretizedLogistic)}
"""The likelihoods by the name that a configuration gives them."""


def build_likelihood(name: str, scale: float | Tensor, levels: int) -> LocationScale:
    """The likelihood of this name; `levels` matters to the discretised ones.

    Raises:
        ValueError: no such name.
    """
    if name not in LIKELIHOODS:
        raise ValueError(f"likelihood is {name!r}; give one of {', '.join(LIKELIHOODS)}")
    kind = LIKELIHOODS[name]
    return kind(scale, levels) if issubclass(kind, _Discretized) else kind(scale)


class PixelScale(Likelihood):
    """A family whose scale the decoder gives for each value: it makes (B, 2C, ...) of images (B, C, ...), reconstruction then ln scale.

    Args:
        name: the family.
        levels: levels of a value (discretised families).
        bounds: least and largest scale, where images span [-1, 1].
    """

    def __init__(self, name: str, levels: int = 256, bounds: tuple[float, float] = (1e-4, 100.0)) -> None:
        if not 0 < bounds[0] < bounds[1] < math.inf:
            raise ValueError(f"bounds are {bounds}; give two finite scales above 0, the smaller first")
        if bounds[1] < LEAST_SPAN * bounds[0]:
            raise ValueError(f"bounds are {bounds}; scales near them smoothly: give an upper one {LEAST_SPAN} times the lower, or more")
        family = build_likelihood(name, 1.0, levels)
        self.name, self.bounds, self._levels = name, bounds, levels
        self.discrete, self.levels = family.discrete, family.levels

    def log_prob(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """log p(images | decoded) in nats, (B,); `reconstruction` is all that the decoder made, (B, 2C, ...).

        Raises:
            ValueError: other shapes, no batch axis, or pixels (integers) for images.
        """
        self.check_decoded(images, reconstruction)
        center, scale = self.split(reconstruction)
        return build_likelihood(self.name, scale, self._levels).observed(self.valid).log_prob(images, center)

    def reconstruction(self, decoded: Tensor) -> Tensor:
        """The first half of the channels."""
        return decoded.chunk(2, dim=1)[0]

    def split(self, decoded: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction and scale of each value within the bounds, (B, C, ...); the scale at least float32."""
        center, raw = decoded.chunk(2, dim=1)
        return center, bounded_log_scale(raw.to(torch.promote_types(raw.dtype, torch.float32)), self.bounds).exp()

    def described(self) -> dict[str, Any]:
        """Name and levels, and that the scale is each value's own, for JSON."""
        return super().described() | {"scale": "pixel", "bounds": list(self.bounds)}

    def moment(self, error: Tensor) -> Tensor:
        """The moment of the error (B, ...) that would fix the family's one scale, (B,)."""
        return LIKELIHOODS[self.name].moment(error)

    def check_decoded(self, images: Tensor, decoded: Tensor) -> None:
        """Raise `ValueError` where the decoder made other than 2C channels of images with C."""
        if images.ndim < 2 or decoded.shape != (len(images), 2 * images.shape[1], *images.shape[2:]):
            raise ValueError(
                f"the decoder made {tuple(decoded.shape)} for images {tuple(images.shape)}; a scale for each value takes 2C channels on "
                "axis 1 for images of C: the reconstruction, then ln scale. For a decoder without scales take one scale for all"
            )
        super().check_decoded(images, self.reconstruction(decoded))

    def check_images(self, images: Tensor) -> None:
        """As the family does."""
        build_likelihood(self.name, 1.0, self._levels).observed(self.valid).check_images(images)


def bounded_log_scale(raw: Tensor, bounds: tuple[float, float]) -> Tensor:
    """ln of a scale within `bounds`: low + softplus(raw - low), and alike from above, of a softplus with slope 4 at its knee.

    It is `raw` to 1e-4 from two nats inside a bound on, and nears a bound without the end of its gradient that a clamp has.
    """
    low, high = (math.log(bound) for bound in bounds)
    return high - softplus(high - low - softplus(raw - low, beta=4), beta=4)
