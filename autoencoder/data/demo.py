"""The demo's photos: the colour photos that ship in scikit-image's wheel."""

import importlib.util
import os

from autoencoder.data.decode import Decoded, Misfit, decode_image
from autoencoder.data.index.opening import fingerprint
from autoencoder.data.sources import BadImage, Record
from autoencoder.data_config import DataConfig
from autoencoder.pixel_recipe import recipe_of
from autoencoder.runtime.errors import UsageError

# Both views of the motorcycle stay on one side: they show the same scene.
TRAIN = ("astronaut.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg")
VALIDATION = ("chelsea.png", "coffee.png", "rocket.jpg")


class DemoSource:
    """Six photos to train on or three held out, decoded once; the label is the photo, among those of its split."""

    in_memory = True

    def __init__(self, split: str, config: DataConfig) -> None:
        self._files = files = [os.path.join(_folder(), name) for name in (TRAIN if split == "train" else VALIDATION)]
        for file in files:
            if not os.path.exists(file):
                raise UsageError(
                    f"the demo's photo {file} is missing; install scikit-image again (`pip install --force-reinstall scikit-image`)"
                )
        self.name = f"demo ({split})"
        self._ids = [os.path.splitext(os.path.basename(file))[0] for file in files]
        self.labels: list[str] | None = sorted(self._ids)
        self._images = [_decoded(file, config) for file in files]
        self.fingerprint = fingerprint((id, os.path.getsize(file)) for id, file in zip(self._ids, files, strict=True))

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, index: int) -> Record:
        assert self.labels is not None
        image = self._images[index]
        if isinstance(image, Misfit):
            raise BadImage.of(self._ids[index], image)
        return Record(image.pixels, self.labels.index(self._ids[index]), self._ids[index], image.valid)

    def encoded(self, index: int) -> tuple[str, str]:
        return self._files[index], self._ids[index]


def _decoded(file: str, config: DataConfig) -> Decoded | Misfit:
    try:
        return decode_image(file, recipe_of(config))
    except Misfit as error:
        return error


def _folder() -> str:
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise UsageError(
            "data.source: `demo` needs scikit-image, which is not installed; `pip install scikit-image` or give another source"
        )
    return os.path.join(os.path.dirname(package.origin), "data")
