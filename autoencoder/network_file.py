"""What a run that starts from other weights keeps of their network: with it, the run depends on nothing but its own folder."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autoencoder.model import AutoencoderKL
from autoencoder.runtime.files import replace_text

FILE = "network.json"


@dataclass(frozen=True)
class NetworkFile:
    """The network as training starts."""

    config: dict[str, Any]
    """As `AutoencoderKL(**config)` takes it; with a frozen encoder, with the scaling factor that stays."""
    pixels: dict[str, Any] | None
    """The pixel recipe that stays with a frozen encoder; None where the run's own images set it."""
    hub: str | None = None
    """The repository of the hub that the weights came from; None for those of a file here."""

    def build(self) -> AutoencoderKL:
        """The network, with weights that are yet to be loaded."""
        return AutoencoderKL(**self.config).eval()

    def save(self, run: Path) -> None:
        """Write the file into a run's folder."""
        replace_text(run / FILE, json.dumps(asdict(self), indent=1, sort_keys=True))


def load_network_file(run: Path) -> NetworkFile | None:
    """What the run in this folder keeps; None for one that started from fresh weights."""
    file = run / FILE
    return NetworkFile(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
