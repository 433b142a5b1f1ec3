"""The gap between the ELBO and log p(x): how much of it a larger encoder, and how much a richer family of posteriors, would win back.

log p(x) - ELBO = KL(q || p(z|x)) has two parts (Cremer et al. 2018, sec. 3.1). The *amortisation gap* is what q loses because one network
makes it for all images; the *approximation gap* is what no member of its family can win.

Mutual information is not reported. It is one part of the rate, E KL(q || p) = I(x; z) + KL(q(z) || p(z)), but its estimate from N images
cannot exceed ln N: a few nats, where the rate is thousands.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoencoder.elbo import ElboTerms, evaluate_elbo
from autoencoder.likelihood import Likelihood
from autoencoder.posterior import DiagonalGaussian, Posterior
from autoencoder.prior import Prior, closed_form_kl


@dataclass(frozen=True)
class Bounds:
    """Lower bounds on log p(x) under one q, in nats, (N,), from the same k samples."""

    elbo: Tensor
    """Mean of the log weights ln w = log p(x|z) + log p(z) - log q(z|x)."""
    iwae: Tensor
    """ln of the mean weight: never below `elbo`, in expectation at most log p(x) (Burda et al. 2016, eq. 8)."""
    effective_sample_size: Tensor
    """(sum w)**2 / sum w**2, from 1 to k."""


@dataclass(frozen=True)
class Gap:
    """What `measure_gap` found, image by image."""

    encoder: Bounds
    """Under the encoder's q."""
    refined: Bounds
    """Under the refined q, from the same noise."""
    kl: Tensor
    """KL of the encoder's q to the prior in nats, (N,), in closed form where there is one: `Bounds` hold that of the samples."""
    rising: Tensor
    """By how much the ELBO still rose while refining, in nats, (N,): mean over the last quarter of the steps less the quarter before."""
    samples: int
    """k."""

    @property
    def amortisation(self) -> Tensor:
        """ELBO(refined) - ELBO(encoder's) in nats, (N,): the amortisation gap, or less where refining has not come to its end."""
        return self.refined.elbo - self.encoder.elbo

    @property
    def approximation(self) -> Tensor:
        """IWAE_k(refined) - ELBO(refined) in nats, (N,): a lower bound, as IWAE_k <= log p(x), on what refining leaves of the gap."""
        return self.refined.iwae - self.refined.elbo


def measure_gap(
    images: Tensor,
    *,
    encode: Callable[[Tensor], DiagonalGaussian],
    decode: Callable[[Tensor], Tensor],
    likelihood: Likelihood,
    prior: Prior,
    samples: int = 50,
    refine_steps: int = 100,
    lr: float = 0.1,
    family: Callable[[DiagonalGaussian], Posterior] | None = None,
    generator: torch.Generator | None = None,
) -> Gap:
    """Both parts of the gap of images (B, ...); arguments as of `evaluate_elbo`. One decoding of the batch is in memory at a time.

    `family` makes q of the Gaussian that the encoder gives, where that is not q itself; its own weights stay as they are.

    Refining moves mean and log-variance of each image's q on its ELBO, from the encoder's output (Cremer et al. 2018, sec. 4.1); no
    image's result depends on another's. Of the encoder's q and the refined one each image keeps the better. Three independent draws of
    noise keep that honest: one to refine on, one to choose on, and a fresh one, shared by both q, for all that is returned. No
    figure is thus selected for being high, and a wrong choice makes the amortisation gap smaller, never larger, in expectation.

    Raises:
        ValueError: as `evaluate_elbo`; fewer than two steps; a step size that is not above 0.
    """
    if refine_steps < 2:
        raise ValueError(f"refine_steps is {refine_steps}; give at least 2")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr is {lr}; give a finite number above 0")
    device = None if generator is None else generator.device
    refining, choosing, reporting = torch.randint(2**62, (3,), generator=generator, device=device).tolist()
    sampled, posterior = _WithoutClosedForm(prior), family or _itself

    @torch.no_grad()
    def account(q: DiagonalGaussian, seed: int) -> ElboTerms:
        noise = torch.Generator().manual_seed(seed)
        return evaluate_elbo(
            images, encode=lambda _: posterior(q), decode=decode, likelihood=likelihood, prior=sampled, samples=samples, generator=noise
        )

    def elbo(q: DiagonalGaussian, noise: Tensor) -> Tensor:
        # Sticking the landing (Roeder et al. 2017): less the gradient of log q's own parameters, which is zero in expectation, the
        # noise of the gradient dies out as q comes near the posterior.
        z = posterior(q).sample(noise)
        still = posterior(DiagonalGaussian(q.mean.detach(), q.logvar.detach()))
        return likelihood.log_prob(images, decode(z)) + prior.log_prob(z) - still.log_prob(z)

    with torch.no_grad():
        start = encode(images)
    of_encoder = account(start, reporting)  # with the checks of what was given
    found, rising = _refine(start, elbo, steps=refine_steps, lr=lr, noise=torch.Generator().manual_seed(refining))
    better = account(found, choosing).elbo > account(start, choosing).elbo
    kept = _choose(better, found, start)
    with torch.no_grad():
        kl = closed_form_kl(posterior(start), prior)
    return Gap(_bounds(of_encoder), _bounds(account(kept, reporting)), of_encoder.kl if kl is None else kl, rising, samples)


def join(parts: Sequence[Gap]) -> Gap:
    """The gaps of several batches as one."""

    def bounds(of: Sequence[Bounds]) -> Bounds:
        names = ("elbo", "iwae", "effective_sample_size")
        return Bounds(**{name: torch.cat([getattr(b, name) for b in of]) for name in names})

    return Gap(
        encoder=bounds([p.encoder for p in parts]),
        refined=bounds([p.refined for p in parts]),
        kl=torch.cat([p.kl for p in parts]),
        rising=torch.cat([p.rising for p in parts]),
        samples=parts[0].samples,
    )


def _itself(q: DiagonalGaussian) -> Posterior:
    return q


def _refine(
    start: DiagonalGaussian,
    elbo: Callable[[DiagonalGaussian, Tensor], Tensor],
    *,
    steps: int,
    lr: float,
    noise: torch.Generator,
) -> tuple[DiagonalGaussian, Tensor]:
    """q after Adam on the ELBO of each image, and `Gap.rising`. An image whose q went astray has its start again.

    Means move in units of the start's standard deviation, so that one step size suits latents of any scale.
    """
    mean, logvar, std = start.mean.detach(), start.logvar.detach(), start.std.detach()
    shift, growth = torch.zeros_like(mean).requires_grad_(), torch.zeros_like(logvar).requires_grad_()
    adam = torch.optim.Adam([shift, growth], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    epsilon, bounds = torch.zeros_like(mean), []
    for step in range(steps):
        # Every second step mirrors the noise of the one before: in Adam's running mean the noise of the means' gradients cancels.
        epsilon = -epsilon if step % 2 else torch.randn(mean.shape, generator=noise, dtype=mean.dtype).to(mean)
        with torch.enable_grad():
            bound = elbo(DiagonalGaussian(mean + std * shift, logvar + growth), epsilon)
            shift.grad, growth.grad = torch.autograd.grad(-bound.sum(), [shift, growth])
        adam.step()
        schedule.step()
        bounds.append(bound.detach())
    found = DiagonalGaussian((mean + std * shift).detach(), (logvar + growth).detach())
    sound = (found.mean.isfinite() & found.logvar.isfinite()).flatten(1).all(1)
    quarter = max(1, steps // 4)
    last, before = torch.stack(bounds[-quarter:]), torch.stack(bounds[-2 * quarter : -quarter])
    return _choose(sound, found, start), (last.mean(0) - before.mean(0)).where(sound, 0.0)


def _choose(first: Tensor, one: DiagonalGaussian, other: DiagonalGaussian) -> DiagonalGaussian:
    """Of each image (B,) the first or the other."""
    first = first.view(-1, *[1] * (one.mean.ndim - 1))
    return DiagonalGaussian(one.mean.where(first, other.mean), one.logvar.where(first, other.logvar))


class _WithoutClosedForm:
    """A prior whose KL comes from the samples: ELBO and IWAE then have their log weights in common, and the second is never below."""

    def __init__(self, prior: Prior) -> None:
        self.log_prob = prior.log_prob


def _bounds(terms: ElboTerms) -> Bounds:
    return Bounds(terms.elbo, terms.iwae, terms.effective_sample_size)
