"""firststage: the autoencoder stage.

What may be relied on, imported from the module that holds it (importing this package imports no torch):

- `autoencoder.likelihood`: `Gaussian`, `Laplace`, `DiscretizedGaussian`, `DiscretizedLogistic`, `PixelScale`
- `autoencoder.posterior`: `Posterior`, `DiagonalGaussian`
- `autoencoder.prior`: `Prior`, `StandardNormal`
- `autoencoder.elbo`: `evaluate_elbo`, `ElboTerms`, `bits_per_dim`
- `autoencoder.account`: `compare`, `Measure`
- `autoencoder.latents.reader`: `Latents`, `Rows`, `LatentsError`
- `autoencoder.identity`: `identity`, `encoder_hash`, `decoder_hash`
"""

__all__ = ["account", "elbo", "identity", "likelihood", "posterior", "prior"]
__version__ = "0.1.0"
