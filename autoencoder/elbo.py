"""The account of a latent-variable model: NLL, KL, ELBO and the importance-weighted bound, in nats per image."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from autoencoder.likelihood import Likelihood
from autoencoder.posterior import DiagonalGaussian
from autoencoder.prior import Prior

Nats = TypeVar("Nats", float, Tensor)


@dataclass(frozen=True)
class ElboTerms:
    """Estimates in nats per image, each (B,), from k samples of the posterior."""

    nll: Tensor
    """E_q[-log p(x|z)], mean over the samples."""
    kl: Tensor
    """KL(q(z|x) || p(z)): in closed form where the prior has one, else the samples' mean of log q(z|x) - log p(z)."""
    elbo: Tensor
    """-nll - kl, a lower bound on log p(x) in expectation."""
    iwae: Tensor
    """ln(mean of the weights w = p(x|z) p(z) / q(z|x)): tighter with more samples (Burda et al. 2015, eq. 8)."""
    effective_sample_size: Tensor
    """(sum w)**2 / sum w**2, from 1 (one sample carries `iwae`) to k."""


def evaluate_elbo(
    images: Tensor,
    *,
    encode: Callable[[Tensor], DiagonalGaussian],
    decode: Callable[[Tensor], Tensor],
    likelihood: Likelihood,
    prior: Prior,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> ElboTerms:
    """The ELBO and the importance-weighted bound of images (B, ...), at least float32. Differentiable: call it under no_grad to measure.

    `encode` takes images to q(z|x), `decode` latents of the posterior's shape to a reconstruction of the images' shape. Noise is drawn on
    the generator's device, or from torch's global generator on the posterior's.

    Raises:
        ValueError: fewer than one sample, shapes that do not fit, or a value that is not finite; the message says which.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; give at least 1")
    if images.ndim < 2:
        raise ValueError(f"images have shape {tuple(images.shape)}; give a batch axis and at least one more")
    _check_finite("images", images)
    posterior = encode(images)
    if posterior.mean.shape[0] != images.shape[0]:
        raise ValueError(f"encode made {posterior.mean.shape[0]} posteriors of {images.shape[0]} images; give one an image")
    _check_finite("posterior mean", posterior.mean)
    _check_finite("posterior log-variance", posterior.logvar)

    log_likelihoods, log_ratios = [], []  # of each sample, (B,)
    for _ in range(samples):
        device = posterior.mean.device if generator is None else generator.device
        z = posterior.sample(torch.randn(posterior.mean.shape, generator=generator, dtype=posterior.mean.dtype, device=device))
        log_likelihoods.append(_per_image("log p(x|z)", likelihood.log_prob(images, _reconstruct(decode, z, images)), images))
        log_ratios.append(_per_image("log p(z)", prior.log_prob(z), images) - posterior.log_prob(z))
    log_likelihood, log_ratio = torch.stack(log_likelihoods), torch.stack(log_ratios)  # (k, B)

    closed_form = getattr(prior, "kl", None)
    kl = -log_ratio.mean(0) if closed_form is None else _per_image("KL", closed_form(posterior), images)
    nll = -log_likelihood.mean(0)
    log_weights = log_likelihood + log_ratio
    log_sum = log_weights.logsumexp(0)
    return ElboTerms(
        nll=nll,
        kl=kl,
        elbo=-nll - kl,
        iwae=log_sum - math.log(samples),
        effective_sample_size=(2 * log_sum - (2 * log_weights).logsumexp(0)).exp(),
    )


def bits_per_dim(elbo: Nats, dims: int) -> Nats:
    """-elbo / (D ln 2): bits for each of an image's D = C * H * W values, from an ELBO (or log p(x)) in nats.

    Only a likelihood over levels (`Likelihood.discrete`) makes these the length of a code.
    """
    return -elbo / (dims * math.log(2))


def _reconstruct(decode: Callable[[Tensor], Tensor], z: Tensor, images: Tensor) -> Tensor:
    reconstruction = decode(z)
    if reconstruction.shape != images.shape:
        raise ValueError(f"decode made {tuple(reconstruction.shape)} of latents {tuple(z.shape)}; the images are {tuple(images.shape)}")
    _check_finite("reconstruction", reconstruction)
    return reconstruction


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
