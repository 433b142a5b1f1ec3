"""Runs whose network goes wrong where a test wants it."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from tests.children import without_pictures


def train(argv: list[str], place: str, position: int, until: int, output: Path | None = None, kill_at: int | None = None) -> None:
    """Run `train_autoencoder`; the module `place` gives infinity for the image at `position` until the run has gone back `until` times.

    `place` may end in `:backward`: then the gradient at the module's output is infinite. With `kill_at`, a process is killed before
    that optimiser step, counted over the whole process.
    """
    from autoencoder import train, training
    from autoencoder.runtime.loop import Trainer
    from autoencoder.task import AutoencoderTask

    torch.set_num_threads(1)
    without_pictures()
    if output is not None:
        sys.stderr = output.open("w")
    now: dict[str, Any] = {"rows": [], "steps": 0}
    name, _, way = place.partition(":")
    build, step, losses = training.build_module, Trainer._step, AutoencoderTask.losses

    def noted_step(self: Any, number: int, batches: Any) -> None:
        now["trainer"] = self
        if now["steps"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        now["steps"] += 1
        step(self, number, batches)

    def noted_losses(self: Any, module: Any, batch: Any, images: int, *, probe: bool = False) -> Any:
        wrong = len(now["trainer"].recovery.rollbacks) < until
        now["rows"] = (batch.position == position).nonzero().flatten().tolist() if wrong else []
        return losses(self, module, batch, images, probe=probe)

    def spoil(value: torch.Tensor, row: int) -> torch.Tensor:
        value = value.clone()
        value[row] = float("inf")
        return value

    def after(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        for row in now["rows"]:
            if way == "backward":
                if output.requires_grad:
                    output.register_hook(lambda gradient, row=row: spoil(gradient, row))
            else:
                output = spoil(output, row)
        return output

    def built(config: Any, vae: Any) -> Any:
        module = build(config, vae)
        module.get_submodule(name).register_forward_hook(after)
        return module

    Trainer._step, AutoencoderTask.losses, training.build_module = noted_step, noted_losses, built  # type: ignore[method-assign]
    sys.exit(train.main(argv))
