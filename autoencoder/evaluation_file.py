"""An evaluation as a file: what `evaluate_autoencoder --out` or a finished run wrote, opened and checked. Torch-free."""

import json
from pathlib import Path
from typing import Any

from autoencoder.runtime.errors import ConfigError, first_line

Report = dict[str, Any]

_REMEDY = "give what `--out` of `evaluate_autoencoder` wrote, or a finished run"


def open_report(path: str, key: str) -> Report:
    """The evaluation in the file, or of the run, that `path` names.

    Raises:
        ConfigError: under `key`: no such file, none of `evaluate_autoencoder`'s, or one with parts missing.
    """
    file = Path(path) / "evaluation.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        what = "is a folder without an evaluation.json" if Path(path).is_dir() else "no such file"
        raise ConfigError(key, path, f"{what}; {_REMEDY}")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(key, path, f"cannot be read as JSON ({first_line(error)}); {_REMEDY}") from None
    if not isinstance(report, dict) or not {"metrics", "photos", "provenance"} <= report.keys():
        raise ConfigError(key, path, f"is no evaluation; {_REMEDY}")
    if not _is_whole(report):
        raise ConfigError(key, path, f"is no whole evaluation; {_REMEDY}")
    return report


def _is_whole(report: Report) -> bool:
    """Whether there is all that a comparison takes."""
    provenance, photos, measure = report["provenance"], report["photos"], report.get("measure")
    return (
        isinstance(provenance, dict)
        and "crops" in provenance
        and isinstance(provenance.get("data"), dict)
        and "fingerprint" in provenance["data"]
        and isinstance(report["metrics"], dict)
        and isinstance(photos, list)
        and all(isinstance(photo, dict) and "id" in photo for photo in photos)
        and (measure is None or isinstance(measure, dict))
    )
