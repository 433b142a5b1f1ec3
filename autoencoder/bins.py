"""Logarithms of the mass of a bin that stay exact where the mass itself has no digits left."""

import math
from typing import Any

import torch
from torch import Tensor


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


def log_ndtr(x: Tensor) -> Tensor:
    """ln Phi(x)."""
    value: Tensor = _LogNdtr.apply(x)
    return value


def log1mexp(x: Tensor) -> Tensor:
    """ln(1 - exp(-x)) for x > 0."""
    return (-torch.expm1(-x)).log()


GAUSS_LEGENDRE = (
    (0.2386191860831969, 0.46791393457269104),
    (0.6612093864662645, 0.3607615730481386),
    (0.932469514203152, 0.1713244923791704),
)
"""Positive nodes and weights of the six-point rule on [-1, 1] (Abramowitz & Stegun 1964, table 25.4)."""


def log_narrow_gaussian_bin(center: Tensor, half: Tensor) -> Tensor:
    """ln of the standard normal's mass in center +- half, for half < 0.5 and |center| * half < 0.5 (values beyond are taken there).

    mass = 2 half phi(center) * mean over t in [-1, 1] of exp(-(half t)**2 / 2) cosh(center half t), by six-point Gauss-Legendre quadrature:
    exact to double precision on so smooth an integrand.
    """
    slope = (center * half).clamp(-0.5, 0.5)
    mean = torch.zeros_like(slope)
    for node, weight in GAUSS_LEGENDRE:
        mean = mean + weight * (-0.5 * (half * node).square()).exp() * (slope * node).cosh()
    return -0.5 * center.square() - 0.5 * math.log(2 * math.pi) + (2 * half).log() + mean.log()
