"""What a measured gap asks for, in words: a flow posterior (or a larger one), a larger encoder, neither, or better measuring."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from autoencoder.gap import Gap

SIGNIFICANT = 2.0
"""A gap within this many standard errors of zero is small."""
SMALL_SHARE = 0.01
"""So is one below this share of the KL: closing it would shorten the latents' code by less than a hundredth."""
RISING_SHARE = 0.1
"""Refining had not come to its end where the ELBO still rose by more than this share of what it had won."""
DEGENERATE_SHARE = 0.1
"""Where fewer of the k samples than this share carry IWAE_k, or fewer than two, log p(x) may lie far above it."""
FEWEST_CROPS = 8
"""Fewer leave the standard error itself unknown by more than a quarter, 1 / sqrt(2 (n - 1)), so that nothing is judged by it."""
FEWEST_SAMPLES = 20
"""Of fewer, and degenerate, nothing is concluded about what refining leaves of the gap."""
LARGE_KL = 100.0
"""Above so many nats degenerate weights are to be expected: the spread of ln w grows with the latents that it is a sum over."""

Name = Literal["flow posterior", "larger flow", "larger encoder", "neither", "undecided"]


@dataclass(frozen=True)
class Mean:
    """A mean over images and its standard error."""

    mean: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.standard_error:.2f}"


@dataclass(frozen=True)
class Verdict:
    """What would raise the ELBO."""

    name: Name
    """`flow posterior`, or `larger flow` where q is one already: the approximation gap dominates; `larger encoder`: the amortisation
    gap; `neither`: both are small; `undecided`: what was not measured well enough could overturn each of these."""
    reason: str
    """The comparison behind it."""
    caveats: list[str]
    """Why it may not hold."""


def mean_over_images(values: Tensor) -> Mean:
    """Mean of values (N,) and its standard error, std / sqrt(N).

    Raises:
        ValueError: fewer than two images.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} image; give at least 2, as a standard error needs them")
    values = values.double()
    return Mean(values.mean().item(), values.std().item() / math.sqrt(len(values)))


def judge(gap: Gap, *, flow: bool = False) -> Verdict:
    """The verdict on a gap of at least two images; `flow` tells that q is a flow posterior already.

    The rule: a part of the gap is small where its mean is below `SIGNIFICANT` standard errors or below `SMALL_SHARE` of the mean KL.
    Both small: neither. Else the larger part decides. It is undecided where that could be overturned: with fewer than `FEWEST_CROPS`
    images; by an ELBO that still rises as refining ends, which makes the amortisation gap larger (`larger encoder` stands); by
    degenerate weights, which hide some of the approximation gap (`flow posterior` stands, and of `FEWEST_SAMPLES` or more
    samples `larger encoder`, which is then said as far as these samples tell).
    """
    amortisation, approximation, kl = (mean_over_images(v) for v in (gap.amortisation, gap.approximation, gap.kl))
    sizes = f"amortisation gap {amortisation} nats, approximation gap at least {approximation} nats"
    rising, degenerate = _still_rising(gap), _degenerate(gap)
    name: Name
    if all(part.mean <= max(SIGNIFICANT * part.standard_error, SMALL_SHARE * kl.mean) for part in (amortisation, approximation)):
        name, said = (
            "neither",
            f"both are small: within {SIGNIFICANT:g} standard errors of 0, or below {SMALL_SHARE:.0%} of the KL of {kl.mean:.1f}",
        )
    elif approximation.mean > amortisation.mean:
        name, said = "flow posterior", "most of the gap is left when q is refined image by image; only a richer family of q closes that"
        if flow:
            name = "larger flow"
            said = f"{said}: experimental.flow_couplings, experimental.flow_width"
    else:
        name, said = "larger encoder", "refining q image by image wins back most of the gap found; an encoder that comes nearer would, too"
        if degenerate:
            said = f"as far as these samples tell, {said}"
    doubts = []
    if len(gap.kl) < FEWEST_CROPS:
        doubts.append(f"{len(gap.kl)} crops are too few for a standard error to go by; measure on {FEWEST_CROPS} or more")
    if rising and name != "larger encoder":
        doubts.append("the amortisation gap may be larger; give more gap.refine_steps")
    if degenerate and (name == "neither" or (name == "larger encoder" and gap.samples < FEWEST_SAMPLES)):
        doubts.append("the approximation gap may be far larger; give more gap.samples")
    if doubts:
        name, said = "undecided", "; ".join(doubts)
    return Verdict(name, f"{sizes}: {said}", _caveats(gap, rising=rising, degenerate=degenerate))


def report(gap: Gap, *, refine_steps: int, flow: bool = False) -> dict[str, Any]:
    """Means with standard errors over images, in nats, and the verdict, for JSON; `flow` as of `judge`."""

    def figures(values: Tensor) -> dict[str, float]:
        return asdict(mean_over_images(values))

    return {
        "crops": len(gap.kl),
        "samples": gap.samples,
        "refine_steps": refine_steps,
        **{
            who: {
                "elbo_nats": figures(bounds.elbo),
                "iwae_nats": figures(bounds.iwae),
                "effective_sample_size": figures(bounds.effective_sample_size),
            }
            for who, bounds in (("encoder", gap.encoder), ("refined", gap.refined))
        },
        "amortisation_gap_nats": figures(gap.amortisation),
        "approximation_gap_nats_at_least": figures(gap.approximation),
        "kl_nats": figures(gap.kl),
        "still_rising_nats": figures(gap.rising),
        "verdict": asdict(judge(gap, flow=flow)),
    }


def _still_rising(gap: Gap) -> bool:
    """Whether the ELBO rose as refining ended, by more than noise and by more than it may without a word."""
    rising, won = mean_over_images(gap.rising), gap.amortisation.mean().item()
    return rising.mean > max(SIGNIFICANT * rising.standard_error, SMALL_SHARE * gap.kl.mean().item(), RISING_SHARE * won)


def _degenerate(gap: Gap) -> bool:
    """Whether hardly any of the samples carries IWAE_k."""
    return gap.refined.effective_sample_size.mean().item() < max(2.0, DEGENERATE_SHARE * gap.samples)


def _caveats(gap: Gap, *, rising: bool, degenerate: bool) -> list[str]:
    caveats = []
    if degenerate:
        usual = ", as they do at large KL" if gap.kl.mean().item() >= LARGE_KL else ""
        caveats.append(
            f"an effective sample size of {gap.refined.effective_sample_size.mean().item():.1f} of {gap.samples}: the importance weights "
            f"degenerate{usual}, so that log p(x) and with it the approximation gap may lie far above what was found"
        )
    if rising:
        caveats.append(
            f"the ELBO still rose by {gap.rising.mean().item():.2f} nats at the end of refining: more steps may find a larger "
            "amortisation gap"
        )
    return caveats
