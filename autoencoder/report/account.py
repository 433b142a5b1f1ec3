"""The account of both stages on the page: the bound by prior, where the learned one saves, and the price of the rate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autoencoder.report import charts
from autoencoder.report.charts import Chart, Key, Line
from autoencoder.report.quantities import number
from autoencoder.report.runs import Run

PRIORS = (("standard_normal", "Standard normal"), ("learned", "Diffusion model"), ("calibrated", "Diffusion model, calibrated"))
"""Priors of an account, and in words."""
PARTS = (("rate_nats", 1), ("total_nats", 1), ("bits_per_dim", 4))
"""Columns of the table after the NLL, with their decimals."""


@dataclass(frozen=True)
class AccountTable:
    """The account of one run."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]
    """A prior and its figures."""
    sentences: list[str]
    warnings: list[str]


def table(run: Run) -> AccountTable | None:
    """The bound by prior, with standard errors over images; None for a run without an account."""
    told = run.account
    if not told:
        return None
    priors = [(told[key], words) for key, words in PRIORS if key in told]
    parts = [(key, digits) for key, digits in PARTS if key in told["standard_normal"]]
    rows = [(words, [_figure(told["nll_nats"], 1), *(_figure(its[key], digits) for key, digits in parts)]) for its, words in priors]
    columns = {"rate_nats": "Rate, nats", "total_nats": f"Bound on {_bounded(told)}, nats", "bits_per_dim": "Bits/dim"}
    return AccountTable(["Prior", "NLL, nats", *(columns[key] for key, _ in parts)], rows, [*_sentences(told)], [*_warnings(run)])


def saved_chart(runs: Sequence[Run]) -> Chart | None:
    """Nats that the learned prior saves at each noise level; None where no run has an account."""
    lines, keys, told = [], [], []
    for index, run in enumerate(runs):
        levels = [(*level["log_snr"], level["saved_nats"]["mean"]) for level in run.account.get("levels") or []]
        if levels:
            # The last level may be narrower than the others.
            points = [((low + high) / 2, saved / (high - low)) for low, high, saved in levels]
            lines.append(Line([x for x, _ in points], [y for _, y in points], index, "validation"))
            most, at = max((y, x) for x, y in points)
            keys.append(Key("most" if len(runs) == 1 else run.name, f"{number(most, 1)} at {number(at, 1)}", index, "validation"))
            listed = ", ".join(f"{number(y, 1)} at {number(x, 1)}" for x, y in points)
            told.append(listed if len(runs) == 1 else f"{run.name}: {listed}")
    if not lines:
        return None
    svg = charts.over(lines, x_label="log SNR (left: noise, right: latents)", name="account-levels")
    return Chart("Saved by noise level", "nats an image and unit of log SNR", svg, keys, f"Nats saved over log SNR: {'; '.join(told)}")


def channel_chart(run: Run, index: int, alone: bool) -> Chart | None:
    """Nats that the learned prior saves in each latent channel, filled where it does; None without an account."""
    values = [float(channel["saved_nats"]["mean"]) for channel in run.account.get("channels") or []]
    if not values:
        return None
    svg = charts.bars(values, [value > 0 for value in values], colour=index, x_label="latent channel", name=f"account-channels-{index}")
    title = "Saved by channel"
    alt = f"Nats saved in each latent channel: {', '.join(f'{i}: {number(value, 1)}' for i, value in enumerate(values))}"
    return Chart(title if alone else f"{run.name}: {title}", "nats an image; hollow: none", svg, [], alt)


def _sentences(told: dict[str, Any]) -> list[str]:
    saved, calibrated = told["saved_nats"], told.get("calibrated_saved_nats")
    found = [
        f"The learned prior saves {_figure(saved, 1)} nats an image{f' (calibrated: {_figure(calibrated, 1)})' if calibrated else ''}, on "
        f"{told['crops']:,} crops of {told['images']:,} images."
    ]
    if price := told.get("price"):
        learned, best, trained = price["learned"], price["best_beta"], price["effective_beta"]
        now = f"; this one was trained at an effective {number(trained, None)}" if trained else ""
        found.append(
            f"At the margin one more nat of the learned rate buys {_ratio(learned)} nats of NLL. To first order the β to train with for "
            f"this total is {_ratio(best)}{now}: a slope at one network, not a search."
        )
    return found


def _warnings(run: Run) -> list[str]:
    known = ((run.evaluation.get("provenance") or {}).get("pipeline") or {}).get("network_hash")
    found = []
    if known is not None and run.account.get("network_hash") != known:
        found.append("account.json is of other weights than this run's pipeline: measure it again.")
    if run.account.get("same_images"):
        found.append("These images are among those encoded for the prior, which it may know by heart.")
    return found


def _bounded(told: dict[str, Any]) -> str:
    if told["labelled"] == told["crops"]:
        return "−log p(x|y)"
    return "−log p(x|y) and −log p(x)" if told["labelled"] else "−log p(x)"


def _figure(told: dict[str, Any], digits: int) -> str:
    error = told.get("standard_error")
    return f"{number(told['mean'], digits)}{'' if error is None else f' ± {number(error, digits)}'}"


def _ratio(told: dict[str, Any]) -> str:
    return f"{number(told['value'], 2)} ± {number(told['standard_error'], 2)}"
