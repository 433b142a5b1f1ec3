"""Pictures inside the page, as data URIs within a budget of bytes."""

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from autoencoder.runtime.errors import UsageError

JPEG = {"quality": 92, "subsampling": 0}
SMALLEST_SIDE = 256
"""Pictures whose longer side is below this are not shrunk for the budget's sake."""


@dataclass(frozen=True)
class Picture:
    """A picture to put into an `<img>`."""

    uri: str
    width: int
    height: int
    exact: bool
    """The run's own file; otherwise compressed as JPEG, and shrunk where that was not enough."""


def embed(path: Path, budget: int) -> Picture:
    """The PNG file in at most about `budget` bytes: as it is where that fits, else as JPEG, shrunk until it does.

    Raises `UsageError` where the file is not a PNG picture.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as file:
            image = file.convert("L" if file.mode in ("1", "L") else "RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UsageError(f"{path}: not a PNG picture that can be read ({error}); remove it or leave this run out") from None
    if len(data) <= budget:
        return _picture(data, "png", image, exact=True)
    whole, scale = image, 1.0
    while len(data := _jpeg(image)) > budget and max(image.size) >= SMALLEST_SIDE:
        scale *= 0.95 * math.sqrt(budget / len(data))
        image = whole.resize((max(1, round(whole.width * scale)), max(1, round(whole.height * scale))), Image.Resampling.LANCZOS)
    return _picture(data, "jpeg", image, exact=False)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", **JPEG)
    return buffer.getvalue()


def _picture(data: bytes, format: str, image: Image.Image, *, exact: bool) -> Picture:
    return Picture(f"data:image/{format};base64,{base64.b64encode(data).decode()}", image.width, image.height, exact)
