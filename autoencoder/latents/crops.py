"""The crops of a plan, microbatch by microbatch."""

from collections.abc import Sequence

import numpy as np

from autoencoder.data.batch import Batch, Example, stack
from autoencoder.data.sources import BadImage, Record, Source
from autoencoder.data.transforms import mirrored, train_crop, validation_crop
from autoencoder.data_config import DataConfig
from autoencoder.latents.plan import Plan
from autoencoder.pixel_recipe import recipe_of
from autoencoder.runtime.rng import generator

_NO_NOISE = np.empty(0, np.float32)


class CropBatches:
    """Batches by number, each the crops of some of the plan's rows, of one size: `position` is the row, `photo` the image.

    A bad image keeps its places, black and with weight 0: else the microbatch, and with it the last bits of the other rows,
    would depend on it. Rows of an image that follow each other read it once.
    """

    def __init__(self, source: Source, plan: Plan, config: DataConfig, microbatches: Sequence[Sequence[int]]) -> None:
        self._source, self._plan, self._config, self.microbatches = source, plan, config, microbatches
        self._views, self._mirrors, self._seed = plan.views, bool(plan.recipe["mirrors"]), int(plan.recipe["seed"])
        self._recipe = recipe_of(config)
        self._last: tuple[int, Record | BadImage] | None = None

    def __len__(self) -> int:
        return len(self.microbatches)

    def __getitem__(self, number: int) -> Batch:
        return self.of(self.microbatches[number])

    def of(self, rows: Sequence[int]) -> Batch:
        """The crops of these rows."""
        bad: dict[str, str] = {}
        examples = []
        for row in rows:
            image = row // self._views
            read = self._read(image)
            if isinstance(read, BadImage):
                bad[read.id] = read.reason
                height, width = self._plan.size_of_row(row) or (self._config.resolution, self._config.resolution)
                black = np.zeros((height, width, self._config.channels), np.uint8)
                examples.append(Example(black, _NO_NOISE, id=read.id, position=row, photo=image))
            else:
                pixels, valid = self._crop(read, row)
                examples.append(Example(pixels, _NO_NOISE, read.label, read.id, row, image, weight=1.0, valid=valid))
        return stack(examples, list(bad.items()), self._recipe)

    def _read(self, image: int) -> Record | BadImage:
        if self._last is None or self._last[0] != image:
            try:
                self._last = image, self._source.read(image)
            except BadImage as error:
                self._last = image, error
        return self._last[1]

    def _crop(self, record: Record, row: int) -> tuple[np.ndarray, np.ndarray | None]:
        number, mirror = divmod(row, 2) if self._mirrors else (row, 0)
        size = self._plan.size_of_row(row)
        if self._config.crop == "random":
            crop, valid = train_crop(record.pixels, self._config, generator(self._seed, "crop", number), record.valid, size)
        else:
            crop, valid = validation_crop(record.pixels, self._config, 0, record.valid, size)
        return (mirrored(crop), None if valid is None else mirrored(valid)) if mirror else (crop, valid)
