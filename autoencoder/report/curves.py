"""Which scalars are drawn together, and the charts of one or several runs over images seen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoencoder.report import charts
from autoencoder.report.charts import Line
from autoencoder.report.quantities import quantity
from autoencoder.report.runs import Run


@dataclass(frozen=True)
class Key:
    """A legend's entry: a series, its last value, and that of a second series in the same colour."""

    label: str
    last: str
    colour: int
    kind: str
    beside: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart with everything that the page says around it."""

    title: str
    unit: str
    svg: str
    keys: list[Key]
    alt: str


@dataclass(frozen=True)
class Section:
    """Charts under one heading, with a sentence on how to read them."""

    title: str
    note: str
    scalars: tuple[str, ...]
    drawn: tuple[str, ...] = ("train", "validation")
    """Phases whose lines are drawn."""


SECTIONS = (
    Section(
        "Evidence lower bound",
        "ELBO = −NLL − KL at β = 1, in nats an image, whatever is optimised. Training values are means over training crops; validation "
        "values come from the averaged weights on fixed held-out crops. A start that would flatten the rest runs off its chart.",
        ("nll_nats", "kl_nats", "elbo_nats"),
    ),
    Section(
        "What is optimised",
        "The loss with its weights and auxiliary terms, apart from the bound. Losses of runs with different objectives are not comparable.",
        ("loss", "perceptual", "adversarial", "kl_weight"),
    ),
    Section(
        "Reconstruction",
        "Posterior mode, clamped and rounded to 8 bits, mean over held-out crops.",
        ("psnr_db", "ssim", "lpips"),
        ("validation",),
    ),
    Section(
        "Under the hood",
        "Optimiser, throughput and what the model's parts settle on.",
        ("lr", "gradient_norm", "images_per_second", "likelihood_scale", "effective_beta", "active_channels"),
    ),
)

SCHEDULED = ("lr", "kl_weight", "effective_beta")
"""Scalars whose start is as much a part of the recipe as their end."""


def sections(runs: Sequence[Run]) -> list[tuple[Section, list[Chart]]]:
    """Every section that has something to draw, with its charts."""
    drawn = [(section, [c for key in section.scalars if (c := scalar_chart(runs, key, section.drawn))]) for section in SECTIONS]
    trade_off = trade_off_chart(runs)
    if trade_off is not None:
        next(charts for section, charts in drawn if section.title == "Reconstruction").append(trade_off)
    return [(section, found) for section, found in drawn if found]


def scalar_chart(runs: Sequence[Run], key: str, phases: Sequence[str] = ("train", "validation")) -> Chart | None:
    """A scalar over images seen: training thin, validation bold, a colour a run; None where no run has logged it."""
    known = quantity(key)
    lines: list[Line] = []
    keys: list[Key] = []
    for index, run in enumerate(runs):
        drawn = {phase: run.series(phase, key) for phase in phases}
        ends = {phase: known.show(values[-1]) for phase, (_, values) in drawn.items() if values}
        # Alone, training stands back in grey where validation is drawn as well.
        colours = dict.fromkeys(ends, index) | ({"train": charts.SERIES - 1} if len(runs) == 1 and len(ends) > 1 else {})
        lines += [Line(*drawn[phase], colours[phase], "train" if phase == "train" else "validation") for phase in ends]
        if len(runs) == 1:
            keys += [Key(phase, end, colours[phase], phase) for phase, end in ends.items()]
        elif ends:
            phase, end = list(ends.items())[-1]
            keys.append(Key(run.name, end, index, phase, f"train {ends['train']}" if len(ends) > 1 else ""))
    if not lines:
        return None
    svg = charts.curves(lines, name=key, whole=known.digits == 0, cut=key not in SCHEDULED)
    return Chart(known.label, known.unit, svg, keys, _alt(f"{known.label} over images seen", keys, known.unit))


def trade_off_chart(runs: Sequence[Run]) -> Chart | None:
    """PSNR against KL from validation to validation; None where there are none."""
    lines, keys = [], []
    rate, quality = quantity("kl_nats"), quantity("psnr_db")
    for index, run in enumerate(runs):
        points = [
            (line["kl_nats"], line["psnr_db"])
            for line in run.lines
            if line["phase"] == "validation" and all(line.get(k) is not None and math.isfinite(line[k]) for k in ("kl_nats", "psnr_db"))
        ]
        if points:
            lines.append(Line([x for x, _ in points], [y for _, y in points], index, "path"))
            label = "validation" if len(runs) == 1 else run.name
            keys.append(Key(label, f"{quality.show(points[-1][1])} at {rate.show(points[-1][0])}", index, "validation"))
    if not lines:
        return None
    svg = charts.paths(lines, x_label="KL, nats an image", name="trade-off")
    return Chart("PSNR against KL", "dB", svg, keys, _alt("PSNR against KL over the run, ring at its end", keys, ""))


def channel_chart(run: Run, index: int, alone: bool) -> Chart | None:
    """KL of each latent channel from the final evaluation; None before there is one."""
    channels = run.evaluation.get("channels") or []
    if not channels:
        return None
    values = [float(channel["kl_nats"]) for channel in channels]
    active = [bool(channel["active"]) for channel in channels]
    svg = charts.bars(values, active, colour=index, x_label="latent channel", name=f"channels-{index}")
    known = quantity("kl_nats")
    shown = ", ".join(f"{i}: {known.show(v)}{'' if on else ' (inactive)'}" for i, (v, on) in enumerate(zip(values, active, strict=True)))
    title = f"{sum(active)} of {len(active)} channels active"
    return Chart(title if alone else f"{run.name}: {title}", known.unit, svg, [], f"KL of each latent channel, nats an image: {shown}")


def _alt(what: str, keys: Sequence[Key], unit: str) -> str:
    ends = "; ".join(f"{key.label} ends at {key.last}{f' ({key.beside})' if key.beside else ''}" for key in keys)
    return f"{what}{f', {unit}' if unit else ''}: {ends}"
