"""The side table of a shard: which crop of which image a row is, and the source's other columns."""

import numpy as np
import pyarrow

from autoencoder.data.sources import WithColumns
from autoencoder.latents.plan import Plan
from autoencoder.latents.segments import PlannedImages
from autoencoder.runtime.errors import ConfigError

OURS = ("row", "image", "view", "name")


class SideTable:
    """Columns `row` (the latents' `id`), `image` (its number in the plan), `view` and `name`, and those that the source carries.

    A column of the source with one of these names becomes `source_NAME`. ConfigError for columns that the source does not have.
    """

    def __init__(self, planned: PlannedImages, columns: list[str] | None, plan: Plan) -> None:
        self._views, self._planned = plan.views, planned
        self._source: WithColumns | None = planned.source if isinstance(planned.source, WithColumns) else None
        self._others: list[str] = []
        if self._source is not None:
            self._others = self._source.others(columns, "data.columns")
        elif columns:
            raise ConfigError("data.columns", columns, "only tables (parquet, WebDataset, hub) have other columns; leave it out")

    def of(self, rows: np.ndarray, images: np.ndarray, names: list[str]) -> pyarrow.Table:
        """The table of these rows, of these images with these names; all (n,)."""
        columns = {
            "row": pyarrow.array(rows, pyarrow.int64()),
            "image": pyarrow.array(images, pyarrow.int64()),
            "view": pyarrow.array(rows % self._views, pyarrow.int32()),
            # Names of files need not be UTF-8, text in tables has to be.
            "name": pyarrow.array([name.encode("utf-8", "replace").decode() for name in names], pyarrow.string()),
        }
        if self._source is not None and self._others:
            places = np.array([self._planned.index(image) for image in images.tolist()], dtype=np.int64)
            carried = self._source.columns(places, self._others)
            for name in self._others:
                columns[f"source_{name}" if name in OURS else name] = carried[name]
        return pyarrow.table(columns)
