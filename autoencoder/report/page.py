"""The report: one self-contained HTML page from one or several runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from autoencoder.report import quantities
from autoencoder.report.curves import channel_chart, sections
from autoencoder.report.embed import Picture, embed
from autoencoder.report.quantities import HEADLINES, quantity
from autoencoder.report.runs import Run, flatten, read_runs
from autoencoder.runtime.errors import UsageError
from autoencoder.runtime.files import replace_text

IMAGE_BYTES = 1_300_000
"""Bytes of pictures in a page, before base64 adds a third."""
PHOTO_SHARE = 2
"""A photo's share of them, where a grid's is 1."""
MOST_GRIDS, MOST_PHOTOS = 9, 3
"""Grids (first, last and evenly between) and photos on a page of one run; several runs share them."""
MOST_ROWS = 200
"""Rows of a table of images."""
MEASURES = ("data.source", "data.resolution", "data.channels", "data.resize", "objective.likelihood.name", "objective.likelihood.levels")
"""Runs that differ in one of these are not measured in the same nats."""


@dataclass(frozen=True)
class Figure:
    """A headline figure as it is shown."""

    label: str
    value: str
    unit: str
    detail: str


@dataclass(frozen=True)
class Grid:
    """A grid of held-out crops at one moment of the run."""

    picture: Picture
    images: str
    figures: str


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write the page of the runs in `folders` to `out`, whole or not at all.

    Raises `UsageError` where a folder is no run, a file in it cannot be read, or `out` cannot be written.
    """
    page = render(read_runs(folders))
    try:
        replace_text(out, page)
    except OSError as error:
        raise UsageError(f"out: {out} cannot be written ({error.strerror}); give a file in a folder that takes it") from None


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    source = files("autoencoder.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"plain": quantities.plain, "images_seen": quantities.images_seen, "svg": Markup}
    template = environment.from_string((source / "page.html.jinja").read_text(encoding="utf-8"))
    alone = len(runs) == 1
    views = [_view(run, index, alone) for index, run in enumerate(runs)]
    _add_pictures(views)
    page = template.render(
        style=Markup((source / "page.css").read_text(encoding="utf-8")),
        alone=alone,
        title=runs[0].name if alone else f"{len(runs)} runs",
        runs=views,
        figures=[] if alone else [(figure, [_named(view["headlines"], figure.label) for view in views]) for figure in _all_figures(views)],
        sections=sections(runs),
        differing=[] if alone else differing(runs),
        incomparable=[] if alone else [key for key in MEASURES if len({quantities.plain(r.config.get(key)) for r in runs}) > 1],
    )
    return page.strip() + "\n"


def headlines(run: Run) -> list[Figure]:
    """The figures of the final evaluation, with intervals; before there is one, of the last validation."""
    final: Mapping[str, Any] = run.evaluation.get("metrics") or {}
    validations = [line for line in run.lines if line["phase"] == "validation"]
    last = validations[-1] if validations else {}
    shown = []
    for key in HEADLINES:
        known = quantity(key)
        metric = final.get(key, {})
        if metric.get("mean") is not None:
            bounded = metric.get("low") is not None and metric.get("high") is not None
            detail = f"95%: {known.show(metric['low'])} to {known.show(metric['high'])}" if bounded else "final evaluation"
            shown.append(Figure(known.label, known.show(metric["mean"]), known.unit, detail))
        elif not final and key in last:
            shown.append(Figure(known.label, known.show(last[key]), known.unit, f"validation at {quantities.images_seen(last['images'])}"))
    shown.append(Figure("Images seen", quantities.images_seen(run.images), "", _target(run)))
    shown.append(Figure("Training time", quantities.duration(run.seconds), "", "without validation"))
    return shown


def differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(key, value of each run) for every configuration key that is not the same in all; `out` always differs and is left out."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "out")
    rows = [(key, [quantities.plain(run.config[key]) if key in run.config else "—" for run in runs]) for key in keys]
    return [row for row in rows if len(set(row[1])) > 1]


def _target(run: Run) -> str:
    wanted = run.config.get("train.images")
    return "" if wanted is None else f"of {wanted}" if isinstance(wanted, str) else f"of {quantities.images_seen(wanted)}"


def _all_figures(views: Sequence[dict[str, Any]]) -> list[Figure]:
    """One figure for each label that any run has, the order kept."""
    return list({figure.label: figure for view in views for figure in view["headlines"]}.values())


def _named(figures: Sequence[Figure], label: str) -> Figure | None:
    return next((figure for figure in figures if figure.label == label), None)


def _view(run: Run, index: int, alone: bool) -> dict[str, Any]:
    """What the template shows of one run, pictures aside."""
    photos = run.evaluation.get("photos") or []
    columns = [key for key in (*HEADLINES, "mean_absolute_error") if any(key in photo for photo in photos)]
    updated = datetime.fromtimestamp((run.folder / "metrics.jsonl").stat().st_mtime, UTC)
    return {
        "run": run,
        "index": index,
        "updated": updated.strftime("%Y-%m-%d %H:%M UTC"),
        "headlines": headlines(run),
        "nonfinite": [line for line in run.lines if line.get("nonfinite")],
        "channels": channel_chart(run, index, alone),
        "columns": [quantity(key) for key in columns],
        "rows": [(str(photo.get("id")), [quantity(k).show(photo.get(k)) for k in columns]) for photo in photos[:MOST_ROWS]],
        "rows_left_out": max(0, len(photos) - MOST_ROWS),
        "provenance": flatten(run.evaluation.get("provenance") or {}),
        "bad_images": run.bad_images[:MOST_ROWS],
        "bad_left_out": max(0, len(run.bad_images) - MOST_ROWS),
    }


def _add_pictures(views: Sequence[dict[str, Any]]) -> None:
    """Put `grids` and `photos` into each view; all together keep to `IMAGE_BYTES`."""
    grids = [_spread(view["run"].grids, max(2, MOST_GRIDS // len(views))) for view in views]
    photos = [view["run"].photos[: max(1, MOST_PHOTOS // len(views))] for view in views]
    budget = IMAGE_BYTES // max(1, sum(map(len, grids)) + PHOTO_SHARE * sum(map(len, photos)))
    for view, its_grids, its_photos in zip(views, grids, photos, strict=True):
        view["grids"] = [_grid(view["run"], step, path, budget) for step, path in its_grids]
        view["photos"] = [(path.stem.removeprefix("photo-"), embed(path, PHOTO_SHARE * budget)) for path in its_photos]


def _grid(run: Run, step: int, path: Path, budget: int) -> Grid:
    line = run.validated(step)
    figures = [f"{quantity(k).show(line[k])} {u}" for k, u in (("psnr_db", "dB"), ("kl_nats", "nats")) if k in line]
    return Grid(embed(path, budget), f"{quantities.images_seen(line['images'])} images" if line else f"step {step:,}", ", ".join(figures))


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items: first, last and evenly between."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
