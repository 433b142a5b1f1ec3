"""Checkpoints: one safetensors file an object, `state.json`, written beside, fsynced, renamed, marker last."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoencoder.runtime.errors import UsageError, first_line
from autoencoder.runtime.files import fsync

MARKER = "complete"
STATE = "state.json"


class HasTensors(Protocol):
    """What a checkpoint can hold: named tensors out, the same in."""

    def tensors(self) -> dict[str, Tensor]: ...

    def load_tensors(self, tensors: dict[str, Tensor]) -> None: ...


class ModuleTensors:
    """A module's state dict as named tensors."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def tensors(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.module.load_state_dict(tensors)


def step_folder(step: int) -> str:
    """Name of a step's checkpoint."""
    return f"step-{step:08d}"


def save(folder: Path, objects: dict[str, HasTensors], state: dict[str, Any]) -> None:
    """Write a checkpoint; a crash at any moment leaves either a complete one or one without its marker."""
    beside = folder.with_name(f".{folder.name}.partial")
    for leftover in (beside, folder):
        if leftover.exists():
            shutil.rmtree(leftover)
    beside.mkdir(parents=True)
    for name, held in objects.items():
        tensors = {k: v.detach().to("cpu").contiguous() for k, v in held.tensors().items()}
        save_file(tensors, beside / f"{name}.safetensors")
    (beside / STATE).write_text(json.dumps(state, indent=1, sort_keys=True))
    for path in beside.iterdir():
        fsync(path)
    fsync(beside)
    os.rename(beside, folder)
    (folder / MARKER).touch()
    fsync(folder / MARKER)
    fsync(folder)
    fsync(folder.parent)


def load(folder: Path, objects: dict[str, HasTensors]) -> dict[str, Any]:
    """Read a checkpoint into `objects` and return its state.

    Raises:
        UsageError: a file is missing, damaged or of another shape; the message names it.
    """
    if not (folder / MARKER).is_file():
        raise UsageError(f"{folder}: not a complete checkpoint (no file `{MARKER}`); give a checkpoints/step-* folder that has one")
    for name, held in objects.items():
        path = folder / f"{name}.safetensors"
        try:
            held.load_tensors(load_file(path))
        except Exception as error:  # safetensors and torch raise many kinds, each a damaged or foreign file
            raise UsageError(f"{path}: does not fit this run: {first_line(error)}") from error
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints, and what a crash left of one that was being written."""
    for leftover in folder.glob(".step-*.partial"):
        shutil.rmtree(leftover)
    complete = sorted(p for p in folder.glob("step-*") if (p / MARKER).is_file())
    for path in complete[:-keep]:
        remove(path)


def remove(folder: Path) -> None:
    """Remove a checkpoint, its marker first: a half-removed one must not look complete."""
    (folder / MARKER).unlink()
    shutil.rmtree(folder)
