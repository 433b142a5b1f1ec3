"""Line and bar charts and maps as SVG fragments that take their colours from the page's style sheet.

Drawn by matplotlib's own objects, without pyplot's global state. Colours are drawn as stand-ins and
replaced by CSS variables, text stays text: one chart reads in light and in dark, in the page's typeface.
No text from outside enters a chart: names stand in the page's legends.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib import rc_context, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from autoencoder.report.quantities import images_seen, number

SERIES = 8
"""Colours; series beyond them repeat with other dashes."""
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))
INK, RULE = "#fe0100", "#fe0200"
MOST_POINTS = 240
"""Points of a drawn line; a longer series is averaged over stretches of equally many lines of the log."""
MOST_MARKERS = 40
"""A line of more points is drawn without dots."""
MOST_CELLS = 24
"""Cells along a side of a drawn map."""
FAINT = 0.06
"""Opacity of 0 on a map."""
TRANSIENT = 0.1
"""Share of each line that may fall off the value axis: a start far off would flatten all that follows."""


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
class Line:
    """A series: its place on the axes, its colour by number and how it is drawn."""

    x: Sequence[float]
    y: Sequence[float]
    colour: int
    kind: Literal["train", "validation", "path"]


def curves(lines: Sequence[Line], *, name: str, whole: bool = False, cut: bool = True) -> str:
    """Lines over images seen.

    `name` keeps the chart's ids apart from other charts' on the page; `whole` values get whole ticks; without
    `cut` a start far off stays on the chart.
    """
    figure, axes = _axes("images seen")
    for line in lines:
        _draw(axes, line)
    axes.set_xlim(0, 1.015 * max(max(line.x) for line in lines) or 1)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: images_seen(x)))
    axes.set_ylim(*_value_range(lines, TRANSIENT if cut else 0.0))
    if whole:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    return _svg(figure, name)


def paths(lines: Sequence[Line], *, x_label: str, name: str) -> str:
    """Lines through a plane of two values, with a ring where each ends."""
    figure, axes = _axes(x_label)
    for line in lines:
        _draw(axes, line)
        axes.plot(line.x[-1], line.y[-1], "o", markersize=7, markerfacecolor="none", markeredgecolor=_colour(line.colour))
    axes.margins(0.08)
    return _svg(figure, name)


def over(lines: Sequence[Line], *, x_label: str, name: str, x_range: tuple[float, float] | None = None) -> str:
    """Lines over another quantity than images; without `x_range`, over as much of it as they reach."""
    figure, axes = _axes(x_label)
    for line in lines:
        _draw(axes, line)
    low, high = x_range or (min(min(line.x) for line in lines), max(max(line.x) for line in lines))
    axes.set_xlim(low - 0.015 * (high - low), high + 0.015 * (high - low))
    axes.set_ylim(*_value_range(lines, 0.0))
    return _svg(figure, name)


def bars(values: Sequence[float], filled: Sequence[bool], *, colour: int, x_label: str, name: str) -> str:
    """A bar a value, numbered from 0; hollow where not `filled`."""
    figure, axes = _axes(x_label)
    drawn = axes.bar(range(len(values)), values, width=0.72, color=_colour(colour), edgecolor=_colour(colour), linewidth=0.9)
    for bar, full in zip(drawn, filled, strict=True):
        bar.set_fill(full)
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    return _svg(figure, name)


def heat(values: np.ndarray, *, colour: int) -> str:
    """A map (h, w) of values from 0 on, the stronger the colour the higher, beside its scale; larger ones are averaged over blocks."""
    cells = pooled(values, MOST_CELLS)
    high = float(cells.max())
    shares = (cells / high if high > 0 else cells).clip(0, 1)
    height, width = cells.shape
    side = 150 / max(height, width)

    def cell(x: float, y: float, wide: float, high: float, share: float) -> str:
        return f'<rect x="{x:.2f}" y="{y:.2f}" width="{wide:.2f}" height="{high:.2f}" fill-opacity="{FAINT + (1 - FAINT) * share:.2f}"/>'

    drawn = "".join(cell(x * side, y * side, side, side, share) for (y, x), share in np.ndenumerate(shares))
    steps = "".join(cell(0, i * 10, 12, 10, 1 - i / 14) for i in range(15))
    labels = "".join(
        f'<text x="18" y="{y}" style="font-size: 9.5px; fill: var(--chart-ink)">{number(value, None)}</text>'
        for y, value in ((8, high), (150, 0.0))
    )
    fill = f'style="fill: var(--series-{colour % SERIES})" shape-rendering="crispEdges"'
    return (
        f'<svg viewBox="0 0 331 160" aria-hidden="true"><g transform="translate(46 5)" {fill}>{drawn}</g>'
        f'<g transform="translate(212 5)"><g {fill}>{steps}</g>{labels}</g></svg>'
    )


def pooled(values: np.ndarray, most: int) -> np.ndarray:
    """Means of (h, w) over blocks of equal sides, so that at most about `most` of them lie along a side; the last may be smaller."""
    block = -(-max(values.shape) // most)
    for axis in (0, 1):
        starts = np.arange(0, values.shape[axis], block)
        sizes = np.diff(np.append(starts, values.shape[axis]))
        values = np.add.reduceat(values, starts, axis=axis) / np.expand_dims(sizes, 1 - axis)
    return values


def _axes(x_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 2.45))
    axes = figure.add_subplot()
    figure.subplots_adjust(left=0.135, right=0.97, bottom=0.185, top=0.965)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set(color=RULE, linewidth=0.9)
    axes.tick_params(length=0, labelsize=9.5, labelcolor=INK, pad=5)
    axes.set_xlabel(x_label, color=INK, fontsize=9.5, loc="right")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_Plain())
    axes.yaxis.set_major_locator(ticker.MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def _draw(axes: Axes, line: Line) -> None:
    x, y = thin(line.x, line.y)
    (drawn,) = axes.plot(x, y, color=_colour(line.colour), linestyle=DASHES[line.colour // SERIES % len(DASHES)])
    if line.kind == "train":
        drawn.set(linewidth=1.2, alpha=0.7)
    else:
        drawn.set(linewidth=1.7, marker="o", markersize=3.4 if len(x) <= MOST_MARKERS else 0)


def thin(x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Means of x and y over equal stretches, at most `MOST_POINTS` of them; a stretch with a NaN is NaN."""
    points = np.array([x, y], dtype=float)
    length = points.shape[1]
    starts = np.arange(0, length, -(-length // MOST_POINTS))
    means = np.add.reduceat(points, starts, axis=1) / np.diff(np.append(starts, length))
    return means[0], means[1]


def _value_range(lines: Sequence[Line], transient: float) -> tuple[float, float]:
    """Limits that hold every value, with some air; without the transient's where those would take more than half of the axis."""
    thinned = [thin(line.x, line.y) for line in lines]
    every = np.concatenate([y[np.isfinite(y)] for _, y in thinned])
    settled = np.concatenate([y[np.isfinite(y) & (x >= transient * x[-1])] for x, y in thinned])
    if settled.size == 0:
        return 0.0, 1.0
    shown = settled if np.ptp(every) > 2 * np.ptp(settled) > 0 else every
    low, high = float(shown.min()), float(shown.max())
    air = 0.07 * (high - low) or 0.1 * abs(high) or 0.5
    return (max(low - air, 0.0) if low >= 0 else low - air), high + air


class _Plain(ticker.Formatter):
    """Tick labels with thousands separated, a true minus and as many decimals as the ticks' spacing needs."""

    def __call__(self, value: float, position: int | None = None) -> str:
        spacing = min(np.diff(self.locs), default=1.0)
        digits = next((d for d in range(5) if math.isclose(spacing * 10**d, round(spacing * 10**d), rel_tol=1e-6)), None)
        return number(value, digits)


def _colour(index: int) -> str:
    return f"#fe03{index % SERIES:02x}"


def _svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element without ids of its own beyond those that it refers to."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 aria-hidden="true"', svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", svg)
    svg = re.sub(r'"[^"]*"', lambda attribute: re.sub(r"(\d\.\d\d)\d+", r"\1", attribute[0]), svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    svg = svg.replace(INK, "var(--chart-ink)").replace(RULE, "var(--chart-rule)")
    return re.sub(r"#fe03(\d\d)", lambda match: f"var(--series-{int(match[1])})", svg)
