"""A source of the user's own: any object with `__len__` and `__getitem__`."""

import hashlib
import json
import operator
from typing import Any

from autoencoder.data.bands import Bands, DecodeError
from autoencoder.data.decode import bands_of, take_image
from autoencoder.data.order import spread
from autoencoder.data.sources import BadImage, Record
from autoencoder.data_config import DataConfig
from autoencoder.pixel_recipe import recipe_of
from autoencoder.runtime.errors import ConfigError, require
from autoencoder.runtime.own_class import OwnClass, build_own, raised

LOOKED = 3
"""Images that opening looks at."""


class OwnSource:
    """The images of an object of the class that `own` names.

    Its `__getitem__(i)` gives an array (H, W) or (H, W, C), a PIL image, or a pair of one of them and a label (an integer, or None); what
    it raises makes that image a bad one. An array is taken as an .npy file of it would be, a PIL image as its file. It may also have:

    - `classes`: class names by label, of each one or a tuple of several;
    - `ids`: a name for each image, instead of its number;
    - `fingerprint`: text that changes with its images, instead of a digest of class path, arguments and length;
    - `in_memory`: true where a look-up costs nothing, so that no loader processes are started.

    Raises:
        ConfigError: a class that cannot be found or constructed, or whose objects are not as above.
    """

    def __init__(self, own: OwnClass, config: DataConfig, key: str) -> None:
        assert own.class_path is not None
        self._images, self._own, self._recipe = build_own(own, key), own, recipe_of(config)
        self._key, self.name = f"{key}.class_path", own.class_path
        self._length = self._counted(own)
        ids = getattr(self._images, "ids", None)
        self._ids = None if ids is None else [str(id) for id in ids]
        self._require(self._ids is None or len(self._ids) == self._length, f"its `ids` are {len(self._ids or [])} of {self._length} images")
        classes = getattr(self._images, "classes", None)
        # Of several names, as torchvision has those of ImageNet.
        several = [name if isinstance(name, tuple) else (name,) for name in classes] if isinstance(classes, (list, tuple)) else [()]
        named = all(names and all(isinstance(name, str) for name in names) for names in several)
        self._require(classes is None or named, "its `classes` are no list of names")
        self.labels: list[str] | None = None if classes is None else [", ".join(names) for names in several]
        self.in_memory = bool(getattr(self._images, "in_memory", False))
        told = {**own.to_json(), "images": self._length}
        known = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        self.fingerprint = str(getattr(self._images, "fingerprint", known))

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Record:
        id = self._id(index)
        image, label = self._item(index, id)
        try:
            taken = take_image(image, self._recipe)
        except DecodeError as error:
            raise BadImage.of(id, error) from error
        return Record(taken.pixels, label, id, taken.valid)

    def bands(self, index: int) -> tuple[Bands, str]:
        """All bands of the image at `index`, as they are, and its name; raises BadImage."""
        id = self._id(index)
        image, _ = self._item(index, id)
        try:
            return bands_of(image), id
        except DecodeError as error:
            raise BadImage.of(id, error) from error

    def look(self) -> None:
        """ConfigError where none of a few images can be had, as then something is wrong with all."""
        looked, names = spread(self._length, LOOKED).tolist(), dict[str, list[str]]()
        for index in looked:
            try:
                self.bands(index)
            except BadImage as error:
                names.setdefault(error.reason, []).append(error.id)
        told = "; ".join(f"{', '.join(ids)} ({reason})" for reason, ids in names.items())
        self._require(sum(map(len, names.values())) < len(looked), f"none of {len(looked)} images can be had: {told}")

    def _counted(self, own: OwnClass) -> int:
        for needed in ("__len__", "__getitem__"):
            self._require(hasattr(self._images, needed), f"its objects have no {needed}; give both __len__ and __getitem__")
        try:
            length = len(self._images)
        except (Exception, SystemExit) as error:
            raise ConfigError(self._key, self.name, f"its __len__ raised {raised(error)}") from error
        self._require(length > 0, f"{own} has no images")
        return length

    def _require(self, condition: bool, finding: str) -> None:
        require(condition, self._key, self.name, finding)

    def _id(self, index: int) -> str:
        return str(index) if self._ids is None else self._ids[index]

    def _item(self, index: int, id: str) -> tuple[Any, int]:
        try:
            item = self._images[int(index)]
        except (Exception, SystemExit) as error:
            raise BadImage(id, raised(error)) from error
        image, label = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
        if label is None:
            return image, -1
        try:
            return image, operator.index(label)
        except TypeError:
            raise BadImage(id, f"its label is a {type(label).__name__}; give an integer or None") from None
