"""What a run does about values that are not finite: stop, go on, or go back to a checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoder.runtime import checkpoint as checkpoints
from autoencoder.runtime.config import TrainConfig
from autoencoder.runtime.console import Console
from autoencoder.runtime.errors import TrainingError
from autoencoder.runtime.meters import LossScale
from autoencoder.runtime.nonfinite import BadSteps, Culprit
from autoencoder.runtime.rollback import Rollback, go_back, newest_sound
from autoencoder.runtime.tracking import MetricsFile


class Recovery:
    """Answers log lines that found values which are not finite, the same in every process.

    Args:
        find: runs a step's images through the network once more and says where this process's left the finite numbers.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        accelerator: Accelerator,
        folder: Path,
        loss_scale: LossScale,
        console: Console,
        metrics: MetricsFile | None,
        find: Callable[[int], Culprit | None],
    ) -> None:
        self.config, self.accelerator, self.folder = config, accelerator, folder / "checkpoints"
        self.loss_scale, self.console, self.metrics, self.find = loss_scale, console, metrics, find
        self.rollbacks: list[Rollback] = []
        self._bad_steps = BadSteps(accelerator.device)

    @property
    def lr_factor(self) -> float:
        """What returns to checkpoints have left of the learning rates."""
        return self.rollbacks[-1].lr_factor if self.rollbacks else 1.0

    def note(self, step: int, found_inf: Tensor) -> None:
        """Take note of a step, without waiting for the device."""
        self._bad_steps.add(step, found_inf)

    def unanswered(self, nonfinite: list[str]) -> list[str]:
        """Those names that the loss scale of fp16 does not answer by itself: overflowing gradients, until it has fallen below 1."""
        overflowed = self.loss_scale.enabled and nonfinite == ["gradient_norm"] and self.loss_scale.value.item() >= 1
        return [] if overflowed else nonfinite

    def answer(self, nonfinite: list[str], step: int) -> Path | None:
        """A checkpoint to go back to after a log line at `step` that found these names, or None to go on.

        Raises:
            TrainingError: the run is to stop, or there is nothing to go back to.
        """
        found = f"non-finite {', '.join(nonfinite)} in the steps up to {step}{self._blame(step)}"
        if self.config.on_nonfinite == "skip":
            self.console.say(f"{found}; no update was made from them")
            return None
        if self.config.on_nonfinite == "rollback" and len(self.rollbacks) < self.config.rollbacks:
            return self._go_back(nonfinite, step, found)
        times = len(self.rollbacks)
        tried = f", after {times} return{'s' if times > 1 else ''} to a checkpoint (train.rollbacks)" if times else ""
        raise TrainingError(
            f"{found}; no update was made from them, and the newest checkpoint is sound{tried}. Try train.precision=fp32, a lower "
            "optimizer.lr, a lower optimizer.clip_norm, or train.on_nonfinite=skip or rollback"
        )

    def _blame(self, now: int) -> str:
        """Where the last step that was not finite left the finite numbers, as part of a sentence."""
        step = self._bad_steps.last()
        if step is None:
            return ""
        own = self.find(step)
        culprits = [own]
        if self.accelerator.num_processes > 1:
            culprits = [None] * self.accelerator.num_processes
            torch.distributed.all_gather_object(culprits, own)
        first = next((culprit for culprit in culprits if culprit is not None), None)
        if first is not None:
            return f", in step {step + 1} {first}"
        moved = now - 1 - step
        later = f", {moved} step{'s' if moved > 1 else ''} later" if moved else ""
        return f", the last of them step {step + 1}, whose passes through the network are finite with the weights of now{later}"

    def _go_back(self, nonfinite: list[str], step: int, found: str) -> Path:
        chosen: list[Path | None] = [None]
        if self.accelerator.is_main_process:
            chosen = [newest_sound(self.folder)]
            if chosen[0] is not None:
                state = json.loads((chosen[0] / checkpoints.STATE).read_text())
                lr_factor = self.lr_factor * self.config.rollback_lr
                rollback = Rollback(state["step"], state["images"], step, tuple(nonfinite), lr_factor)
                go_back(chosen[0], [*self.rollbacks, rollback])
                if self.metrics is not None:
                    self.metrics.cut_back(rollback.step)
                self.console.say(f"{found}; back to {rollback.images:,} images, learning rates times {lr_factor:g} from there on")
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(chosen)
        if chosen[0] is None:
            raise TrainingError(
                f"{found}; no checkpoint is left from before them to go back to. Give a larger checkpoint.keep, a longer "
                "checkpoint.every_images, or a shorter log.every_images: the log is where they are found"
            )
        # Nothing of the abandoned way is to be looked for.
        self._bad_steps = BadSteps(self.accelerator.device)
        return chosen[0]

    def state(self, pending: list[str]) -> dict[str, Any]:
        """For a checkpoint's `state.json`: returns so far, and what was not finite since the last log line."""
        return {"rollbacks": [rollback.to_json() for rollback in self.rollbacks], "nonfinite": self.unanswered(pending)}

    def load_state(self, state: dict[str, Any], step: int) -> None:
        """Take back what `state` gave in a checkpoint of `step`, and log the returns to it."""
        self.rollbacks = [Rollback.from_json(rollback) for rollback in state["rollbacks"]]
        if self.metrics is not None:
            for rollback in self.rollbacks:
                if rollback.step == step:
                    self.metrics.append({"phase": "rollback", **rollback.to_json()})
