"""One of several processes that encode a plan together. Torch-free."""

import os
from dataclasses import dataclass

from autoencoder.latents.config import EncodeConfig
from autoencoder.runtime.errors import UsageError
from autoencoder.runtime.processes import expected_processes


@dataclass(frozen=True)
class Worker:
    """Worker `number` of `of`, with nothing in common with the others but the folder."""

    number: int = 0
    of: int = 1
    shared: bool = False
    """Whether others may be at work in the folder."""
    place: int = 0
    """Its number among those of this machine, by which it takes a GPU."""

    @classmethod
    def of_config(cls, config: EncodeConfig) -> "Worker":
        """As configured, or as torchrun or accelerate have launched it; UsageError for both at once."""
        launched = expected_processes()
        if launched == 1:
            return cls() if config.workers is None else cls(config.worker or 0, config.workers, True)
        if config.workers is not None:
            raise UsageError(
                f"workers: got {config.workers} in one of {launched} launched processes, which are workers by themselves; leave "
                "worker and workers out, or start without a launcher"
            )
        if config.only in ("plan", "finalize"):
            raise UsageError(f"only: got '{config.only}' in one of {launched} launched processes; start it without a launcher")
        rank = int(os.environ.get("RANK", "0"))
        return cls(rank, launched, True, int(os.environ.get("LOCAL_RANK", "0")))

    def owns(self, shard: int) -> bool:
        """Whether a shard is its to encode."""
        return shard % self.of == self.number

    @property
    def first(self) -> bool:
        """Whether it speaks for all."""
        return self.number == 0

    def says(self, text: str) -> str:
        """`text` as a line of this worker."""
        return f"worker {self.number} of {self.of}: {text}" if self.of > 1 else text
