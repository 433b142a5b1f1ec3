"""The pictures of all runs of a page, within one budget of bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoencoder.report import quantities
from autoencoder.report.embed import Picture, embed
from autoencoder.report.runs import Run

IMAGE_BYTES = 1_300_000
"""Bytes of pictures in a page, before base64 adds a third."""
WIDE_SHARE = 2
"""A photo's share of them and that of nearest neighbours, where a grid's is 1."""
MOST_GRIDS, MOST_PHOTOS = 9, 3
"""Grids (first, last and evenly between) and photos of a stage with one run; several runs of a stage share them."""


@dataclass(frozen=True)
class Grid:
    """What a validation drew: crops or samples at one moment of the run."""

    picture: Picture
    images: str
    figures: str


@dataclass
class Gallery:
    """The pictures of one run."""

    grids: list[Grid] = field(default_factory=list)
    photos: list[tuple[str, Picture]] = field(default_factory=list)
    """(name, picture)."""
    neighbours: Picture | None = None


def galleries(stages: Sequence[Sequence[Run]]) -> list[list[Gallery]]:
    """The gallery of each run of each stage; all together keep to about `IMAGE_BYTES`.

    Raises `UsageError` for a file that is no PNG picture.
    """
    chosen = [(run, *_chosen(run, len(runs))) for runs in stages for run in runs]
    wanted = {path: share for _, grids, photos, still in chosen for path, share in _shares(grids, photos, still)}
    allowed = budgets([path.stat().st_size for path in wanted], list(wanted.values()), IMAGE_BYTES)
    pictures = {path: embed(path, budget) for path, budget in zip(wanted, allowed, strict=True)}
    filled = iter(
        Gallery(
            [Grid(pictures[path], *_moment(run, step)) for step, path in grids],
            [(path.stem.removeprefix("photo-"), pictures[path]) for path in photos],
            pictures[still] if still else None,
        )
        for run, grids, photos, still in chosen
    )
    return [[next(filled) for _ in runs] for runs in stages]


def budgets(sizes: Sequence[int], shares: Sequence[int], total: int) -> list[int]:
    """Bytes that each file may take of `total`: its share of them, and of what smaller files leave over."""
    allowed = list(sizes)
    open_ = list(range(len(sizes)))
    while open_:
        unit = total / sum(shares[i] for i in open_)
        larger = [i for i in open_ if sizes[i] > unit * shares[i]]
        if len(larger) == len(open_):
            for i in larger:
                allowed[i] = int(unit * shares[i])
            break
        total -= sum(sizes[i] for i in open_ if i not in larger)
        open_ = larger
    return allowed


def _chosen(run: Run, runs: int) -> tuple[list[tuple[int, Path]], list[Path], Path | None]:
    return _spread(run.grids, max(2, MOST_GRIDS // runs)), run.photos[: max(1, MOST_PHOTOS // runs)], run.neighbours


def _shares(grids: Sequence[tuple[int, Path]], photos: Sequence[Path], still: Path | None) -> list[tuple[Path, int]]:
    return [(path, 1) for _, path in grids] + [(path, WIDE_SHARE) for path in (*photos, still) if path]


def _moment(run: Run, step: int) -> tuple[str, str]:
    """When the grid of `step` was drawn, and the figures of its validation."""
    line = run.validated(step)
    figures = [words.format(run.stage.quantity(key).show(line[key])) for key, words in run.stage.grid_figures if key in line]
    return f"{quantities.images_seen(line['images'])} images" if line else f"step {step:,}", ", ".join(figures)


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items: first, last and evenly between."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
