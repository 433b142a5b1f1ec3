"""What one autoencoder run optimises, its terms apart, as rows of a table."""

from dataclasses import dataclass

from autoencoder.objective_summary import rows
from autoencoder.report.quantities import quantity
from autoencoder.report.runs import Run

VALUES = {"pixel ELBO": "elbo_nats", "ELBO reported": "elbo_nats", "perceptual": "perceptual", "adversarial": "adversarial",
          "equivariance": "equivariance"}  # fmt: skip
"""The scalar whose last value stands beside a row, by the row's name."""


@dataclass(frozen=True)
class Row:
    """A term or a reading of the objective."""

    name: str
    words: str
    value: str
    """Its value at the end of the run with its unit; empty where it has none."""


def objective_rows(run: Run) -> list[Row]:
    """Pixel ELBO, perceptual and adversarial term, effective beta and equivalent weights; empty before there is an evaluation."""
    told = run.evaluation.get("objective")
    return [] if not told else [Row(name[0].upper() + name[1:], words, _last(run, VALUES.get(name))) for name, words in rows(told)]


def _last(run: Run, key: str | None) -> str:
    if key is None:
        return ""
    known = quantity(key)
    metric = (run.evaluation.get("metrics") or {}).get(key) or {}
    value = metric.get("mean")
    if value is None:
        _, values = run.series("train", key)
        value = values[-1] if values else None
    return "" if value is None else f"{known.show(value)} {known.unit}".strip()
