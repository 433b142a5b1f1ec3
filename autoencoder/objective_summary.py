"""What is optimised, in figures and words, for start-up log, report and `evaluate_autoencoder`. Torch-free.

Pixel ELBO, perceptual and adversarial term stand apart: the first is in nats, the others are in the loss and in no ELBO.
"""

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autoencoder.adversarial_config import PLATEAU, AdversarialConfig
from autoencoder.beta import best_scale, effective_beta, equivalent_weights, family, implied_scale
from autoencoder.experimental.config import ExperimentalConfig
from autoencoder.objective_config import AT_BOUND, KLConfig, ObjectiveConfig, PerceptualConfig
from autoencoder.runtime.config import count
from autoencoder.runtime.own_class import OwnClass

TRAINERS = {"ldm": "LDM", "monai": "MONAI", "diffusers": "diffusers"}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a summary needs beside the configuration."""

    mean_absolute_error: float
    """Mean |e| over the values of reconstructed posterior samples, where images span [-1, 1]."""
    mean_squared_error: float
    """Mean e**2, alike."""
    channels: int
    """Image channels."""
    resolution: int
    """Side of the (square) images."""
    latent_shape: tuple[int, int, int]
    """(c, h, w) of an image's latents."""
    kl_weight: float | None = None
    """The weight in force; None takes the configured one."""
    assumed: bool = False
    """Typical errors, before any are measured."""
    reached: float | None = None
    """What a control's KL (nats an image) or RMS error came to at the end of a run."""
    discriminator_from: int | None = None
    """Images seen when the discriminator began, where that is known."""

    @property
    def dims(self) -> int:
        """D, values of an image."""
        return self.channels * self.resolution**2

    @property
    def errors(self) -> dict[str, float]:
        """As keyword arguments."""
        return {"mean_absolute_error": self.mean_absolute_error, "mean_squared_error": self.mean_squared_error}


def describe_objective(
    config: ObjectiveConfig | None, measured: Measured, experimental: ExperimentalConfig | None = None
) -> dict[str, Any]:
    """The objective as JSON: its terms, effective beta, decoder scales and the KL weights of equal beta in other trainers' losses.

    Without a configuration (an autoencoder that is not a run of ours): the weights of beta = 1 at these errors. Null stands for what has no
    finite value, and for the decoder's scales where each value has its own. `experimental` is null for a Gaussian VAE on its ELBO.
    """
    dims, errors = measured.dims, measured.errors
    told: dict[str, Any] = {**errors, "assumed": measured.assumed, "dims": dims, "resolution": measured.resolution}
    told["experimental"] = None if experimental is None else _experimental(experimental)
    if config is None:
        return {**told, "convention": None, "beta": 1.0, "equivalent_weights": _finite(equivalent_weights(1.0, **errors, dims=dims))}
    likelihood, kind = config.likelihood, family(config)
    weight = config.kl.weight if measured.kl_weight is None else measured.kl_weight
    beta = effective_beta(config, **errors, dims=dims, weight=weight)
    scales = {"implied_scale": implied_scale(config, **errors, dims=dims, weight=weight), "best_scale": best_scale(kind, **errors)}
    if likelihood.scale == "pixel":
        scales = dict.fromkeys(scales, math.nan)
    return {
        **told,
        "convention": config.convention,
        "likelihood": {"name": likelihood.name, "scale": likelihood.scale, "words": _likelihood_words(config)},
        "pixel_term": _pixel_words(config),
        "kl": _kl_words(config.kl),
        "control": config.kl.control,
        "target": _target(config.kl, measured.reached, weight),
        "kl_weight": weight,
        "perceptual": _perceptual(config.perceptual),
        "adversarial": _adversarial(config.adversarial, measured.discriminator_from),
        "equivariance": {"share": config.equivariance.share, "weight": config.equivariance.weight} if config.equivariance.share else None,
        **_finite({"beta": beta}),
        "decoder": {"family": kind, **_finite(scales)},
        "equivalent_weights": _finite(equivalent_weights(beta, **errors, dims=dims)),
        "notes": resolution_notes(config, measured),
    }


def lines(told: dict[str, Any]) -> list[str]:
    """The summary as an aligned block of text at most 120 columns wide, from what `describe_objective` gave."""
    return _aligned(rows(told))


def rows(told: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, words) of each term and reading of the objective, from what `describe_objective` gave."""
    side, weights = told["resolution"], told["equivalent_weights"]
    equal = ", ".join(f"{_figure(weights[key])} in {name}" + f" (at {side} pixels)" * (key == "monai") for key, name in TRAINERS.items())
    errors = f"mean|e| {told['mean_absolute_error']:.4g}, mean e^2 {told['mean_squared_error']:.4g}"
    errors += f", {told['dims'] // side**2}x{side}x{side} values"
    if told["assumed"]:
        errors += " (assumed; the log has beta at the measured ones)"
    if told["convention"] is None:
        published = _figure(1e-6 / told["mean_absolute_error"]) if told["mean_absolute_error"] > 0 else "none"
        return [
            *_experimental_row(told),
            ("beta 1", f"KL weight {equal}; LDM's published 1e-06 is beta {published} here"),
            ("at errors", errors),
        ]
    perceptual, decoder = told["perceptual"], told["decoder"]
    elbo, kl = told["convention"] == "elbo", f"+ {told['kl_weight']:.4g} KL, {told['kl']}"
    likelihood = told["likelihood"]["words"]
    starts = " to begin with" if told["assumed"] and told["control"] != "none" else ""
    beta = f"{_figure(told['beta'])}{starts}: "
    if told["likelihood"]["scale"] == "pixel":
        beta += "the KL weight; each value has its own scale, so that the weights below are those of one scale at these errors"
    else:
        beta += f"the ELBO (beta 1) of a {decoder['family']} decoder of scale {_figure(decoder['implied_scale'])}"
        beta += f", where the errors fit {_figure(decoder['best_scale'])}"
    return [
        ("pixel ELBO", f"NLL ({likelihood}) {kl}") if elbo else ("pixels and KL", f"{told['pixel_term']} {kl}"),
        *([] if elbo else [("ELBO reported", likelihood)]),
        *_experimental_row(told),
        (
            "perceptual",
            "off" if perceptual is None else f"{_with_arguments(perceptual)}, weight {perceptual['weight']:g}: in the loss, in no ELBO",
        ),
        ("adversarial", "off" if told["adversarial"] is None else f"{told['adversarial']['words']}: in the loss, in no ELBO"),
        *_equivariance_row(told),
        ("effective beta", beta),
        ("as KL weight", equal),
        ("at errors", errors),
        *([("target", told["target"]["words"])] if told.get("target") else []),
        *(("note", note) for note in told["notes"]),
    ]


def resolution_notes(config: ObjectiveConfig, measured: Measured, *, trained_at: int | None = None) -> list[str]:
    """Sentences on what of the KL's balance would change with the resolution: nothing where pixels and KL are both summed.

    Args:
        trained_at: resolution, if another, of the run that the weights come from.
    """
    side, kl = measured.resolution, config.kl
    sides = (side // 2, side, side * 2) if trained_at in (None, side) else (trained_at, side)
    notes = []
    if config.convention == "monai" and kl.control == "none":
        channels, weight = measured.channels, measured.kl_weight
        betas = _at(sides, lambda s: effective_beta(config, **measured.errors, dims=channels * s**2, weight=weight))
        notes.append(f"convention `monai` sets a mean over values against a summed KL: the same weight is beta {betas} (at these errors)")
    per_image = math.prod(measured.latent_shape)
    if kl.control == "target" and kl.target is not None:
        target = kl.target
        rates = _at(sides, lambda s: target / (per_image * (s / side) ** 2))
        notes.append(f"kl.target is for a whole image: {target:g} nats are {rates}, in nats a latent value")
    if kl.free_bits > 0 and kl.free_bits_per == "channel":
        rates = _at(sides, lambda s: kl.free_bits * measured.latent_shape[0] / (per_image * (s / side) ** 2))
        notes.append(f"kl.free_bits is for a channel's whole map: {kl.free_bits:g} nats are {rates}, in nats a latent value")
    if notes and len(sides) == 2:
        notes.append(f"init_from was trained at {trained_at} pixels: see that its weight or nats still mean what they are to mean")
    return notes


def standing(weight: float, bounds: tuple[float, float]) -> str:
    """Where a controlled weight stands, as part of a sentence: at a bound, beyond which its control cannot go, or between them."""
    low, high = bounds
    if weight <= low * AT_BOUND:
        where = f"at its lower bound, {low:g}"
    else:
        where = f"at its upper bound, {high:g}" if weight >= high / AT_BOUND else "between its bounds"
    return f"the weight, {weight:.3g}, is {where}"


def _target(kl: KLConfig, reached: float | None, weight: float) -> dict[str, Any] | None:
    """What a control was to hold and what it came to; None without a control, and before there is anything to tell."""
    wanted = kl.target if kl.target is not None else kl.target_rmse
    if wanted is None or reached is None:
        return None
    what = f"KL {wanted:g} nats an image" if kl.control == "target" else f"RMS error {wanted:g}"
    words = f"{what}: {reached:.4g} at the end of training; {standing(weight, kl.bounds)}"
    return {"wanted": wanted, **_finite({"reached": reached}), "words": words}


def _at(sides: tuple[int, ...], value: Callable[[int], float]) -> str:
    """`0.2 at 16 pixels, 0.8 at 32, 3.2 at 64`."""
    shown = [f"{_figure(value(side))} at {side}" for side in sides]
    return ", ".join([shown[0] + " pixels", *shown[1:]])


def _pixel_words(config: ObjectiveConfig) -> str:
    return {
        "elbo": "NLL",
        "ldm": f"sum|e| / {math.exp(config.ldm_logvar):.4g} (LDM)",
        "monai": "mean|e| (MONAI's tutorials)",
        "diffusers": "sum e^2 (diffusers)",
    }[config.convention]


def _perceptual(config: PerceptualConfig) -> dict[str, Any] | None:
    """Its name, which is the class path of one of the user's own, and weight."""
    if config.name == "none":
        return None
    if config.name == "own":
        return {"name": config.own.class_path, "init_args": dict(config.own.init_args), "weight": config.weight}
    return {"name": config.name, "weight": config.weight}


def _with_arguments(told: dict[str, Any]) -> str:
    arguments = told.get("init_args")
    return str(OwnClass(class_path=told["name"], init_args=arguments)) if arguments else str(told["name"])


def _adversarial(config: AdversarialConfig, began: int | None) -> dict[str, Any] | None:
    if not config.on:
        return None
    weighting = {
        "fixed": "fixed",
        "running": "of the gradient of the rest at the last layer, by their running ratio",
        "step": "of the gradient of the rest at the last layer, by each step's ratio",
    }[config.weighting]
    waits = began is None and config.start == PLATEAU
    start = "once the NLL has stopped falling" if waits else f"from {count(config.start, 'start') if began is None else began:,} images on"
    warmup, ramp = (count(getattr(config, key), key) for key in ("warmup_images", "ramp_images"))
    by = f" by {config.own}" if config.own.given else ""
    words = f"{config.name}{by}, weight {config.weight:g} ({weighting}), {start}"
    words += f"; the decoder hears it {warmup:,} images later, in full after {ramp:,} more" if warmup or ramp else ""
    told = {"name": config.name, "weight": config.weight, "weighting": config.weighting, "began": began, "words": words}
    return {**told, "own": config.own.to_json()} if config.own.given else told


def _likelihood_words(config: ObjectiveConfig) -> str:
    likelihood = config.likelihood
    scale = {
        "analytic": "one scale that follows the error",
        "learned": "one scale, learned",
        "fixed": f"scale {likelihood.value:g}, fixed",
        "pixel": "a scale of each value's own from the decoder, stripped at export",
    }[likelihood.scale]
    return f"{likelihood.name}, {scale}"


def _kl_words(kl: KLConfig) -> str:
    if kl.control == "target":
        words = f"the weight moves to hold {kl.target:g} nats an image"
    elif kl.control == "geco":
        words = f"the weight moves to hold an RMS error of {kl.target_rmse:g} (GECO)"
    elif kl.schedule == "cyclical":
        words = f"the weight rises from 0 in the first {kl.rise:.0%} of each of {kl.cycles} cycles"
    elif kl.schedule == "constant":
        words = "constant weight"
    else:
        words = f"the weight rises from 0 over {count(kl.anneal_images, 'anneal_images'):,} images ({kl.schedule})"
    return words + (f"; {kl.free_bits:g} nats free a {kl.free_bits_per}" if kl.free_bits else "")


def _experimental(config: ExperimentalConfig) -> dict[str, Any] | None:
    words = [f"posterior {config.posterior}, prior {config.prior}: KL is log q - log p of a sample"] if config.parts else []
    if config.iwae_samples > 1:
        words.append(f"the loss is the importance-weighted bound of {config.iwae_samples} samples, not the ELBO")
    if config.encoder_steps > 0:
        until = count(config.encoder_steps_images, "experimental.encoder_steps_images")
        words.append(f"{config.encoder_steps} steps of the encoder alone before each of all, over the first {until:,} images")
    kinds = {"posterior": config.posterior, "prior": config.prior, "iwae_samples": config.iwae_samples}
    return {**kinds, "encoder_steps": config.encoder_steps, "words": "; ".join(words)} if words else None


def _experimental_row(told: dict[str, Any]) -> list[tuple[str, str]]:
    return [("experimental", told["experimental"]["words"])] if told.get("experimental") else []


def _equivariance_row(told: dict[str, Any]) -> list[tuple[str, str]]:
    chosen = told.get("equivariance")
    words = "weight {weight:g}, transformed reconstructions of {share:.0%} of the images: in the loss, in no ELBO"
    return [("equivariance", words.format(**chosen))] if chosen else []


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    indent = max(len(name) for name, _ in rows) + 4
    return [
        line
        for name, text in rows
        for line in textwrap.wrap(text, 120, initial_indent=f"  {name}".ljust(indent), subsequent_indent=" " * indent)
    ]


def _figure(value: float | None) -> str:
    return "none" if value is None or not math.isfinite(value) else f"{value:.3g}"


def _finite(figures: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}
