"""The importance-weighted bound as a training objective."""

import math

from autoencoder.objective import Terms


def importance_weighted(terms: Terms, samples: int) -> Terms:
    """Terms (B, ...) from those of k samples an image, (B * k, ...), samples of an image next to each other.

    With loss_i = -log w_i, w_i = p(x|z_i) p(z_i) / q(z_i|x), the loss is -[ln sum_i w_i - ln k] (Burda et al. 2016, eq. 8), in nats; it is
    named `iwae_nats` with the bound's sign. Every other term becomes the mean over the samples, so that `elbo_nats` is the bound of one.
    """
    bound = (-terms.loss).view(-1, samples).logsumexp(1) - math.log(samples)
    named = {name: value.view(-1, samples).mean(1) for name, value in terms.named.items()}
    return Terms(-bound, {**named, "iwae_nats": bound.detach()})
