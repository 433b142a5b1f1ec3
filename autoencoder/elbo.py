"""The account of a latent-variable model: NLL, KL, ELBO and the importance-weighted bound, in nats per image."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from autoencoder.account import Measure
from autoencoder.likelihood import Likelihood
from autoencoder.posterior import DiagonalGaussian, Posterior
from autoencoder.prior import Prior, closed_form_kl

Nats = TypeVar("Nats", float, Tensor)


@dataclass(frozen=True)
class ElboTerms:
    """Estimates in nats per image, each (B,), from k samples of the posterior."""

    nll: Tensor
    """E_q[-log p(x|z)], mean over the samples."""
    kl: Tensor
    """KL(q(z|x) || p(z)): in closed form where the prior has one for a Gaussian q, else the samples' mean of log q(z|x) - log p(z)."""
    elbo: Tensor
    """-nll - kl, a lower bound on log p(x) in expectation."""
    iwae: Tensor
    """ln(mean of the weights w = p(x|z) p(z) / q(z|x)): tighter with more samples (Burda et al. 2016, eq. 8)."""
    effective_sample_size: Tensor
    """(sum w)**2 / sum w**2, from 1 (one sample carries `iwae`) to k."""
    measure: Measure
    """What these are nats of: `account.compare` refuses to set different ones against each other."""


def evaluate_elbo(
    images: Tensor,
    *,
    encode: Callable[[Tensor], Posterior],
    decode: Callable[[Tensor], Tensor],
    likelihood: Likelihood,
    prior: Prior,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> ElboTerms:
    """The ELBO and the importance-weighted bound of images (B, ...), at least float32. Differentiable: call it under no_grad to measure.

    `encode` takes images to q(z|x); `decode` takes latents of the posterior's shape to a reconstruction of the images' shape, or to what
    the likelihood takes instead (`PixelScale`: twice the channels). Noise is drawn on the generator's device, or from torch's global
    generator on the images'.

    Raises:
        ValueError: fewer than one sample, shapes that do not fit, images outside the likelihood's support, or a value that is not finite;
            the message says which and what would do.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; give at least 1")
    if images.ndim < 2 or not images.numel():
        raise ValueError(f"images have shape {tuple(images.shape)}; give a batch axis and at least one more, none empty")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; give floating-point images in [-1, 1]")
    _check_finite("images", images)
    likelihood.check_images(images)
    posterior = encode(images)
    if posterior.shape[0] != images.shape[0]:
        raise ValueError(f"encode made {posterior.shape[0]} posteriors of {images.shape[0]} images; give one an image")
    if isinstance(posterior, DiagonalGaussian):
        _check_finite("posterior mean", posterior.mean)
        _check_finite("posterior log-variance", posterior.logvar)

    device = images.device if generator is None else generator.device
    dtype = torch.promote_types(images.dtype, torch.float32)
    log_likelihoods, log_ratios = [], []  # of each sample, (B,)
    for _ in range(samples):
        noise = torch.randn(posterior.shape, generator=generator, dtype=dtype, device=device).to(images.device)
        z, log_q = posterior.sample_with_log_prob(noise)
        _check_finite("latents", z)
        log_likelihoods.append(_per_image("log p(x|z)", likelihood.log_prob(images, _decode(decode, z, images, likelihood)), images))
        log_ratios.append(_per_image("log p(z)", prior.log_prob(z), images) - _per_image("log q(z|x)", log_q, images))
    log_likelihood, log_ratio = torch.stack(log_likelihoods), torch.stack(log_ratios)  # (k, B)

    closed_form = closed_form_kl(posterior, prior)
    kl = -log_ratio.mean(0) if closed_form is None else _per_image("KL", closed_form, images)
    nll = -log_likelihood.mean(0)
    log_weights = log_likelihood + log_ratio
    log_sum = log_weights.logsumexp(0)
    return ElboTerms(
        nll=nll,
        kl=kl,
        elbo=-nll - kl,
        iwae=log_sum - math.log(samples),
        effective_sample_size=(2 * log_sum - (2 * log_weights).logsumexp(0)).exp(),
        measure=Measure.of(likelihood, images[0].numel()),
    )


def bits_per_dim(elbo: Nats, dims: float | Nats) -> Nats:
    """-elbo / (D ln 2): bits for each of an image's D = C * H * W values, less those missing, from an ELBO (or log p(x)) in nats.

    Only a likelihood over levels (`Likelihood.discrete`) makes these the length of a code.
    """
    return -elbo / (dims * math.log(2))


def _decode(decode: Callable[[Tensor], Tensor], z: Tensor, images: Tensor, likelihood: Likelihood) -> Tensor:
    decoded = decode(z)
    try:
        likelihood.check_decoded(images, decoded)
    except ValueError as error:
        raise ValueError(f"decode made {tuple(decoded.shape)} of latents {tuple(z.shape)}: {error}") from None
    _check_finite("reconstruction", decoded)
    return decoded


def _per_image(name: str, value: Tensor, images: Tensor) -> Tensor:
    """`value`, checked to be finite and (B,)."""
    if value.shape != images.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; give one value an image, ({images.shape[0]},)")
    _check_finite(name, value)
    return value


def _check_finite(name: str, value: Tensor) -> None:
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {value.numel()} values are not finite")
