"""What the latents of one autoencoder run carry: figures, bars of channels and a map of sites, from its final evaluation."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from autoencoder.report import charts
from autoencoder.report.charts import Chart, Key, Line
from autoencoder.report.quantities import number, quantity
from autoencoder.report.runs import Run

MOST_NAMED = 64
"""Channels whose KL the alternative text of their chart lists."""


def figures(run: Run) -> list[tuple[str, str]]:
    """(words, value) of what the latents carry; empty before there is an evaluation."""
    told = run.evaluation
    channels, metrics = told.get("channels") or [], told.get("metrics") or {}
    counts = (("Active channels", "active_channels", len(channels)), ("Active sites", "active_sites", told.get("sites")),
              ("Active units", "active_units", told.get("units")))  # fmt: skip
    shown = [(words, f"{told[key]:,} of {of:,}") for words, key, of in counts if told.get(key) is not None and of]
    shares = (("Posterior variances near the prior's (above 0.9)", "share_near_prior"), ("Log-variances at the clamp", "share_at_clamp"))
    shown += [(words, _percent(told[key])) for words, key in shares if told.get(key) is not None]
    if told.get("shuffled_nll_nats") is not None and told.get("shuffled_delta_nats") is not None:
        nll, delta = told["shuffled_nll_nats"], told["shuffled_delta_nats"]
        sign = "+" if delta >= 0 else ""
        shown.append(("NLL with latents of another image, nats", f"{number(nll, 1)} ({sign}{number(delta, 1)})"))
    for words, key in (("Scales at the lower bound", "scales_at_low_bound"), ("Scales at the upper bound", "scales_at_high_bound")):
        share = (metrics.get(key) or {}).get("mean")
        shown += [(words, _percent(share))] if share is not None else []
    return [*shown, *_diffusability(told.get("diffusability") or {}), *_headroom(told.get("headroom"))]


def _diffusability(told: dict[str, Any]) -> list[tuple[str, str]]:
    errors = (("Equivariance error of the decoder (0: none)", "decoder_error"), ("Equivariance error of the encoder", "encoder_error"))
    shown = [(words, number(told[key], 3)) for words, key in errors if told.get(key) is not None]
    if told.get("spectrum"):
        latents, images = (told["spectrum"][name]["octaves"][0]["share"] for name in ("latents", "images"))
        shown.append(("Energy above half of Nyquist (images at the latents' size)", f"{_percent(latents)} ({_percent(images)})"))
    return shown


def _headroom(told: dict[str, Any] | None) -> list[tuple[str, str]]:
    if not told:
        return []
    verdict = "force_upcast true" if told["force_upcast"] else "force_upcast false"
    return [("fp16 headroom of activations", f"{number(told['factor'], None)}× at {told['layers'][0]['name']}; {verdict}")]


def drawn(run: Run, index: int, alone: bool) -> list[Chart]:
    """KL by channel and by site, and the spectrum; empty before there is an evaluation."""
    found = (channel_chart(run, index, alone), site_chart(run, index, alone), spectrum_chart(run, index, alone))
    return [chart for chart in found if chart is not None]


def spectrum_chart(run: Run, index: int, alone: bool) -> Chart | None:
    """Power of latents and of images by frequency, in dB; None where it was not measured or there is a single frequency."""
    spectra = (run.evaluation.get("diffusability") or {}).get("spectrum") or {}
    lines, keys, ends = [], [], []
    for name, colour, kind in (("latents", index, "validation"), ("images", charts.SERIES - 1, "train")):
        rings = [ring for ring in (spectra.get(name) or {}).get("radial") or [] if ring["power"] > 0]
        if len(rings) < 2:
            return None
        levels = [10 * math.log10(ring["power"]) for ring in rings]
        lines.append(Line([ring["frequency"] for ring in rings], levels, colour, "validation" if kind == "validation" else "train"))
        keys.append(Key(name, number(levels[-1], 1), colour, kind))
        ends.append(f"{name} from {number(levels[0], 1)} to {number(levels[-1], 1)} dB")
    svg = charts.over(lines, x_label="frequency (1: a wave of two sites)", name=f"spectrum-{index}", x_range=(0, 1))
    title = "Spectrum" if alone else f"{run.name}: Spectrum"
    return Chart(title, "dB, 0: white noise; images at the latents' size", svg, keys, f"Power by frequency: {'; '.join(ends)}")


def channel_chart(run: Run, index: int, alone: bool) -> Chart | None:
    """KL of each latent channel; None before there is an evaluation."""
    channels = run.evaluation.get("channels") or []
    if not channels:
        return None
    values = [float(channel["kl_nats"]) for channel in channels]
    active = [bool(channel["active"]) for channel in channels]
    svg = charts.bars(values, active, colour=index, x_label="latent channel", name=f"channels-{index}")
    known = quantity("kl_nats")
    each = [f"{i}: {known.show(v)}{'' if on else ' (inactive)'}" for i, (v, on) in enumerate(zip(values, active, strict=True))]
    left_out = f" and {len(each) - MOST_NAMED} more" if len(each) > MOST_NAMED else ""
    title, filled = "KL by channel", f"filled: active ({sum(active)} of {len(active)})"
    alt = f"KL of each latent channel, nats an image: {', '.join(each[:MOST_NAMED])}{left_out}"
    return Chart(title if alone else f"{run.name}: {title}", f"{known.unit}; {filled}", svg, [], alt)


def site_chart(run: Run, index: int, alone: bool) -> Chart | None:
    """KL of each site of the latent map; None where there is no map."""
    sites = _grid(run.evaluation.get("site_kl_nats"))
    if sites is None:
        return None
    height, width = sites.shape
    svg = charts.heat(sites, colour=index)
    title = "KL by site" if alone else f"{run.name}: KL by site"
    alt = (
        f"KL of each of {height} by {width} sites, nats an image: from {number(float(sites.min()), None)} to "
        f"{number(float(sites.max()), None)}, mean {number(float(sites.mean()), None)}"
    )
    return Chart(title, "nats an image", svg, [], alt)


def _grid(values: Any) -> np.ndarray | None:
    """A map (h, w) of more than one site, or None."""
    if not isinstance(values, Sequence) or not values or not isinstance(values[0], Sequence):
        return None
    sites = np.asarray(values, dtype=float)
    return sites if sites.ndim == 2 and sites.size > 1 and np.isfinite(sites).all() else None


def _percent(share: float) -> str:
    return f"{number(100 * share, 2 if 0 < share < 0.1 else 0)}%"
