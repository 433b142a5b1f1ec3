"""`train_diffusion` in processes of their own, forked from the server of `tests.children`."""

import sys
from pathlib import Path

import pytest

from tests.children import kill_in, preload, start, wait

preload("diffusion.training", "tests.diffusion_children")

SMALL_DIFFUSION = [
    "--denoiser.preset=tiny", "--denoiser.layers=2", "--denoiser.heads=2", "--denoiser.head_dim=16", "--sampling.steps=2",
    "--sampling.evaluate=4", "--data.workers=0", "--train.batch_size=8", "--train.images=96", "--train.ema_halflife_images=40",
    "--train.ema_lengths=null",     "--train.precision=fp32", "--optimizer.lr=2e-3", "--optimizer.warmup_images=16", "--log.every_images=8",
    "--log.validate_every_images=32", "--log.grid_images=4", "--log.trackers=[]", "--checkpoint.every_images=24", "--checkpoint.keep=9",
]  # fmt: skip
"""A run of 12 steps that takes a second; it wants `--latents` and `--out`."""
LENGTHS = ("--train.ema_halflife_images=null", "--train.ema_lengths=[0.05, 0.2]")
"""Two moving averages in place of its one."""


def without_gate() -> None:
    """Let pipelines pass that stock code has not sampled, which takes seconds: for runs that are about something else."""
    from diffusion import pipeline

    pipeline.gate = lambda *_: 0.0  # type: ignore[assignment]


def without_report() -> None:
    """Let runs end without a report page, whose charts take longer than they do."""
    from diffusion import finish

    finish.write_report = lambda *_: None


def train(argv: list[str], kill: tuple[str | int, ...] | None, output: Path | None, whole: bool) -> None:
    """Run `train_diffusion`; `kill` is a method of the task, its call counted from this start, and a signal if not SIGKILL.

    `whole` has the pipeline sampled by stock code at the end, and a report page.
    """
    import torch

    from diffusion import train
    from diffusion.task import DiffusionTask

    torch.set_num_threads(1)
    if output is not None:
        sys.stdout = sys.stderr = output.open("w")
    if kill is not None:
        kill_in(DiffusionTask, *kill)  # type: ignore[arg-type]
    if not whole:
        without_gate()
        without_report()
    sys.exit(train.main(argv))


def run(argv: list[str], *, kill: tuple[str | int, ...] | None = None, output: Path | None = None, whole: bool = False) -> int:
    """`train` to its end; its exit code, negative for a signal."""
    return wait(start(train, argv, kill, output, whole))


def begin(latents: Path, folder: Path) -> Path:
    """A run that was killed after a checkpoint."""
    assert run([*SMALL_DIFFUSION, "--latents", str(latents), "--out", str(folder)], kill=("losses", 7)) < 0
    return folder


def refusal(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """What a start that ends with exit code 2 says: one message, after the introduction where training has begun."""
    from diffusion import train as command

    capsys.readouterr()
    assert command.main([*SMALL_DIFFUSION, *argv]) == 2
    introduction, error, rest = capsys.readouterr().err.partition("error: ")
    message, before = error + rest.rstrip("\n"), introduction.splitlines()
    assert error and "error: " not in rest and "Traceback" not in rest
    assert [line.split(":")[0] for line in before] in ([], ["latents", "process", "network"])
    return message


def gradients(processes: int, out: Path, argv: list[str]) -> None:
    """`tests.gradients` of `train_diffusion`."""
    from tests import gradients

    without_gate()
    sys.exit(gradients.main(processes, out, ["train_diffusion", *argv]))
