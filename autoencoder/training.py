"""Training an autoencoder from its configuration to its exported folder and report."""

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from autoencoder import artifact, model
from autoencoder.config import TrainAutoencoderConfig
from autoencoder.data.sources import open_train_and_validation
from autoencoder.finish import finish
from autoencoder.model import Autoencoder
from autoencoder.objective import effective_beta
from autoencoder.runtime.config import count
from autoencoder.runtime.config_file import dotted, plain
from autoencoder.runtime.device import choose_precision, describe, peak_memory_bytes
from autoencoder.runtime.errors import ConfigError, UsageError
from autoencoder.runtime.loop import Trainer
from autoencoder.runtime.processes import expected_processes
from autoencoder.runtime.run_folder import RunFolder
from autoencoder.runtime.signals import exit_code
from autoencoder.runtime.tracking import MetricsFile, Trackers
from autoencoder.task import AutoencoderTask


def build_accelerator(config: TrainAutoencoderConfig) -> Accelerator:
    """Processes, device and precision."""
    if config.train.deterministic:
        # cuBLAS is deterministic only with a fixed workspace, to be set before it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    precision = choose_precision(config.train.precision, device)
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision", precision, "training in fp16 needs a GPU; give auto, bf16 or fp32")
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
    )
    if expected_processes() != accelerator.num_processes:
        raise UsageError(
            f"{expected_processes()} processes were launched, but each would train alone. On CPUs launch with ACCELERATE_USE_CPU=true and "
            "`accelerate launch --multi_gpu --num_processes N` or `torchrun --nproc_per_node N`"
        )
    return accelerator


def build_module(config: TrainAutoencoderConfig) -> Autoencoder:
    """Network and likelihood scale with their starting values, the same in every process."""
    torch.manual_seed(config.train.seed)
    vae = model.build(config.model, channels=config.data.channels, resolution=config.data.resolution)
    if config.train.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    likelihood = config.objective.likelihood
    module = Autoencoder(vae, torch.tensor(likelihood.value).log() if likelihood.scale == "learned" else None)
    if config.init_from is not None:
        artifact.load_weights(module.vae, config.init_from)
    return module


def train(config: TrainAutoencoderConfig, run: RunFolder | None, *, trainer_options: dict[str, Any] | None = None) -> int:
    """Train, or go on training, in `run` (the main process's; None elsewhere); returns the exit code."""
    accelerator = build_accelerator(config)
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
    train_source, validation_source = open_train_and_validation(config.data)
    module = build_module(config)
    task = AutoencoderTask(config, module, train_source, validation_source, accelerator, folder)
    step = 0 if newest is None else json.loads((newest / "state.json").read_text())["step"]
    metrics = trackers = None
    if run is not None:
        metrics = MetricsFile(folder / "metrics.jsonl")
        metrics.cut_back(step)
        trackers = Trackers(config.log.trackers, folder, settings=dotted(plain(config)), resume_step=step)
    trainer = Trainer(
        task,
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
    trainer.console.say(_introduction(config, accelerator, module, len(train_source), train_source.name, len(validation_source)))
    try:
        outcome = trainer.fit()
        if outcome == "finished":
            finish(task, trainer.averaged, config)
            if run is not None:
                run.finish({"step": trainer.progress.step, "images": trainer.progress.images})
        else:
            trainer.console.say(f"stopped ({outcome}) at {trainer.progress.images:,} images with a checkpoint; the same command goes on")
    finally:
        if trackers is not None:
            trackers.close()
    return exit_code(outcome)


def _introduction(
    config: TrainAutoencoderConfig, accelerator: Accelerator, module: nn.Module, images: int, source: str, held_out: int
) -> str:
    parameters = sum(p.numel() for p in module.parameters())
    typical = {"mean_absolute_error": 0.05, "mean_squared_error": 0.005}
    beta = effective_beta(config.objective, **typical, scale=config.objective.likelihood.value)
    return "\n".join(
        (
            f"data: {images:,} training images from {source}, {held_out:,} held out; crops of {config.data.resolution} pixels",
            f"network: {parameters / 1e6:.2f} M parameters; {describe(accelerator.device)}, "
            f"{accelerator.num_processes} process(es), precision {accelerator.mixed_precision}",
            f"objective: convention {config.objective.convention}, effective beta {beta:.3g} "
            "(at a mean absolute error of 0.05 and a mean squared error of 0.005; the log has it at the measured ones)",
        )
    )


def preflight(config: TrainAutoencoderConfig) -> int:
    """Real steps, validation, checkpoint and export in a scratch folder; prints memory and expected hours."""
    accelerator = build_accelerator(config)
    total = count(config.train.images, "train.images")
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        if accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(shared)
        scratch = Path(shared[0])
        short = dataclasses.replace(
            config,
            out=str(scratch),
            preflight=False,
            train=dataclasses.replace(config.train, images=min(total, 3 * config.train.batch_size)),
            log=dataclasses.replace(config.log, every_images=config.train.batch_size, trackers=[]),
        )
        run = RunFolder.open(scratch, short, resume="auto") if accelerator.is_main_process else None
        try:
            code = train(short, run)
        finally:
            if run is not None:
                run.close()
        lines = [json.loads(line) for line in (scratch / "metrics.jsonl").read_text().splitlines()]
        checkpoint = sum(f.stat().st_size for f in scratch.glob("checkpoints/step-*/*"))
        # No process may take the folder away while another reads it.
        accelerator.wait_for_everyone()
    rate = [line["images_per_second"] for line in lines if line["phase"] == "train"][-1]
    memory = peak_memory_bytes(accelerator.device)
    accelerator.print(
        f"preflight: steps, validation, checkpoint and export went through\n"
        f"  memory       {memory / 2**30:.2f} GiB at most in a process ({describe(accelerator.device)})\n"
        f"  speed        {rate:.1f} images/s\n"
        f"  whole run    {total / rate / 3600:.2f} hours of training steps for {total:,} images\n"
        f"  checkpoint   {checkpoint / 2**20:.0f} MiB each, {config.checkpoint.keep} kept"
    )
    return code
