"""What the training commands of both stages do after their checks. Torch-free until they start."""

import importlib
from typing import Any

from autoencoder.runtime.processes import is_main_process
from autoencoder.runtime.run_folder import RunFolder


def start(config: Any, stage: str) -> int:
    """`preflight(config)` or `train(config, run)` of the module `stage`, imported only now; returns the exit code."""
    if config.preflight:
        return int(importlib.import_module(stage).preflight(config))
    # One process owns the folder; the others learn from it where to go on.
    run = RunFolder.open(config.out, config, resume=config.resume) if is_main_process() else None
    try:
        return int(importlib.import_module(stage).train(config, run))
    finally:
        if run is not None:
            run.close()
