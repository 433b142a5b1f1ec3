"""The account of both stages as text, from its JSON. Torch-free."""

import textwrap
from typing import Any

MOST_LINES = 16
"""Most lines of a table of levels or channels: more are added up, or left to the JSON."""


def section(told: dict[str, Any]) -> str:
    """The account: totals, where the learned prior saves, and the price of the rate."""
    low, high = told["log_snr"]
    labelled, pilot = told["labelled"], told["pilot"]
    bounded = "-log p(x|y)" if labelled == told["crops"] else f"-log p(x|y) ({labelled} crops) and -log p(x)" if labelled else "-log p(x)"
    parts = [
        f"account with {told['pipeline']} as the prior: nats an image, {told['crops']} crops of {told['images']} images",
        _wrapped(
            f"bound on {bounded}, ± standard error over images (that of the estimation alone); {told['draws']} evaluations a crop; log SNR "
            f"from {low:.2f} to {high:.2f} (calibrated: to {told['calibrated_log_snr'][1]:.2f}), chosen on {pilot['rows']} rows of "
            f"{pilot['latents']}"
        ),
    ]
    if told["same_images"]:
        parts.append(_wrapped("but: these images are among those encoded for the prior, which it may know by heart; give held-out ones"))
    rows = [("standard normal", "standard_normal"), ("diffusion model", "learned"), ("the same, calibrated", "calibrated")]
    discrete = "bits_per_dim" in told["learned"]
    parts.append(f"  {'prior':21}{'NLL':>10}{'rate':>25}{'total':>28}{'bits/dim' if discrete else '':>28}".rstrip())
    for name, key in rows:
        its = told[key]
        nll, rate, total = f"{told['nll_nats']['mean']:.1f}", _figure(its["rate_nats"], 1), _figure(its["total_nats"], 1)
        bits = _figure(its["bits_per_dim"], 4) if discrete else ""
        parts.append(f"  {name:21}{nll:>10}{rate:>25}{total:>28}{bits:>28}".rstrip())
    saved = told["saved_nats"]
    parts.append(
        f"  the learned prior saves {_figure(saved, 2)} nats an image (calibrated: {_figure(told['calibrated_saved_nats'], 2)}), of which"
    )
    parts += [_line(f"log SNR {a:6.2f} to {b:6.2f}", entry) for a, b, entry in _levels(told["levels"])]
    parts.append(_line("beyond these ends", told["ends"]))
    if len(told["channels"]) <= MOST_LINES:
        parts += [_line(f"channel {c}", entry) for c, entry in enumerate(told["channels"])]
    if "price" in told:
        parts += [_wrapped(line) for line in _price(told["price"])]
    if "ode" in told:
        its = told["ode"]
        parts.append(
            _wrapped(
                f"probability-flow ODE on {its['rows']} crops: -log p(z) {its['nats']:.2f} (trace ± {_number(its['trace_error'], 2)}), the "
                f"bound {its['bound_less_ode_nats']:+.2f} ± {_number(its['standard_error'], 2)} from it; {its['evaluations']} evaluations"
            )
        )
    return "\n".join(parts)


def _levels(levels: list[dict[str, Any]]) -> list[tuple[float, float, dict[str, Any]]]:
    """Levels added up until they are few: standard errors are left out of sums, for levels of one image go together."""
    together = -(-len(levels) // MOST_LINES)
    found = []
    for first in range(0, len(levels), together):
        part = levels[first : first + together]
        sums = {key: {"mean": sum(entry[key]["mean"] for entry in part)} for key in ("normal_nats", "saved_nats")}
        summed = part[0] if together == 1 else sums
        found.append((part[0]["log_snr"][0], part[-1]["log_snr"][1], summed))
    return found


def _line(name: str, entry: dict[str, Any]) -> str:
    saved = entry["saved_nats"]
    error = f" ± {_number(saved['standard_error'], 2)}" if "standard_error" in saved else ""
    return f"    {name:26}{saved['mean']:>12.2f}{error:10} of {entry['normal_nats']['mean']:.2f}"


def _price(told: dict[str, Any]) -> list[str]:
    learned, best, trained = told["learned"], told["best_beta"], told["effective_beta"]
    # Below 0 a wider posterior raises the rate as well.
    value = learned["value"]
    less, above = ("less", "above 1") if value > 1 else ("less", "below 0") if value < 0 else ("more", "below 1")
    lines = [
        f"price of the rate: at the margin one more nat of the learned rate buys {_ratio(learned)} nats of NLL ({above}: {less} noise in "
        f"the posterior would lower the total); one more nat of KL to the standard normal buys {_ratio(told['standard_normal'])}"
    ]
    now = f", where this one was trained at an effective {trained:.3g}" if trained else ""
    lines.append(
        f"a nat of KL costs {_ratio(best)} nats of the learned rate: to first order the beta to train with for this total{now}; "
        "a slope at one network, not a search (docs/account.md)"
    )
    return lines


def _ratio(ratio: dict[str, Any]) -> str:
    return f"{ratio['value']:.3f} ± {_number(ratio['standard_error'], 3)}"


def _figure(estimate: dict[str, Any], digits: int) -> str:
    return f"{estimate['mean']:.{digits}f} ± {_number(estimate['standard_error'], digits)} ({_number(estimate['monte_carlo'], digits)})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, initial_indent="  ", subsequent_indent="    ")
