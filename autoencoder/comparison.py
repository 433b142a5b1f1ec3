"""One evaluation's JSON against another's: paired differences over the images that both measured."""

from pathlib import Path
from typing import Any

import torch

from autoencoder.account import Measure, check_comparable, paired_difference
from autoencoder.evaluation_file import Report
from autoencoder.runtime.errors import ConfigError


def check(path: str, theirs: Report, *, measure: Measure | None, provenance: dict[str, Any]) -> None:
    """Refuse a comparison that would be of different things: other nats, images, crops or ranges of pixels.

    Args:
        path: what names `theirs`, for the message.
        theirs: the other evaluation, as `open_report` checked it.
        measure: what this evaluation's nats are nats of; None without a likelihood.
        provenance: this evaluation's.

    Raises:
        ConfigError: the two do not compare; the message says in what they differ, and why that matters.
    """
    if measure is None:
        raise ConfigError("compare", path, "this model has no likelihood to compare by; give likelihood.name and likelihood.scale")
    if not theirs.get("measure"):
        raise ConfigError("compare", path, "has no `measure`: it was made without a likelihood, or by an older version; evaluate it anew")
    try:
        other_measure = Measure.from_json(theirs["measure"])
    except ValueError as error:
        raise ConfigError("compare", path, f"{error}; evaluate it anew") from None
    try:
        check_comparable(measure, other_measure)
    except ValueError as error:
        raise ConfigError("compare", path, f"{error}. {_remedy(measure, other_measure)}") from None
    made_on, here = (
        (told["data"]["fingerprint"], told["crops"], told.get("pixels", "8-bit values at full range"))
        for told in (theirs["provenance"], provenance)
    )
    for what, ours, other in zip(("images", "crops", "pixels"), here, made_on, strict=True):
        if ours != other:
            raise ConfigError("compare", path, f"was measured on other {what} ({other} there, {ours} here); evaluate both on the same")


def compare(path: str, ours: Report, theirs: Report) -> Report:
    """Means of paired differences, ours less theirs, with standard errors over images, for what both measured.

    Raises:
        ConfigError: no image in common.
    """
    their_photos = {photo["id"]: photo for photo in theirs["photos"]}
    pairs = [(photo, their_photos[photo["id"]]) for photo in ours["photos"] if photo["id"] in their_photos]
    if not pairs:
        raise ConfigError("compare", path, "has no image in common with this evaluation; evaluate both on the same images")
    differences = {}
    for name, metric in ours["metrics"].items():
        values = [(a.get(name), b.get(name)) for a, b in pairs]
        if any(a is None or b is None for a, b in values):
            continue
        a, b = torch.tensor(values, dtype=torch.float64).unbind(1)
        found = paired_difference(a, b)
        error = found.standard_error if len(pairs) > 1 else None
        differences[name] = {"mean": found.mean, "standard_error": error, "unit": metric["unit"]}
    return {"file": Path(path).name, "model": theirs["provenance"].get("model"), "images": len(pairs), "differences": differences}


def _remedy(ours: Measure, theirs: Measure) -> str:
    """What makes two accounts comparable that are not."""
    if ours.dims != theirs.dims:
        return "Evaluate both on the same crops (data.resolution)"
    if theirs.scale is None:
        how = "Evaluate both with one likelihood.name and one likelihood.scale, fitted on training images"
    else:
        levels = f" --likelihood.levels={theirs.levels}" if theirs.levels else ""
        how = f"Evaluate this model under the other's: --likelihood.name={theirs.likelihood} --likelihood.scale={theirs.scale:g}{levels}"
    return f"{how}; PSNR, SSIM and KL do not depend on it and compare as they are, in the two tables"
