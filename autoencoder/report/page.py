"""The report: one self-contained HTML page from one or several runs, of one stage or of both."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from autoencoder.evaluation_text import gap
from autoencoder.report import account, latents, quantities
from autoencoder.report.alarms import alarms
from autoencoder.report.charts import Chart
from autoencoder.report.curves import sections
from autoencoder.report.figures import Figure, Frechet, compared, differing, fitted_anew, frechet, headlines, incomparable
from autoencoder.report.gallery import Gallery, galleries
from autoencoder.report.objective import objective_rows
from autoencoder.report.quantities import number, quantity
from autoencoder.report.runs import Run, flatten, read_runs
from autoencoder.report.stages import AUTOENCODER, STAGES, Section, Stage
from autoencoder.runtime.files import write_out

MOST_ROWS = 200
"""Rows of a table of images."""
MOST_NAMES = 24
"""Names of classes that are listed."""
GATHERING = ("", "runs")
"""Names of folders that say nothing of the runs in them."""


@dataclass(frozen=True)
class StageView:
    """What the templates show of one stage."""

    stage: Stage
    runs: list[dict[str, Any]]
    alone: bool
    """One run: its figures are tiles, and nothing is compared."""
    figures: list[tuple[Figure, list[Figure | None]]]
    incomparable: list[str]
    fitted_anew: str
    differing: list[tuple[str, list[str]]]
    frechet: Frechet | None
    sections: list[tuple[Section, list[Chart]]]


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write the page of the runs in `folders` to `out`, whole or not at all.

    Raises `UsageError` where a folder is no run, a file in it cannot be read, or `out` cannot be written.
    """
    page = render(read_runs(folders))
    write_out(str(out), page)


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    source = files("autoencoder.report")
    environment = Environment(
        loader=FunctionLoader(lambda name: (source / name).read_text(encoding="utf-8")),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"plain": quantities.plain, "images_seen": quantities.images_seen, "svg": Markup}
    stages = [its for stage in STAGES if (its := [run for run in runs if run.stage is stage])]
    page = environment.get_template("page.html.jinja").render(
        style=Markup((source / "page.css").read_text(encoding="utf-8")),
        title=_title(stages),
        stages=[_stage_view(its, pictures, runs) for its, pictures in zip(stages, galleries(stages), strict=True)],
    )
    return page.strip() + "\n"


def _title(stages: Sequence[Sequence[Run]]) -> str:
    """The only run's name; that of the folder which holds one run of each stage; else how many runs there are."""
    runs = [run for its in stages for run in its]
    if len(runs) == 1:
        return runs[0].name
    parents = {run.folder.parent for run in runs}
    if len(parents) == 1 and len(runs) == len(stages) and (name := parents.pop().name) not in GATHERING:
        return name
    return f"{len(runs)} runs"


def _stage_view(runs: Sequence[Run], pictures: Sequence[Gallery], page: Sequence[Run]) -> StageView:
    """`runs` are those of one stage, `page` all that are shown."""
    alone = len(runs) == 1
    views = [
        _run_view(run, index, alone) | {"pictures": gallery, "encoder": _encoder(run, page)}
        for index, (run, gallery) in enumerate(zip(runs, pictures, strict=True))
    ]
    return StageView(
        stage=runs[0].stage,
        runs=views,
        alone=alone,
        figures=[] if alone else compared(runs),
        incomparable=[] if alone else incomparable(runs),
        fitted_anew=fitted_anew(runs),
        differing=[] if alone else differing(runs),
        frechet=frechet(runs),
        sections=sections(runs),
    )


def _run_view(run: Run, index: int, alone: bool) -> dict[str, Any]:
    """What the templates show of one run, pictures aside."""
    photos = run.evaluation.get("photos") or []
    measured = (*(headline.key for headline in run.stage.headlines), "mean_absolute_error")
    columns = [key for key in measured if any(key in photo for photo in photos)]
    updated = datetime.fromtimestamp((run.folder / "metrics.jsonl").stat().st_mtime, UTC)
    normalisation = zip(run.latents.get("mean") or [], run.latents.get("std") or [], strict=False)
    return {
        "run": run,
        "index": index,
        "updated": updated.strftime("%Y-%m-%d %H:%M UTC"),
        "headlines": headlines(run),
        "nonfinite": [line for line in run.lines if line.get("nonfinite")],
        "drawn": _drawn(run),
        "alarms": alarms(run),
        "objective": objective_rows(run),
        "carried": latents.figures(run),
        "charts": [*latents.drawn(run, index, alone), *([chart] if (chart := account.channel_chart(run, index, alone)) else [])],
        "account": account.table(run),
        "gap": gap(run.evaluation["gap"]) if run.evaluation.get("gap") else "",
        "columns": [quantity(key) for key in columns],
        "rows": [(str(photo.get("id")), [quantity(k).show(photo.get(k)) for k in columns]) for photo in photos[:MOST_ROWS]],
        "rows_left_out": max(0, len(photos) - MOST_ROWS),
        "provenance": flatten(run.evaluation.get("provenance") or {}),
        "latents": {key: value for key, value in run.latents.items() if key not in ("mean", "std", "labels")},
        "normalisation": [(number(mean, 4), number(std, 4)) for mean, std in normalisation],
        "bad_images": run.bad_images[:MOST_ROWS],
        "bad_left_out": max(0, len(run.bad_images) - MOST_ROWS),
    }


def _drawn(run: Run) -> str:
    """How the samples of a diffusion run were drawn, and of which classes; empty for an autoencoder."""
    if run.stage is AUTOENCODER:
        return ""
    names = run.classes
    told = [(f"{run.config[key]}{words}") for key, words in (("sampling.sampler", ""), ("sampling.steps", " steps")) if key in run.config]
    if names and "sampling.guidance" in run.config:
        told.append(f"guidance {run.config['sampling.guidance']}")
        interval = run.config.get("sampling.guidance_interval", [0, 1])
        told += [f"given for t from {interval[0]:g} to {interval[1]:g}"] if list(interval) != [0, 1] else []
    shift = run.config.get("sampling.time_shift", 1)
    told += [f"time shift {shift:g}"] if shift != 1 else []
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    turn = [f"Classes in turn: {', '.join(names[:MOST_NAMES])}{more}."] if names else []
    return " ".join([*([f"Sampler: {', '.join(told)}."] if told else []), *turn])


def _encoder(run: Run, page: Sequence[Run]) -> tuple[bool, str] | None:
    """Whether the latents of a diffusion run are those of an autoencoder on the page, and names; None where that cannot be known."""
    wanted = run.latents.get("encoder_hash")
    hashes = {other.name: (other.evaluation.get("provenance") or {}).get("encoder_hash") for other in page if other.stage is AUTOENCODER}
    if wanted is None or not hashes or None in hashes.values():
        return None
    made = [name for name, its in hashes.items() if its == wanted]
    return bool(made), ", ".join(made or hashes)
