"""An evaluation as text, from its JSON. Torch-free."""

import textwrap
from typing import Any

from autoencoder.objective_summary import lines as objective_lines


def whole(report: dict[str, Any]) -> str:
    """The account first, then what was optimised, alarms, the gap and the comparison, each where there is one."""
    parts = [table(report)]
    if report["bad_images"]:
        parts.append(f"{len(report['bad_images'])} images could not be read and were left out (listed in the JSON)")
    if report["provenance"]["likelihood"] is None:
        parts.append("no likelihood beside this model and none given (likelihood.name, likelihood.scale): NLL and ELBO left out")
    parts.append("\n".join([f"\n{_heading(report['objective'])}", *objective_lines(report["objective"])]))
    parts += [f"\nALARM {a['name']}: {a['message']}\n{_wrapped(a['remedy'])}" for a in report["alarms"]]
    if "gap" in report:
        parts.append("\n" + gap(report["gap"]))
    if "comparison" in report:
        parts.append("\n" + comparison(report["comparison"]))
    return "\n".join(parts)


def table(report: dict[str, Any]) -> str:
    """The figures of an evaluation: mean, interval, unit; then image by image where they are few."""
    lines = [f"{'':22}{'mean':>12}{'spread':>12}{'95% interval':>26}"]
    for name, m in report["metrics"].items():
        mean, spread, low, high = (_number(m[k]) for k in ("mean", "spread", "low", "high"))
        lines.append(f"{name:22}{mean:>12}{spread:>12}{low:>13}{high:>13}  {m['unit']}")
    photos = report["photos"]
    lines.append(
        f"{sum(p['crops'] for p in photos)} crops of {len(photos)} images, spread and interval over images; "
        f"{report['active_channels']} of {len(report['channels'])} latent channels active"
    )
    if len(photos) <= 16:
        lines += [
            f"  {p['id']:40} psnr {_number(p['psnr_db'])} dB  kl {_number(p['kl_nats'])} nats  ssim {_number(p['ssim'])}" for p in photos
        ]
    return "\n".join(lines)


def gap(told: dict[str, Any]) -> str:
    """The gap between ELBO and log p(x) and the verdict on it."""
    k, verdict, refined = told["samples"], told["verdict"], f"q after {told['refine_steps']} steps"
    rows = [
        (f"ELBO, mean of {k} samples", "elbo_nats"),
        (f"IWAE, k = {k}", "iwae_nats"),
        (f"samples that carry it, of {k}", "effective_sample_size"),
    ]
    return "\n".join(
        [
            f"gap to log p(x) on {told['crops']} crops of {told['images']} images: nats, ± standard error over crops",
            f"  {'':32}{'q of the encoder':>24}{refined:>24}",
            *(f"  {name:32}{_with_error(told['encoder'][key]):>24}{_with_error(told['refined'][key]):>24}" for name, key in rows),
            f"  {'amortisation gap':32}{_with_error(told['amortisation_gap_nats']):>24}",
            f"  {'approximation gap, at least':32}{_with_error(told['approximation_gap_nats_at_least']):>24}",
            f"  {'KL':32}{_with_error(told['kl_nats']):>24}",
            _wrapped(f"verdict: {verdict['name']} ({verdict['reason']})"),
            *(_wrapped(f"but: {caveat}") for caveat in verdict["caveats"]),
        ]
    )


def comparison(told: dict[str, Any]) -> str:
    """Paired differences to another evaluation."""
    return "\n".join(
        [
            f"less {told['file']} ({told['model']}), {told['images']} images in both: mean difference ± standard error over images",
            *(f"  {name:22}{_with_error(m, 4):>24}  {m['unit']}" for name, m in told["differences"].items()),
        ]
    )


def _heading(objective: dict[str, Any]) -> str:
    if objective["convention"] is None:
        return "the ELBO as an objective, at the errors measured here"
    return f"objective of the run (convention {objective['convention']}), at the errors measured here"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _with_error(figure: dict[str, float | None], digits: int = 2) -> str:
    return " ± ".join("-" if figure[key] is None else f"{figure[key]:.{digits}f}" for key in ("mean", "standard_error"))


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, initial_indent="  ", subsequent_indent="    ")
