"""Where a folder of latents is kept: on a disk of this machine, or (`store.py`) behind a URL. Torch-free."""

import os
from pathlib import Path


class Place:
    """A folder that is kept where it is written."""

    def size(self, path: Path) -> int:
        """Bytes of a file as it is kept; OSError where it is not."""
        return os.stat(path).st_size

    def look(self, *paths: Path) -> None:
        """Find out what others have kept of these, as far as the first that is not there."""

    def keep(self, *paths: Path) -> None:
        """Keep these files, which are whole, one after the other; each is there whole when the next one comes."""


HERE = Place()
