"""What the training commands of both stages do after their checks. Torch-free until they start."""

import gc
import importlib
from typing import Any

from autoencoder.runtime.errors import UsageError
from autoencoder.runtime.processes import is_main_process
from autoencoder.runtime.run_folder import RunFolder


def start(config: Any, stage: str) -> int:
    """`preflight(config)` or `train(config, run)` of the module `stage`, imported only now; returns the exit code.

    A start that is refused leaves the run's folder as it found it.
    """
    # One process owns the folder; the others learn from it where to go on.
    owns = is_main_process() and not config.preflight
    run = RunFolder.open(config.out, config, resume=config.resume) if owns else None
    try:
        module = importlib.import_module(stage)
        code = int(module.preflight(config) if config.preflight else module.train(config, run))
    except UsageError:
        if run is not None:
            run.withdraw()
        raise
    finally:
        if run is not None:
            run.close()
    _leave_processes()
    return code


def _leave_processes() -> None:
    """Part from the other processes when all are done, and end the group's threads.

    A thread of the group that lets go of a tensor while the interpreter shuts down aborts the process. The group ends them once nothing
    holds it: what training left in reference cycles (the wrapped network, its reducer) has to go first.
    """
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        gc.collect()
        torch.distributed.destroy_process_group()
