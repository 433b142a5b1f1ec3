"""Figures of one run, and of several runs of a stage against each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoencoder.report import quantities
from autoencoder.report.quantities import number, quantity
from autoencoder.report.runs import Run
from autoencoder.report.stages import Headline

FRECHET = (("frechet", "Samples"), ("frechet_floor", "Training rows (floor)"), ("frechet_untrained", "Untrained network"))
"""Figures of the evaluation on the same scale, and what each is the distance of."""


@dataclass(frozen=True)
class Figure:
    """A headline figure as it is shown."""

    label: str
    value: str
    unit: str
    detail: str


@dataclass(frozen=True)
class Frechet:
    """The Fréchet distances of a stage's runs."""

    runs: list[int]
    """Places, among the stage's runs, of those that have some."""
    rows: list[tuple[str, list[str]]]
    """What the distance is of, and its value in each of these runs."""
    sentences: list[str]
    """What was compared, led by names where it is not the same in all of them."""


def headlines(run: Run) -> list[Figure]:
    """The figures of the final evaluation, with intervals; before there is one, of the last validation."""
    final = _final(run)
    validations = [line for line in run.lines if line["phase"] == "validation"]
    last = validations[-1] if validations else {}
    shown = []
    for headline in run.stage.headlines:
        known = run.stage.quantity(headline.key)
        label, value = headline.label or known.label, _mean(final, headline.key)
        if value is not None:
            shown.append(Figure(label, known.show(value), known.unit, _detail(run, headline)))
        elif not final and headline.key in last:
            shown.append(
                Figure(label, known.show(last[headline.key]), known.unit, f"validation at {quantities.images_seen(last['images'])}")
            )
    shown.append(Figure("Images seen", quantities.images_seen(run.images), "", _target(run)))
    shown.append(Figure("Training time", quantities.duration(run.seconds), "", "without validation"))
    return shown


def compared(runs: Sequence[Run]) -> list[tuple[Figure, list[Figure | None]]]:
    """One figure for each label that any run has, the order kept, with the figures of that label of all runs."""
    each = [{figure.label: figure for figure in headlines(run)} for run in runs]
    every = {label: figure for figures in each for label, figure in figures.items()}
    return [(figure, [figures.get(label) for figures in each]) for label, figure in every.items()]


def frechet(runs: Sequence[Run]) -> Frechet | None:
    """Distances of the final evaluations; None where no run has one."""
    measured = {index: _final(run) for index, run in enumerate(runs) if _mean(_final(run), "frechet") is not None}
    if not measured:
        return None
    rows = [(words, [quantity("frechet").show(_mean(final, key)) for final in measured.values()]) for key, words in FRECHET]
    names: dict[str, list[str]] = {}
    for index in measured:
        if told := runs[index].evaluation.get("frechet_on"):
            names.setdefault(str(told), []).append(runs[index].name)
    sentences = list(names) if len(names) < 2 else [f"{', '.join(its)}: {told}" for told, its in names.items()]
    return Frechet(list(measured), rows, sentences)


def differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(key, value of each run) for every configuration key that is not the same in all; `out` always differs and is left out."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "out")
    rows = [(key, [quantities.plain(run.config[key]) if key in run.config else "—" for run in runs]) for key in keys]
    return [row for row in rows if len(set(row[1])) > 1]


def incomparable(runs: Sequence[Run]) -> list[str]:
    """What figures of these runs of one stage do not measure the same, a sentence each with the keys in which the runs differ."""
    told = [run.config | {f"latents.{key}": value for key, value in run.latents.items()} for run in runs]
    sentences = []
    for what, keys in runs[0].stage.measures.items():
        differ = [key for key in keys if len({_part(values, key) for values in told}) > 1]
        sentences += [f"{what}: they differ in {', '.join(differ)}."] if differ else []
    return sentences


def _part(config: Mapping[str, Any], key: str) -> tuple[tuple[str, str], ...]:
    """A setting, or all of a group, as it can be compared; null is what a setting is that is not there."""
    given = ((name, value) for name, value in config.items() if value is not None)
    return tuple(sorted((name, quantities.plain(value)) for name, value in given if name == key or name.startswith(f"{key}.")))


def fitted_anew(runs: Sequence[Run]) -> str:
    """Why final NLL and ELBO are not the charts' last, where a scale was fitted at the end; empty where none was."""
    fitted = [
        run.name
        for run in runs
        if run.config.get("objective.likelihood.scale") == "analytic" and _mean(_final(run), "nll_nats") is not None
    ]
    if not fitted:
        return ""
    whose = "" if len(runs) == 1 else f" of {', '.join(fitted)}"
    return (
        f"The likelihood's scale{whose} was fitted once more at the end of the run, to the exported weights: NLL and ELBO of the headline "
        "figures are at that scale, those of the charts at the scale of their moment."
    )


def _final(run: Run) -> Mapping[str, Any]:
    return run.evaluation.get("metrics") or {}


def _mean(final: Mapping[str, Any], key: str) -> float | None:
    return (final.get(key) or {}).get("mean")


def _detail(run: Run, headline: Headline) -> str:
    final, known = _final(run), run.stage.quantity(headline.key)
    metric = final[headline.key]
    if metric.get("low") is not None and metric.get("high") is not None:
        return f"95%: {known.show(metric['low'])} to {known.show(metric['high'])}"
    scale = [(words, value) for words, key in headline.beside if (value := _mean(final, key)) is not None]
    return ", ".join(f"{words} {number(value, known.digits)}" for words, value in scale) or "final evaluation"


def _target(run: Run) -> str:
    wanted = run.config.get("train.images")
    return "" if wanted is None else f"of {wanted}" if isinstance(wanted, str) else f"of {quantities.images_seen(wanted)}"
