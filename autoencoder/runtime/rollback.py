"""Going back to a checkpoint where training has gone wrong, with a lower learning rate from there on.

A step's images and noise are functions of progress, so that the way from the checkpoint is the same but for its learning rate. What
was done is part of the checkpoint gone back to: a run that is killed afterwards goes on as if it had not been.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autoencoder.runtime import checkpoint as checkpoints
from autoencoder.runtime.files import replace_text


@dataclass(frozen=True)
class Rollback:
    """One return to a checkpoint."""

    step: int
    """Step of the checkpoint."""
    images: int
    """Training images seen there."""
    from_step: int
    """Step of the log line that found values that were not finite."""
    nonfinite: tuple[str, ...]
    """Their names."""
    lr_factor: float
    """What learning rates are multiplied by from here on, all returns so far together."""

    def to_json(self) -> dict[str, Any]:
        """As `from_json` takes it."""
        return {**asdict(self), "nonfinite": list(self.nonfinite)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Rollback":
        """The return that `to_json` wrote."""
        return cls(**{**values, "nonfinite": tuple(values["nonfinite"])})


def newest_sound(folder: Path) -> Path | None:
    """The newest complete checkpoint that no step since its last log line had left out as not finite.

    One that had would lead to the same log line again.
    """
    complete = sorted((marker.parent for marker in folder.glob(f"step-*/{checkpoints.MARKER}")), reverse=True)
    return next((path for path in complete if not json.loads((path / checkpoints.STATE).read_text())["nonfinite"]), None)


def go_back(checkpoint: Path, made: list[Rollback]) -> None:
    """Remove the checkpoints after this one and write the returns `made`, the last of them to it, into its state.

    A run that is killed in between goes on from this checkpoint as it was before, and comes here again.
    """
    for path in sorted(checkpoint.parent.glob(f"step-*/{checkpoints.MARKER}"), reverse=True):
        if path.parent.name > checkpoint.name:
            checkpoints.remove(path.parent)
    state = json.loads((checkpoint / checkpoints.STATE).read_text())
    state["rollbacks"] = [rollback.to_json() for rollback in made]
    replace_text(checkpoint / checkpoints.STATE, json.dumps(state, indent=1, sort_keys=True))
