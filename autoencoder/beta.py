"""What a KL weight amounts to: effective beta, the decoder scale it implies, and the same balance in other trainers' weights.

e is an error where images span [-1, 1], D the number of an image's values. Each objective's pixel and KL terms are, but for a factor,
those of a beta-VAE,

    sum|e|**p / (p b**p) + beta KL,    p = 1 (Laplace, logistic's tails) or 2 (Gaussian, b = sigma),

and equally well those of a plain ELBO (beta = 1) whose decoder has the *implied* scale b beta**(1 / p): a weight on the KL and a
width of the decoder are one setting (Rybkin et al. 2021). Taking b to be the scale that fits the measured errors best makes beta
comparable:

    beta = (implied scale / best scale)**p.

Discretised likelihoods are read as their densities: exact to within what a bin's width blurs. Perceptual and adversarial terms are left
out: they hold the reconstruction, too, so that with them the KL weighs less than beta says. Torch-free.
"""

import math

from autoencoder.objective_config import ObjectiveConfig

CONVENTIONS = ("ldm", "monai", "diffusers")
"""Other trainers' losses (see `ObjectiveConfig.convention`), in the order that tables have them."""


def family(config: ObjectiveConfig) -> str:
    """The likelihood whose shape the loss's pixel term has."""
    return {"ldm": "laplace", "monai": "laplace", "diffusers": "gaussian"}.get(config.convention, config.likelihood.name)


def best_scale(family: str, *, mean_absolute_error: float, mean_squared_error: float) -> float:
    """The scale that fits errors best: mean|e| (Laplace), mean|e| / (2 ln 2) (logistic, from its moment), sqrt(mean e**2) (Gaussian)."""
    if _power(family) == 2:
        return math.sqrt(mean_squared_error)
    return mean_absolute_error / (2 * math.log(2) if "logistic" in family else 1)


def implied_scale(
    config: ObjectiveConfig, *, mean_absolute_error: float, mean_squared_error: float, dims: int, weight: float | None = None
) -> float:
    """The decoder scale, where images span [-1, 1], at which this objective is a plain ELBO (beta = 1) but for a factor and a constant.

    c * sum|e| + w * KL has b = w / c (w s for LDM, w D for MONAI), c * sum e**2 + w * KL has sigma = sqrt(w / (2 c)). In convention
    `elbo` it is w or sqrt(w) times the likelihood's scale: a fixed one's value, else the one that fits the errors best.
    """
    weight = config.kl.weight if weight is None else weight
    if config.convention == "ldm":
        return weight * math.exp(config.ldm_logvar)
    if config.convention == "monai":
        return weight * dims
    if config.convention == "diffusers":
        return math.sqrt(weight / 2)
    name, scale = config.likelihood.name, config.likelihood.value
    if config.likelihood.scale != "fixed":
        scale = best_scale(name, mean_absolute_error=mean_absolute_error, mean_squared_error=mean_squared_error)
    return float(scale * weight ** (1 / _power(name)))


def effective_beta(
    config: ObjectiveConfig, *, mean_absolute_error: float, mean_squared_error: float, dims: int, weight: float | None = None
) -> float:
    """The beta of a beta-VAE whose decoder has the best scale for these errors and whose minimum is this objective's.

    For c * sum|e| + w * KL it is w / (c * mean|e|), for c * sum e**2 + w * KL it is w / (2 * c * mean e**2). Infinite where errors are zero
    and the scale does not follow them.

    Args:
        config: the objective.
        mean_absolute_error: mean|e| over the values of reconstructed posterior samples.
        mean_squared_error: mean e**2, alike.
        dims: D.
        weight: the KL weight in force (a schedule's or a controller's), read by `convention`; None takes the configured one.
    """
    if config.convention == "elbo" and config.likelihood.scale != "fixed":
        return config.kl.weight if weight is None else weight
    errors = {"mean_absolute_error": mean_absolute_error, "mean_squared_error": mean_squared_error}
    implied, best = implied_scale(config, **errors, dims=dims, weight=weight), best_scale(family(config), **errors)
    return float((implied / best) ** _power(family(config))) if best > 0 else math.inf


def equivalent_weights(beta: float, *, mean_absolute_error: float, mean_squared_error: float, dims: int) -> dict[str, float]:
    """The KL weight that has this effective beta in each of `CONVENTIONS` (LDM at s = 1), at the same errors.

    Between a Laplace and a Gaussian loss this keeps beta, not the minimum: they weigh small and large errors differently.
    """
    return {
        "ldm": beta * mean_absolute_error,
        "monai": beta * mean_absolute_error / dims,
        "diffusers": 2 * beta * mean_squared_error,
    }


def _power(family: str) -> int:
    return 2 if "gaussian" in family else 1
