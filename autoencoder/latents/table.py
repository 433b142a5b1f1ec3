"""The side table of a shard: which crop of which image a row is, and the source's other columns."""

import numpy as np
import pyarrow
from datasets import Dataset

from autoencoder.data.table import TableSource
from autoencoder.latents.plan import Plan
from autoencoder.latents.segments import PlannedImages
from autoencoder.runtime.errors import ConfigError

OURS = ("row", "image", "view", "name")


class SideTable:
    """Columns `row` (the latents' `id`), `image` (its number in the plan), `view` and `name`, and those that the source carries.

    A column of the source with one of these names becomes `source_NAME`. ConfigError for columns that the source does not have.
    """

    def __init__(self, planned: PlannedImages, columns: list[str] | None, plan: Plan) -> None:
        self._views, self._planned, source = plan.views, planned, planned.source
        self._others: Dataset | None = None
        if isinstance(source, TableSource):
            self._others = source.others(columns, "data.columns").with_format("arrow")
        elif columns:
            raise ConfigError("data.columns", columns, "only tables (parquet, WebDataset, hub) have other columns; leave it out")

    def of(self, rows: np.ndarray, images: np.ndarray, names: list[str]) -> pyarrow.Table:
        """The table of these rows, of these images with these names; all (n,)."""
        columns = {
            "row": pyarrow.array(rows, pyarrow.int64()),
            "image": pyarrow.array(images, pyarrow.int64()),
            "view": pyarrow.array(rows % self._views, pyarrow.int32()),
            "name": pyarrow.array(names, pyarrow.string()),
        }
        if self._others is not None and self._others.column_names:
            wanted, place = np.unique(images, return_inverse=True)
            carried = self._others[[self._planned.index(image) for image in wanted.tolist()]].take(place)
            for name in carried.column_names:
                columns[f"source_{name}" if name in OURS else name] = carried[name]
        # Without the source's schema metadata, where `datasets` keeps what it thinks of the columns that are not here.
        return pyarrow.table(columns)
