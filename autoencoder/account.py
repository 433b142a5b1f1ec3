"""Whether two accounts may be set against each other, and by how much they differ."""

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from autoencoder.likelihood import Likelihood

if TYPE_CHECKING:
    from autoencoder.elbo import ElboTerms


@dataclass(frozen=True)
class Measure:
    """What an account's nats are nats of: accounts that differ in it are figures of different things."""

    likelihood: str
    """Family of p(x|z). One scale for all or one for each value is part of the model, and may differ."""
    support: Literal["levels", "reals"]
    """Where p(x|z) lives: probabilities of levels, or densities over the reals."""
    levels: int | None
    """Levels of a value where the support is levels."""
    dims: int
    """Values of an image, C * H * W."""
    scale: float | None
    """The likelihood's scale where it was chosen; None where it was fitted, which makes it part of the model."""

    @classmethod
    def of(cls, likelihood: Likelihood, dims: int) -> "Measure":
        """The measure of images of `dims` values under `likelihood`."""
        support: Literal["levels", "reals"] = "levels" if likelihood.discrete else "reals"
        return cls(likelihood.name, support, likelihood.levels, dims, likelihood.fixed_scale)

    def to_json(self) -> dict[str, Any]:
        """As `from_json` takes it."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Measure":
        """The measure that `to_json` wrote.

        Raises:
            ValueError: other keys; the message names them.
        """
        names = {field.name for field in fields(cls)}
        if values.keys() != names:
            raise ValueError(f"a measure has the keys {', '.join(sorted(names))}; got {', '.join(sorted(values)) or 'none'}")
        return cls(**values)


WHY = {
    "likelihood": "each family normalises over its own shapes of noise, so that the difference tells of the families, not of the networks",
    "support": "a probability of levels and a density over the reals have different units: a density grows without bound as errors shrink",
    "levels": "finer levels share out the same probability among more values: each dimension costs more nats for the same image",
    "dims": "nats are summed over an image's values; compare images of one size, crops alike",
    "scale": "scales that were chosen, not fitted, set the price of an error, so that the difference tells of the choice; fit both "
    "(in Python, a tensor for a scale counts as fitted, a number as chosen), or choose one",
}
"""Why accounts that differ there are not comparable."""


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences over images in nats, first less second."""

    mean: float
    standard_error: float
    """Standard deviation over images / sqrt(images); not a number for one image."""


@dataclass(frozen=True)
class Comparison:
    """One account less another, image by image."""

    elbo: Difference
    nll: Difference
    kl: Difference


def compare(a: "ElboTerms", b: "ElboTerms") -> Comparison:
    """Paired differences a - b in nats per image of two accounts of the same images.

    Raises:
        ValueError: accounts of different likelihood, support, levels, dimensions or chosen scale, or of other images.
    """
    check_comparable(a.measure, b.measure)
    return Comparison(*(paired_difference(getattr(a, name), getattr(b, name)) for name in ("elbo", "nll", "kl")))


def check_comparable(a: Measure, b: Measure) -> None:
    """Raise `ValueError` where two measures differ, with both values and why that matters."""
    reasons = [
        f"{name}: {_shown(name, getattr(a, name))} against {_shown(name, getattr(b, name))} ({why})"
        for name, why in WHY.items()
        if getattr(a, name) != getattr(b, name)
    ]
    if reasons:
        raise ValueError(f"these accounts cannot be compared. {'; '.join(reasons)}")


def paired_difference(a: Tensor, b: Tensor) -> Difference:
    """Mean and standard error of a - b over images, from values (B,) of the same images in the same order.

    Raises:
        ValueError: no images, or unequal numbers of them.
    """
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"values have shapes {tuple(a.shape)} and {tuple(b.shape)}; give one value an image, of the same images")
    difference = a.detach().double().cpu() - b.detach().double().cpu()
    error = difference.std().item() / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
    return Difference(difference.mean().item(), error)


def _shown(name: str, value: object) -> str:
    missing = "fitted" if name == "scale" else "none"
    return missing if value is None else str(value)
