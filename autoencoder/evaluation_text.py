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
    if "diffusability" in report:
        parts.append("\n" + diffusability(report["diffusability"]))
    if "headroom" in report:
        parts.append("\n" + headroom(report["headroom"]))
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


def diffusability(told: dict[str, Any]) -> str:
    """Equivariance errors by transformation, and spectra by octave."""
    lines = [
        f"equivariance on {told['crops']} crops: relative errors, 0 is equivariant, 1 as far off as a plain colour",
        f"  {'':32}{'D(tau z), tau D(z)':>22}{'E(tau x), tau E(x)':>22}{'PSNR of D(tau z), dB':>24}",
    ]
    for its in told["transformations"]:
        name = f"scale {its['scale']:.4g}" + (f", turned by {its['degrees']} degrees" if its["degrees"] else "")
        lines.append(f"  {name:32}{_number(its['decoder_error']):>22}{_number(its['encoder_error']):>22}{_number(its['psnr_db']):>24}")
    lines.append(f"  {'mean':32}{_number(told['decoder_error']):>22}{_number(told['encoder_error']):>22}")
    if told["spectrum"] is not None:
        lines.append("spectrum: share of the energy by frequency (1: two sites a wave), of latents and of images at the latents' size")
        for of_latents, of_images in zip(*(told["spectrum"][name]["octaves"] for name in ("latents", "images")), strict=True):
            above = of_latents["above"]
            band = f"above {above:g}" if above == 0.5 else f"{above:g} to {2 * above:g}"
            lines.append(f"  {band:32}{of_latents['share']:>22.4f}{of_images['share']:>22.4f}")
    return "\n".join(lines)


def headroom(told: dict[str, Any]) -> str:
    """Largest activations against where fp16 ends, and what follows for `force_upcast`."""
    if told["factor"] < 1:
        verdict = "fp16 overflows on these images: force_upcast true"
    elif told["force_upcast"]:
        verdict = "fp16 may overflow on others: force_upcast true"
    else:
        verdict = "enough for fp16: force_upcast false"
    return "\n".join(
        [
            f"fp16 headroom on {told['crops']} crops: {told['factor']:.3g} times, {told['enough']:g} times are enough; {verdict}",
            *(f"  {layer['name']:52}{_activation(layer['largest']):>12} of 65,504" for layer in told["layers"]),
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


def _activation(value: float | None) -> str:
    return "not finite" if value is None else f"{value:,.4g}"


def _with_error(figure: dict[str, float | None], digits: int = 2) -> str:
    return " ± ".join("-" if figure[key] is None else f"{figure[key]:.{digits}f}" for key in ("mean", "standard_error"))


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, initial_indent="  ", subsequent_indent="    ")
