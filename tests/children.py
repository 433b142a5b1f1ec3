"""Commands in processes of their own, forked from one server that has imported everything once."""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_preloaded: list[str] = []


def preload(*modules: str) -> None:
    """Have the server import these before it forks its first child."""
    _preloaded.extend(modules)
    _context.set_forkserver_preload(_preloaded)


preload("autoencoder.training", "tests.children", "tests.gradients")

SMALL = [
    "--model.preset=tiny", "--model.block_out_channels=[8, 8]", "--model.norm_groups=4", "--data.resolution=16", "--data.workers=0",
    "--train.batch_size=8", "--train.images=160", "--train.ema_halflife_images=40", "--train.precision=fp32", "--log.every_images=8",
    "--log.validate_every_images=80", "--log.trackers=[]", "--checkpoint.every_images=40", "--checkpoint.keep=9",
]  # fmt: skip
"""A run of 20 steps that takes a second."""


def start(target: Callable[..., None], *arguments: Any) -> Any:
    """A child process that runs `target`; join it and read its `exitcode`."""
    process = _context.Process(target=target, args=arguments)
    process.start()
    return process


def kill_in(owner: Any, name: str, call: int | None, number: int = signal.SIGKILL) -> None:
    """Have the process send itself signal `number` when `owner.name` is called for the time `call`, counted from 0; None: never."""
    wrapped, seen = getattr(owner, name), [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        if seen[0] == call:
            os.kill(os.getpid(), number)
        seen[0] += 1
        return wrapped(*arguments, **options)

    setattr(owner, name, counted)


def without_pictures() -> None:
    """Let autoencoder runs end without report page and whole photos, which take longer than they do."""
    from autoencoder import finish

    finish.write_report, finish.PHOTOS = lambda *_: None, 0


def train(argv: list[str], kill_at: int | None = None, output: Path | None = None, pictures: bool = False) -> None:
    """Run `train_autoencoder`; with `kill_at`, by SIGKILL in the middle of that microbatch, counted from this start."""
    import torch

    from autoencoder import train
    from autoencoder.task import AutoencoderTask

    torch.set_num_threads(1)
    if output is not None:
        sys.stderr = output.open("w")
    kill_in(AutoencoderTask, "losses", kill_at)
    if not pictures:
        without_pictures()
    sys.exit(train.main(argv))


def run(argv: list[str], kill_at: int | None = None, output: Path | None = None, pictures: bool = False) -> int:
    """`train` to its end; its exit code, negative for a signal."""
    return wait(start(train, argv, kill_at, output, pictures))


def wait(process: Any) -> int:
    """The exit code of a child, negative for a signal."""
    process.join(120)
    assert process.exitcode is not None, "the child hangs"
    return int(process.exitcode)


def together(processes: int, output: Path, target: Callable[..., None], *arguments: Any) -> None:
    """`target` in so many processes that are one run on CPUs, as torchrun would start them; all end with code 0, or the test fails."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    children = [start(_launched, rank, processes, port, output, target, arguments) for rank in range(processes)]
    left = children
    # One that ends early leaves the others waiting for it.
    while left and not any(child.exitcode for child in children):
        ended = connection.wait([child.sentinel for child in left], timeout=120)
        left = [child for child in left if ended and child.sentinel not in ended]
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert codes == [0] * processes, output.read_text()


def _launched(rank: int, processes: int, port: int, output: Path, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stdout = sys.stderr = output.open("a")
    target(*arguments)
