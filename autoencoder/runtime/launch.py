"""From a configuration to a finished run, whatever the stage: processes, folder, logs, going on, ending."""

import dataclasses
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn

from autoencoder.runtime.config import CheckpointConfig, LogConfig, OptimizerConfig, TrainConfig, count
from autoencoder.runtime.config_file import dotted, plain
from autoencoder.runtime.device import choose_precision, describe, peak_memory_bytes
from autoencoder.runtime.errors import UsageError
from autoencoder.runtime.loop import Task, Trainer
from autoencoder.runtime.processes import expected_processes
from autoencoder.runtime.run_folder import RunFolder
from autoencoder.runtime.signals import exit_code
from autoencoder.runtime.tracking import MetricsFile, Trackers

M = TypeVar("M", bound=nn.Module)


class RunConfig(Protocol):
    """What the configurations of both stages' trainings have."""

    @property
    def out(self) -> str: ...
    @property
    def preflight(self) -> bool: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def log(self) -> LogConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...


@dataclass(frozen=True)
class Stage(Generic[M]):
    """What a stage gives the training: its task, what to say at the start, and what to do with the final weights."""

    task: Task[M]
    introduction: str
    """Lines about data, network and objective."""
    finish: Callable[[M, dict[str, Any]], None]
    """Export, evaluate, draw, report; every process calls it with the averaged network and what `Averages.report` says of its choice."""


Build = Callable[[Accelerator, Path, bool], Stage[M]]
"""Builds a stage for these processes in this folder; the flag says whether the run starts from its first step."""


UNHELPFUL = ("`broadcast_buffers` is deprecated", "Dynamo detected a call to a `functools.lru_cache`")
"""How warnings begin that libraries give each other, and that a user can do nothing about."""


def build_accelerator(train: TrainConfig) -> Accelerator:
    """Processes, device and precision."""
    for beginning in UNHELPFUL:
        warnings.filterwarnings("ignore", message=re.escape(beginning))
    if train.deterministic:
        # cuBLAS is deterministic only with a fixed workspace, to be set before it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    precision = choose_precision(train.precision, device, "train.precision")
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            # The main process evaluates and exports at the end, while the others wait.
            InitProcessGroupKwargs(timeout=timedelta(hours=12)),
        ],
    )
    if expected_processes() != accelerator.num_processes:
        raise UsageError(
            f"{expected_processes()} processes were launched, but each would train alone. On CPUs launch with ACCELERATE_USE_CPU=true and "
            "`accelerate launch --multi_gpu --num_processes N` or `torchrun --nproc_per_node N`"
        )
    return accelerator


def launch(config: RunConfig, run: RunFolder | None, build: Build[Any], *, trainer_options: dict[str, Any] | None = None) -> int:
    """Train, or go on training, in `run` (the main process's; None elsewhere); returns the exit code."""
    accelerator = build_accelerator(config.train)
    # Where to go on, from the one process that holds the folder.
    start: list[Any] = [None if run is None else (run.finished, run.newest_checkpoint())]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(start)
    finished, newest = start[0]
    if run is not None:
        for note in run.notes:
            print(note, file=sys.stderr)
    if finished:
        accelerator.print(f"{config.out}: finished already; nothing to do")
        return 0

    folder = Path(config.out)
    stage = build(accelerator, folder, newest is None)
    step = 0 if newest is None else json.loads((newest / "state.json").read_text())["step"]
    metrics = trackers = None
    if run is not None:
        metrics = MetricsFile(folder / "metrics.jsonl")
        metrics.cut_back(step)
        trackers = Trackers(config.log.trackers, folder, settings=dotted(plain(config)), resume_step=step)
    trainer = Trainer(
        stage.task,
        accelerator=accelerator,
        folder=folder,
        train=config.train,
        optimizer=config.optimizer,
        log=config.log,
        checkpoint=config.checkpoint,
        metrics=metrics,
        trackers=trackers,
        **(trainer_options or {}),
    )
    if newest is not None:
        trainer.load(newest)
    counted = [(p.numel(), p.requires_grad) for p in stage.task.module.parameters()]
    parameters, trained = sum(n for n, _ in counted), sum(n for n, trains in counted if trains)
    parts = "" if trained == parameters else f" ({trained / 1e6:.2f} M trained, {(parameters - trained) / 1e6:.2f} M frozen)"
    trainer.console.say(
        f"{stage.introduction}\nnetwork: {parameters / 1e6:.2f} M parameters{parts}; {describe(accelerator.device)}, "
        f"{accelerator.num_processes} process(es), precision {accelerator.mixed_precision}"
    )
    try:
        outcome = trainer.fit()
        if outcome == "finished":
            stage.finish(trainer.averages.module, trainer.averages.report())
            if run is not None:
                run.finish({"step": trainer.progress.step, "images": trainer.progress.images})
            if not config.preflight:
                trainer.console.say(f"finished: {folder / 'report.html'}{_counted(stage.task.alarms().standing)}")
        else:
            trainer.console.say(f"stopped ({outcome}) at {trainer.progress.images:,} images with a checkpoint; the same command goes on")
    finally:
        if trackers is not None:
            trackers.close()
    return exit_code(outcome)


def _counted(alarms: Sequence[str]) -> str:
    """`; 2 alarms: collapse, idle_channels`; empty where none stands."""
    return f"; {len(alarms)} alarm{'' if len(alarms) == 1 else 's'}: {', '.join(alarms)}" if alarms else ""


def preflight(config: Any, train: Callable[[Any, RunFolder | None], int], note: str | None = None) -> int:
    """Real steps, validation, checkpoint and export by `train` in a scratch folder; prints memory and expected hours, and `note`."""
    accelerator = build_accelerator(config.train)
    total = count(config.train.images, "train.images")
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        if accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(shared)
        scratch = Path(shared[0])
        short = dataclasses.replace(
            config,
            out=str(scratch),
            train=dataclasses.replace(config.train, images=min(total, 3 * config.train.batch_size)),
            log=dataclasses.replace(config.log, every_images=config.train.batch_size, trackers=[], gradient_norms=False),
        )
        run = RunFolder.open(scratch, short, resume="auto") if accelerator.is_main_process else None
        try:
            code = train(short, run)
        finally:
            if run is not None:
                run.close()
        lines = [json.loads(line) for line in (scratch / "metrics.jsonl").read_text().splitlines()]
        checkpoint = sum(f.stat().st_size for f in scratch.glob("checkpoints/step-*/*"))
        averages = [f.stat().st_size for f in scratch.glob("checkpoints/step-*/ema*.safetensors")]
        # No process may take the folder away while another reads it.
        accelerator.wait_for_everyone()
    rate = [line["images_per_second"] for line in lines if line["phase"] == "train"][-1]
    memory = peak_memory_bytes(accelerator.device)
    kept = f"  averages     {len(averages)} of the weights, {sum(averages) / 2**20:.0f} MiB in every process\n" if averages else ""
    accelerator.print(
        f"preflight: steps, validation, checkpoint and export went through\n"
        f"  memory       {memory / 2**30:.2f} GiB at most in a process ({describe(accelerator.device)})\n"
        f"  speed        {rate:.1f} images/s\n"
        f"  whole run    {total / rate / 3600:.2f} hours of training steps for {total:,} images\n"
        f"{kept}"
        f"  checkpoint   {checkpoint / 2**20:.0f} MiB each, {config.checkpoint.keep} kept" + ("" if note is None else f"\n  {note}")
    )
    return code
