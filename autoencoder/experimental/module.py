"""The network with an experimental family: `forward` gives the rate of samples where a closed-form KL has no meaning."""

import torch
from torch import Tensor, nn

from autoencoder.equivariance import Transformation
from autoencoder.experimental.config import ExperimentalConfig
from autoencoder.experimental.coupling import CouplingFlow
from autoencoder.experimental.flow_posterior import FlowPosterior
from autoencoder.experimental.flow_prior import FlowPrior
from autoencoder.experimental.mixture_prior import Mixture, MixturePrior
from autoencoder.experimental.vamp_prior import PseudoInputs, VampPrior
from autoencoder.model import Autoencoder, AutoencoderKL, Output, encode
from autoencoder.posterior import DiagonalGaussian
from autoencoder.prior import Prior, StandardNormal


class Families(nn.Module):
    """What is trained beside a network: the parts of q(z|x) and p(z) that a stock AutoencoderKL has no place for.

    Args:
        config: which, and how large.
        vae: the network they belong to; it is not held.
        resolution: side of the images in pixels, for pseudo-inputs.
    """

    def __init__(self, config: ExperimentalConfig, vae: AutoencoderKL, *, resolution: int) -> None:
        super().__init__()
        self.config, self.resolution = config, resolution
        channels = int(vae.config["latent_channels"])
        size = {"couplings": config.flow_couplings, "width": config.flow_width}
        self.posterior = CouplingFlow(channels, context=2 * channels, **size) if config.posterior == "flow" else None
        self.prior: CouplingFlow | Mixture | PseudoInputs | None = None
        if config.prior == "flow":
            self.prior = CouplingFlow(channels, **size)
        elif config.prior == "mixture":
            self.prior = Mixture(channels, config.components)
        elif config.prior == "vamp":
            self.prior = PseudoInputs(config.components, (int(vae.config["in_channels"]), resolution, resolution))

    def posterior_from(self, base: DiagonalGaussian) -> DiagonalGaussian | FlowPosterior:
        """q(z|x) from the Gaussian that the encoder gives."""
        return base if self.posterior is None else FlowPosterior(base, self.posterior)

    def prior_of(self, vae: AutoencoderKL) -> Prior:
        """p(z) as it stands; with pseudo-inputs it takes a pass of the encoder over them."""
        if isinstance(self.prior, CouplingFlow):
            return FlowPrior(self.prior)
        if isinstance(self.prior, Mixture):
            return MixturePrior(self.prior)
        if isinstance(self.prior, PseudoInputs):
            return VampPrior(encode(vae, self.prior()))
        return StandardNormal()

    def bound_to(self, vae: AutoencoderKL) -> "Family":
        """Posterior and prior as they stand, for samples and their rates."""
        return Family(self, self.prior_of(vae))


class Family:
    """q(z|x) and p(z) of families; the prior is taken once, for all batches until the weights move."""

    def __init__(self, families: Families, prior: Prior) -> None:
        self.families, self.prior = families, prior

    def sample(self, base: DiagonalGaussian, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, c, h, w) for standard normal noise, and their log q(z|x) - log p(z) in nats, (B,)."""
        with torch.autocast(noise.device.type, enabled=False):
            latents, log_q = self.families.posterior_from(base).sample_with_log_prob(noise)
            return latents, log_q - self.prior.log_prob(latents)

    def mode(self, base: DiagonalGaussian) -> Tensor:
        """Latents (B, c, h, w) that a reconstruction without noise is decoded from."""
        return self.families.posterior_from(base).mode()


class ExperimentalAutoencoder(Autoencoder):
    """An `Autoencoder` with families; with k noises an image every output has B * k rows, those of an image next to each other."""

    def __init__(self, vae: AutoencoderKL, log_scale: Tensor | None, families: Families) -> None:
        super().__init__(vae, log_scale)
        self.experimental: Families = families

    def forward(self, images: Tensor, noise: Tensor, transformation: Transformation | None = None) -> Output:
        """Images (B, C, H, W) and standard normal noise (B, c, h, w) or (B, k, c, h, w)."""
        base = encode(self.vae, images)
        if noise.ndim == 5:
            samples = noise.shape[1]
            base = DiagonalGaussian(base.mean.repeat_interleave(samples, 0), base.logvar.repeat_interleave(samples, 0))
            noise = noise.flatten(0, 1)
        latents, rate = self.experimental.bound_to(self.vae).sample(base, noise)
        return self._output(base, latents, transformation, rate)
