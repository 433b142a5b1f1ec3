"""The scalars that a report knows, and how their values are written."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Quantity:
    """A named scalar of `metrics.jsonl` or `evaluation.json`."""

    key: str
    label: str
    unit: str
    """Unit; empty for a pure number."""
    digits: int | None = None
    """Decimals shown; None shows four significant figures."""

    def show(self, value: float | None) -> str:
        """The value as text, without its unit."""
        return number(value, self.digits)


PARTS = {
    "nll": "NLL",
    "reconstruction": "reconstruction",
    "kl": "KL",
    "perceptual": "perceptual",
    "adversarial": "adversarial",
    "equivariance": "equivariance",
}
"""Terms of a loss whose gradients are measured apart, in words."""

QUANTITIES = {
    q.key: q
    for q in (
        Quantity("psnr_db", "PSNR", "dB", 2),
        Quantity("kl_nats", "KL", "nats an image", 1),
        Quantity("nll_nats", "Negative log-likelihood", "nats an image", 1),
        Quantity("elbo_nats", "ELBO", "nats an image", 1),
        Quantity("bits_per_dim", "Bits per dimension", "bits", 3),
        Quantity("ssim", "SSIM", "", 4),
        Quantity("lpips", "LPIPS", "", 4),
        Quantity("kl_nats_per_latent", "KL a latent value", "nats", 3),
        Quantity("loss", "Loss", "", 1),
        Quantity("perceptual", "Perceptual distance", "", 4),
        Quantity("adversarial", "Adversarial term", "", 4),
        Quantity("adversarial_weight", "Adversarial weight", ""),
        Quantity("discriminator_loss", "Discriminator's loss", "", 4),
        Quantity("discriminator_accuracy", "Discriminator's accuracy", "share of patches", 3),
        Quantity("discriminator_gradient_norm", "Discriminator's gradient norm", ""),
        Quantity("r1", "R1: squared gradient at real images", ""),
        Quantity("equivariance", "Error of transformed reconstructions", "images in [−1, 1]", 4),
        *(Quantity(f"gradient_norm_{part}", f"Gradient norm, {words}", "") for part, words in PARTS.items()),
        Quantity("kl_weight", "KL weight", ""),
        Quantity("effective_beta", "Effective β", ""),
        Quantity("likelihood_scale", "Likelihood scale", "images in [−1, 1]", 4),
        Quantity("lr", "Learning rate", ""),
        Quantity("gradient_norm", "Gradient norm", ""),
        Quantity("images_per_second", "Throughput", "images a second", 1),
        Quantity("active_channels", "Active channels", "", 0),
        Quantity("active_units", "Active units", "", 0),
        Quantity("share_near_prior", "Variances near the prior's", "share", 3),
        Quantity("shuffled_delta_nats", "NLL added by shuffling latents", "nats an image", 1),
        Quantity("sharpness", "Edge energy kept", "share", 3),
        Quantity("running_kl_nats", "KL that its control follows", "nats an image", 1),
        Quantity("running_rmse", "RMS error that its control follows", "images in [−1, 1]", 4),
        Quantity("charged_groups", "Groups beyond their free bits", "", 0),
        Quantity("geometric_mean_scale", "Likelihood scale, geometric mean", "images in [−1, 1]", 4),
        Quantity("mean_absolute_error", "Mean absolute error", "images in [−1, 1]", 4),
        Quantity("mean_squared_error", "Mean squared error", "images in [−1, 1]", 5),
        Quantity("frechet", "Fréchet distance", ""),
    )
}


def quantity(key: str) -> Quantity:
    """The known quantity, or a plain one for a scalar that a later stage or an own loss logs."""
    return QUANTITIES.get(key) or Quantity(key, key.replace("_", " "), "")


def number(value: float | None, digits: int | None) -> str:
    """A number with thousands separated and a true minus; an em dash where there is none.

    Without `digits`: to four significant figures, and whole where it has more before the point.
    """
    if value is None:
        return "—"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    style = f",.{digits}f" if digits is not None else ",.0f" if 1e4 <= abs(value) < 1e9 else ",.4g"
    return format(value, style).replace("-", "−")


def images_seen(images: float) -> str:
    """A count of images, short: 800, 12.5k, 1.5M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if images >= size:
            return f"{images / size:.4g}{suffix}"
    return f"{images:.4g}"


def duration(seconds: float) -> str:
    """A span of time in its two largest units."""
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {round(seconds) % 60:02d} s" if minutes else f"{round(seconds)} s"


def plain(value: Any) -> str:
    """A configuration or provenance value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return (", ".join(plain(v) for v in value) or "[]") if isinstance(value, list) else str(value)
