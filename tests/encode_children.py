"""What the tests of `encode_dataset` share: a small model, photos, and the command in processes that may be killed."""

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from autoencoder import artifact, encode
from autoencoder.config import DataConfig, ModelConfig
from autoencoder.likelihood import build_likelihood
from autoencoder.model import AutoencoderKL, build
from tests import children

children.preload("autoencoder.latents.encoding", "autoencoder.data.folder", "tests.encode_children")

SIDE = 16


def small_model(folder: Path, seed: int = 0, channels: int = 3) -> AutoencoderKL:
    """A network with random weights for crops of 16 pixels, saved with its recipe: latents are 4 x 8 x 8."""
    torch.manual_seed(seed)
    config = ModelConfig(preset="tiny", block_out_channels=(8, 8), norm_groups=4)
    vae = build(config, channels=channels, resolution=SIDE)
    recipe = artifact.preprocessing(DataConfig(resolution=SIDE, channels=channels), 256)
    artifact.save_autoencoder(vae, folder, preprocessing=recipe, likelihood=build_likelihood("laplace", 0.1, 256))
    return vae.eval()


def photos(folder: Path, names: list[str], seed: int = 0) -> list[np.ndarray]:
    """Random photos of 24 x 20 pixels as PNG files."""
    rng = np.random.default_rng(seed)
    made = [rng.integers(0, 256, (24, 20, 3), dtype=np.uint8) for _ in names]
    for name, pixels in zip(names, made, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return made


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder of latents, but for the locks, by its path."""
    locks = (".lock", ".planning")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name not in locks}


def start(argv: list[str], kill_at: int | None = None, limit: int | None = None) -> Any:
    """`encode_dataset` in a process of its own; with `kill_at`, until SIGKILL right before that rename or link, counted from 0; with
    `limit`, where no file may have more bytes."""
    return children.start(_encode, argv, kill_at, limit)


def finish(process: Any) -> int:
    """The exit code of a process; negative for a signal."""
    process.join(120)
    assert process.exitcode is not None, "the child hangs"
    return int(process.exitcode)


def _encode(argv: list[str], kill_at: int | None, limit: int | None) -> None:
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    seen = [0]

    def counted(commit: Callable[..., None]) -> Callable[..., None]:
        def committed(source: Any, target: Any) -> None:
            if seen[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen[0] += 1
            commit(source, target)

        return committed

    os.replace, os.link = counted(os.replace), counted(os.link)
    # A killed process leaves the same files with it or without; waiting for the disk is most of the time of shards this small.
    os.fsync = lambda _: None
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        code = encode.main(argv)
    sys.exit(code)
