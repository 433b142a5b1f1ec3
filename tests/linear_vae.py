"""Probabilistic PCA and the linear VAE whose optimum it is: ground truth in closed form, shared by tests and benchmarks/ppca.py."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from autoencoder.elbo import ElboTerms, evaluate_elbo
from autoencoder.likelihood import Gaussian
from autoencoder.objective import Objective
from autoencoder.objective_config import ObjectiveConfig
from autoencoder.posterior import DiagonalGaussian
from autoencoder.prior import StandardNormal
from autoencoder.runtime.config import OptimizerConfig
from autoencoder.runtime.optim import build_optimizers, learning_rate_factor
from autoencoder.scale import AnalyticScale


class LinearVAE(nn.Module):
    """q(z|x) = N(A (x - c) + a, diag exp(logvar)), reconstruction W z + b, from a random start: images (B, D), latents (B, q).

    The center c is fixed; it does not change what the model can express, but how fast it is learned.
    """

    def __init__(self, center: Tensor, units: int) -> None:
        super().__init__()
        self.register_buffer("center", center)
        self.encoder = nn.Linear(len(center), units, dtype=center.dtype)
        self.logvar = nn.Parameter(center.new_zeros(units))
        self.decoder = nn.Linear(units, len(center), dtype=center.dtype)

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """q(z|x)."""
        mean = self.encoder(images - self.center)
        return DiagonalGaussian(mean, self.logvar.expand(mean.shape))

    def decode(self, z: Tensor) -> Tensor:
        """Reconstructions (B, D)."""
        return self.decoder(z)


@dataclass(frozen=True)
class PPCA:
    """The linear VAE that is optimal for images (N, D) at a noise variance and a beta (Tipping & Bishop 1999; Lucas et al. 2019).

    E_q[-log p(x|z)] + beta KL is, but for factors and constants, the negative ELBO at the noise variance v = beta sigma**2. With
    eigenvalues l_i and eigenvectors u_i of the images' covariance, its optimum is W_i = u_i (l_i - v)**0.5, A_i = W_i / l_i and
    q-variances v / l_i for the units with l_i > v; the others are idle: W_i = A_i = 0, q-variance 1.
    """

    mean: Tensor
    eigenvalues: Tensor
    """Falling, (D,)."""
    eigenvectors: Tensor
    """In columns, (D, D)."""
    units: int
    noise_variance: Tensor
    """sigma**2 of the decoder."""
    beta: float = 1.0

    @classmethod
    def fit(cls, images: Tensor, units: int) -> "PPCA":
        """Of maximum likelihood for images (N, D): sigma**2 is the mean of the discarded eigenvalues."""
        mean = images.mean(0)
        eigenvalues, eigenvectors = torch.linalg.eigh((images - mean).T @ (images - mean) / len(images))
        eigenvalues, eigenvectors = eigenvalues.flip(0), eigenvectors.flip(1)
        return cls(mean, eigenvalues, eigenvectors, units, eigenvalues[units:].mean())

    def at(self, noise_variance: float, beta: float) -> "PPCA":
        """The optimum at a fixed sigma**2 under a beta."""
        return replace(self, noise_variance=self.eigenvalues.new_tensor(noise_variance), beta=beta)

    def keeping(self, active: int, *, beta: float) -> "PPCA":
        """The optimum under a beta at the sigma that puts beta sigma**2 halfway between the last active unit's eigenvalue and the next."""
        return self.at(self.eigenvalues[active - 1 : active + 1].mean().item() / beta, beta)

    @property
    def sigma(self) -> float:
        """Standard deviation of the decoder."""
        return float(self.noise_variance.sqrt())

    @property
    def active(self) -> Tensor:
        """Which units carry anything, (q,): l_i > beta sigma**2."""
        return self.eigenvalues[: self.units] > self.beta * self.noise_variance

    @property
    def rate(self) -> float:
        """Mean KL(q(z|x) || p(z)) over the images in nats: sum of ln(l_i / (beta sigma**2)) / 2 over the active units."""
        kept = self.eigenvalues[: self.units][self.active]
        return float(0.5 * (kept / (self.beta * self.noise_variance)).log().sum())

    @property
    def weight(self) -> Tensor:
        """W, (D, q)."""
        excess = (self.eigenvalues[: self.units] - self.beta * self.noise_variance).clamp(min=0)
        return self.eigenvectors[:, : self.units] * excess.sqrt()

    @property
    def log_likelihood(self) -> float:
        """Mean log p(x) over the images in nats where sigma**2 has its maximum-likelihood value and beta is 1."""
        dims, kept = len(self.eigenvalues), self.eigenvalues[: self.units]
        return float(-0.5 * (dims * math.log(2 * math.pi) + kept.log().sum() + (dims - self.units) * self.noise_variance.log() + dims))

    @property
    def evidence(self) -> MultivariateNormal:
        """p(x) = N(mean, W W' + sigma**2 I)."""
        identity = torch.eye(len(self.mean), dtype=self.mean.dtype)
        return MultivariateNormal(self.mean, self.weight @ self.weight.T + self.noise_variance * identity)

    def linear_vae(self) -> LinearVAE:
        """The optimal linear VAE."""
        vae, variance = LinearVAE(self.mean, self.units), self.beta * self.noise_variance
        scaled = torch.maximum(self.eigenvalues[: self.units], variance)
        with torch.no_grad():
            vae.decoder.weight.copy_(self.weight)
            vae.decoder.bias.copy_(self.mean)
            vae.encoder.weight.copy_((self.weight / scaled).T)
            vae.encoder.bias.zero_()
            vae.logvar.copy_((variance / scaled).log())
        return vae


@torch.no_grad()
def account(vae: LinearVAE, images: Tensor, sigma: float, *, samples: int = 1, seed: int = 0) -> ElboTerms:
    """`evaluate_elbo` of images (N, D) under N(W z + b, sigma**2 I) and a standard normal prior."""
    return evaluate_elbo(
        images,
        encode=vae.encode,
        decode=vae.decode,
        likelihood=Gaussian(sigma),
        prior=StandardNormal(),
        samples=samples,
        generator=torch.Generator().manual_seed(seed),
    )


@dataclass
class Progress:
    """A linear VAE after some steps of training."""

    step: int
    sigma: float


def train(
    vae: LinearVAE,
    images: Tensor,
    config: ObjectiveConfig,
    optimizer: OptimizerConfig,
    *,
    batch: int,
    steps: int,
    every: int,
    seed: int = 0,
) -> Iterator[Progress]:
    """Train on images (N, D) with the project's objective, scale controller and optimiser; say every `every` steps where it stands.

    Each epoch takes the images in a new order, in whole batches; z is drawn once an image, the KL is in closed form.
    """
    objective, scale = Objective(config, None), AnalyticScale(config.likelihood, images.device)
    optimizers, finite = build_optimizers(vae, optimizer), torch.zeros(())
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    for step in range(steps):
        if not batches:
            batches = [*torch.randperm(len(images), generator=generator)[: len(images) // batch * batch].split(batch)]
        x = images[batches.pop()]
        posterior = vae.encode(x)
        decoded = vae.decode(posterior.sample(torch.randn(posterior.mean.shape, generator=generator, dtype=x.dtype)))
        terms = objective(x, posterior, decoded, scale=scale.value, kl_weight=config.kl.weight)
        optimizers.zero_grad()
        terms.loss.mean().backward()
        optimizers.step(learning_rate_factor(optimizer, step * batch, steps * batch), finite)
        scale.update(terms.named["scale_moment"].mean(), finite)
        if (step + 1) % every == 0:
            yield Progress(step + 1, float(scale.value))
