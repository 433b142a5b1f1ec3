"""What is wrong with an autoencoder: the rules, and their thresholds with reasons.

A rule looks at a few figures and says whether they are bad, good or between the two.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from autoencoder.config import TrainAutoencoderConfig
from autoencoder.diagnostics import NEAR_PRIOR_VARIANCE
from autoencoder.likelihood import LIKELIHOODS
from autoencoder.model import LOGVAR_RANGE
from autoencoder.objective_config import AT_BOUND, ObjectiveConfig
from autoencoder.objective_summary import standing
from autoencoder.remedies import remedy
from autoencoder.runtime.alarms import Alarm
from autoencoder.runtime.config import count

COLLAPSED_KL = 0.005
"""KL a latent value, in nats, of a unit at the very edge of activity: -ln(1 - 0.01) / 2, at ACTIVE_VARIANCE."""
PRIOR_LIKE_KL = 0.05
"""KL a latent value, in nats, of a unit whose posterior variance is just near the prior's: -ln(0.9) / 2, at NEAR_PRIOR_VARIANCE."""
FLAT_NLL = 0.01
"""Fall of the NLL in nats a dimension from one window to the next, below which it is flat: an error smaller by a hundredth."""
UNUSED_LATENTS = 0.001
"""Rise of the NLL in nats a dimension when latents are shuffled, below which the decoder does not use them: a tenth of `FLAT_NLL`."""
DOMINATING_BETA = 4.0
"""Effective beta from which most of the rate that the bound itself would buy is priced out (Higgins et al. 2017 disentangle from 4 on)."""
MOSTLY_PRIOR = 0.5
"""Share of posterior variances near the prior's from which most of the latents carry nothing."""
IDLE_SHARE = 0.125
"""Share of channels that may lie idle: one of four or of eight is too many, one of sixteen is not."""
SCALES_AT_BOUND = 0.01
"""Share of a likelihood's scales that may lie at a bound: there the bound, not the data, sets the likelihood."""
LOGVARS_AT_CLAMP = 0.001
"""Share of log-variances that may lie at diffusers' clamp, where they have no gradient."""
CLEARS = 2.0
"""Factor by which a figure must be on the good side of its threshold for an alarm to be cleared."""

WON = 0.95
"""Accuracy of the discriminator from which it has won: the decoder's adversarial gradient says nothing but that it has lost."""

MISSED = 0.1
"""Distance |ln(figure / target)| of a KL or a squared error from which its control has missed: a tenth of the KL, 0.4 dB of PSNR."""
OF_THE_ENCODER = ("collapse", "dominating_kl", "idle_channels", "logvar_at_clamp", "target_missed")
"""Alarms that only another encoder would clear: none is raised about one that is frozen."""
LATE = {"target_missed": 0.5}
"""Share of the run before which an alarm is not judged, where that is later than for the others: a control needs time to arrive."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is watched."""

    images: int
    """Length of the run in training images."""
    dims: int
    """Values of an image, D = C * H * W."""
    latents: int
    """Values of its latents, c * h * w."""
    channels: int
    """Latent channels."""
    bounds: tuple[float, float] | None
    """Bounds of the likelihood's scale; None where it is fixed."""
    low_bound_binds: bool = True
    """Whether a smaller scale could raise the likelihood: not where the least one already puts all of a level's mass in its bin."""
    batch: int = 1
    """Images of an optimiser step."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is minimised, so that no remedy is what is in force already."""
    encoder_steps: bool = False
    """Whether the encoder has steps of its own."""
    frozen_encoder: bool = False
    """Whether the encoder stays as it was given."""

    @classmethod
    def of(cls, config: TrainAutoencoderConfig, latent_shape: tuple[int, int, int]) -> "Subject":
        """That of a run."""
        likelihood = config.objective.likelihood
        c, h, w = latent_shape
        # A perfectly predicted level loses 2 exp(-d / s) nats of its bin of half-width d: under a thousandth from d = 8 s on.
        half_bin = 1 / (likelihood.levels - 1)
        return cls(
            images=count(config.train.images, "train.images"),
            dims=config.data.channels * config.data.resolution**2,
            latents=c * h * w,
            channels=c,
            bounds=None if likelihood.scale == "fixed" else likelihood.bounds,
            low_bound_binds=not LIKELIHOODS[likelihood.name].discrete or half_bin < 8 * likelihood.bounds[0],
            batch=config.train.batch_size,
            objective=config.objective,
            encoder_steps=config.experimental.encoder_steps > 0,
            frozen_encoder=config.model.train == "decoder",
        )

    def judges(self, name: str) -> bool:
        """Whether the alarm `name` has a remedy here."""
        return not (self.frozen_encoder and name in OF_THE_ENCODER)

    def alarm(self, name: str, message: str) -> Alarm:
        """An alarm with its remedy."""
        return Alarm(name, message, remedy(name, self.objective, encoder_steps=self.encoder_steps))


Figures = Mapping[str, float]
"""Scalars of a log line or of a validation, by name."""


@dataclass(frozen=True)
class Finding:
    """What a rule says of some figures; neither bad nor good is in between."""

    bad: bool
    good: bool
    message: str
    """What was found, for where it is not good."""


def collapse_in_training(now: Figures, before: Figures, subject: Subject) -> Finding:
    """Two windows in a row without a rate to speak of, and no fall of the NLL from one to the other that would make up for it."""
    rate, earlier = now["kl_nats"] / subject.latents, before["kl_nats"] / subject.latents
    fall = (before["nll_nats"] - now["nll_nats"]) / subject.dims
    return Finding(
        bad=max(rate, earlier) <= COLLAPSED_KL and fall <= FLAT_NLL,
        good=rate > CLEARS * COLLAPSED_KL,
        message=f"the KL is {now['kl_nats']:.3g} nats an image over {subject.latents:,} latent values"
        + (", and the NLL no longer falls" if fall <= FLAT_NLL else ""),
    )


def dominating_kl_in_training(now: Figures, before: Figures, subject: Subject) -> Finding | None:
    """A KL priced far above the bound's own price, and a rate that leaves the mean latent value near the prior."""
    beta, rate = now.get("effective_beta"), now["kl_nats"] / subject.latents
    if beta is None:
        return None
    return Finding(
        bad=beta >= DOMINATING_BETA and rate <= PRIOR_LIKE_KL,
        good=beta < DOMINATING_BETA / CLEARS or rate > CLEARS * PRIOR_LIKE_KL,
        message=f"effective beta is {beta:,.4g}, and the KL {now['kl_nats']:.3g} nats an image over {subject.latents:,} latent values",
    )


def target_missed(now: Figures, before: Figures, subject: Subject) -> Finding | None:
    """Two windows in a row away from what a control is to hold."""
    kl = subject.objective.kl
    if kl.target is not None:
        key, target = "kl_nats", kl.target
    elif kl.target_rmse is not None:
        key, target = "mean_squared_error", kl.target_rmse**2
    else:
        return None
    if "kl_weight" not in now or key not in now or key not in before:
        return None
    # A rate that is estimated from samples may be negative.
    off = [abs(math.log(max(figures[key], 1e-12) / target)) for figures in (now, before)]
    reached = f"the KL is {now[key]:.4g} nats an image" if kl.target is not None else f"the RMS error is {math.sqrt(now[key]):.3g}"
    return Finding(
        bad=min(off) >= MISSED,
        good=off[0] < MISSED / CLEARS,
        message=f"{reached}, the target {kl.target or kl.target_rmse:g}; {standing(now['kl_weight'], kl.bounds)}",
    )


def discriminator_won(now: Figures, before: Figures, subject: Subject) -> Finding | None:
    """Two windows in a row in which the discriminator was right of nearly every patch."""
    if "discriminator_accuracy" not in now or "discriminator_accuracy" not in before:
        return None
    right = [figures["discriminator_accuracy"] for figures in (now, before)]
    return Finding(
        bad=min(right) >= WON,
        good=1 - right[0] > CLEARS * (1 - WON),
        message=f"the discriminator is right of {right[0]:.1%} of patches",
    )


def collapse_in_validation(seen: Figures, subject: Subject) -> Finding | None:
    """No rate to speak of, or latents that may be exchanged between images without harm."""
    rise, rate = seen.get("shuffled_delta_nats"), seen["kl_nats"] / subject.latents
    if rise is None:
        return None
    used = rise / subject.dims
    dear = f"decoding images from each other's latents costs {rise:.3g} nats"
    told = dear if rise > 0 else "images decode as well from another image's latents"
    return Finding(
        bad=rate <= COLLAPSED_KL or used <= UNUSED_LATENTS,
        good=rate > CLEARS * COLLAPSED_KL and used > CLEARS * UNUSED_LATENTS,
        message=f"the KL is {seen['kl_nats']:.3g} nats an image, and {told}",
    )


def dominating_kl_in_validation(seen: Figures, subject: Subject) -> Finding | None:
    """A KL priced far above the bound's own price, and most of the latents given up for it."""
    beta, share = seen.get("effective_beta"), seen["share_near_prior"]
    if beta is None:
        return None
    sharp = f"; reconstructions have {seen['sharpness']:.0%} of the images' edge energy" if "sharpness" in seen else ""
    return Finding(
        bad=beta >= DOMINATING_BETA and share >= MOSTLY_PRIOR,
        good=beta < DOMINATING_BETA / CLEARS or share < MOSTLY_PRIOR / CLEARS,
        message=f"effective beta is {beta:,.4g}, and {share:.0%} of the posterior variances are above {NEAR_PRIOR_VARIANCE:g}{sharp}",
    )


def idle_channels(seen: Figures, subject: Subject) -> Finding:
    """Some channels carry nothing, while others do: where all are idle it is a collapse."""
    idle = subject.channels - round(seen["active_channels"])
    return Finding(
        bad=IDLE_SHARE <= idle / subject.channels < 1,
        good=idle == subject.channels or idle / subject.channels < IDLE_SHARE / CLEARS,
        message=f"{idle} of {subject.channels} latent channels {'is' if idle == 1 else 'are'} inactive",
    )


def scale_at_bound(seen: Figures, subject: Subject) -> Finding | None:
    """Scales that a bound holds: all of a value's own, or the one of all values."""
    if subject.bounds is None:
        return None
    low, high = subject.bounds
    if "scales_at_high_bound" in seen:
        shares = seen["scales_at_low_bound"] if subject.low_bound_binds else 0.0, seen["scales_at_high_bound"]
    elif "likelihood_scale" in seen:
        scale = seen["likelihood_scale"]
        shares = float(scale <= low * AT_BOUND and subject.low_bound_binds), float(scale >= high / AT_BOUND)
    else:
        return None
    bound, words = (low, "lower") if shares[0] >= shares[1] else (high, "upper")
    return Finding(
        bad=max(shares) >= SCALES_AT_BOUND,
        good=max(shares) < SCALES_AT_BOUND / CLEARS,
        message=f"{max(shares):.1%} of the likelihood's scales are at their {words} bound, {bound:g}",
    )


def logvar_at_clamp(seen: Figures, subject: Subject) -> Finding:
    """Log-variances at the ends of the range that diffusers allows."""
    share, (low, high) = seen["share_at_clamp"], LOGVAR_RANGE
    return Finding(
        bad=share >= LOGVARS_AT_CLAMP,
        good=share < LOGVARS_AT_CLAMP / CLEARS,
        message=f"{share:.2%} of the posterior log-variances are at the ends of diffusers' clamp, {low:g} and {high:g}",
    )


IN_TRAINING: dict[str, Callable[[Figures, Figures, Subject], Finding | None]] = {
    "collapse": collapse_in_training,
    "dominating_kl": dominating_kl_in_training,
    "target_missed": target_missed,
    "discriminator_won": discriminator_won,
}
"""The rules for the means of two windows of training in a row, by the alarm that they raise: no validation need be near."""
AT_VALIDATION: dict[str, Callable[[Figures, Subject], Finding | None]] = {
    "collapse": collapse_in_validation,
    "dominating_kl": dominating_kl_in_validation,
    "idle_channels": idle_channels,
    "scale_at_bound": scale_at_bound,
    "logvar_at_clamp": logvar_at_clamp,
}
"""The rules for the figures of a validation, by the alarm that they raise."""


def validation_alarms(seen: Figures, subject: Subject) -> list[Alarm]:
    """The alarms that the figures of one validation raise by themselves."""
    found = {name: rule(seen, subject) for name, rule in AT_VALIDATION.items() if subject.judges(name)}
    return [subject.alarm(name, finding.message) for name, finding in found.items() if finding is not None and finding.bad]
