"""The charts of one or several runs of a stage."""

import math
from collections.abc import Callable, Sequence

from autoencoder.report import charts
from autoencoder.report.account import saved_chart
from autoencoder.report.charts import Chart, Key, Line
from autoencoder.report.quantities import number, quantity
from autoencoder.report.runs import Run
from autoencoder.report.stages import Section

SCHEDULED = ("lr", "kl_weight", "effective_beta")
"""Scalars whose start is as much a part of the recipe as their end."""


def sections(runs: Sequence[Run]) -> list[tuple[Section, list[Chart]]]:
    """Every section of the stage of `runs` that has something to draw, with its charts; the runs are all of one stage."""
    drawn = []
    for section in runs[0].stage.sections:
        found = [scalar_chart(runs, key, section.drawn) for key in section.scalars]
        found += [ENDINGS[name](runs) for name in section.endings]
        drawn.append((section, [chart for chart in found if chart is not None]))
    told = any(run.evaluation.get("channels") or any(line.get("raised") for line in run.lines) for run in runs)
    return [(section, found) for section, found in drawn if found or (section.own == "latents" and told)]


def scalar_chart(runs: Sequence[Run], key: str, phases: Sequence[str] = ("train", "validation")) -> Chart | None:
    """A scalar over images seen: training thin, validation bold, a colour a run; None where no run has logged it."""
    stage = runs[0].stage
    known = stage.quantity(key)
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
    svg = charts.curves(lines, name=f"{stage.key}-{key}", whole=known.digits == 0, cut=key not in SCHEDULED)
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


def noise_level_chart(runs: Sequence[Run]) -> Chart | None:
    """The loss at each time of the final evaluation; None before there is one."""
    lines, keys, told = [], [], []
    known = runs[0].stage.quantity("loss")
    for index, run in enumerate(runs):
        levels = sorted((level["t"], level["loss"]) for level in run.evaluation.get("noise_levels") or [] if level.get("loss") is not None)
        if levels:
            lines.append(Line([t for t, _ in levels], [loss for _, loss in levels], index, "validation"))
            least, t = min((loss, t) for t, loss in levels)
            label = "least" if len(runs) == 1 else run.name
            keys.append(Key(label, f"{known.show(least)} at t = {number(t, 2)}", index, "validation"))
            points = ", ".join(f"{known.show(loss)} at {number(t, 2)}" for t, loss in levels)
            told.append(points if len(runs) == 1 else f"{run.name}: {points}")
    if not lines:
        return None
    svg = charts.over(lines, x_label="t (0: latents, 1: noise)", name="noise-levels", x_range=(0, 1))
    return Chart("Loss by noise level", known.unit, svg, keys, f"Loss over t at the end of the run: {'; '.join(told)}")


def averages_chart(runs: Sequence[Run]) -> Chart | None:
    """The validation loss of each moving average at the end of the run, over its length; None where there are not several."""
    lines, keys, told = [], [], []
    known = runs[0].stage.quantity("loss")
    for index, run in enumerate(runs):
        losses = (run.evaluation.get("averages") or {}).get("losses") or {}
        of = sorted((float(name.removeprefix("ema-")), loss) for name, loss in losses.items() if loss is not None and math.isfinite(loss))
        if of:
            lines.append(Line([length for length, _ in of], [loss for _, loss in of], index, "validation"))
            chosen = str(run.evaluation["averages"]["chosen"])
            label = "in use" if len(runs) == 1 else run.name
            keys.append(Key(label, f"{known.show(losses[chosen])} at {chosen.removeprefix('ema-')}", index, "validation"))
            points = ", ".join(f"{known.show(loss)} at {length:.3f}" for length, loss in of)
            told.append(points if len(runs) == 1 else f"{run.name}: {points}")
    if not lines:
        return None
    most = 1.035 * max(max(line.x) for line in lines)
    label = "length (standard deviation, share of the run)"
    svg = charts.over(lines, x_label=label, name=f"{runs[0].stage.key}-averages", x_range=(0, most))
    title = "Validation loss by length of the moving average"
    return Chart(title, known.unit, svg, keys, f"{title}, at the end of the run: {'; '.join(told)}")


ENDINGS: dict[str, Callable[[Sequence[Run]], Chart | None]] = {
    "trade-off": trade_off_chart,
    "noise levels": noise_level_chart,
    "averages": averages_chart,
    "account": saved_chart,
}
"""Charts that close a section, by the name that the section gives."""


def _alt(what: str, keys: Sequence[Key], unit: str) -> str:
    ends = "; ".join(f"{key.label} ends at {key.last}{f' ({key.beside})' if key.beside else ''}" for key in keys)
    return f"{what}{f', {unit}' if unit else ''}: {ends}"
