"""SIGTERM and Ctrl-C while loader processes read: one line, its exit code, and the same command goes on."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import children
from tests.encode_children import files, photos, small_model

children.preload("tests.test_encode_stops")

STOPPED_IN = 12
"""The microbatch, of 20 and of those by which the speed is measured, in whose midst the signal comes."""


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vae`, `photos`, and latents of them that nobody stopped, `unbroken`."""
    folder = tmp_path_factory.mktemp("stops")
    small_model(folder / "vae")
    photos(folder / "photos", [f"{k}.png" for k in range(40)])
    assert children.wait(children.start(encode_until, arguments(folder, folder / "unbroken", 0), None, folder / "said")) == 0
    return folder


def arguments(setting: Path, out: Path, workers: int) -> list[str]:
    told = ["--precision=fp32", "--batch_size=2", "--shard_rows=8", f"--data.workers={workers}"]
    return [f"--model={setting / 'vae'}", f"--data.source={setting / 'photos'}", *told, f"--out={out}"]


def encode_until(argv: list[str], sent: int | None, output: Path) -> None:
    """`encode_dataset` with its stderr in a file; the signal comes while it encodes."""
    import torch

    from autoencoder import encode
    from autoencoder.latents.network import Encoder

    torch.set_num_threads(1)
    sys.stderr = output.open("w")
    children.kill_in(Encoder, "__call__", STOPPED_IN if sent else None, sent or 0)
    sys.exit(encode.main(argv))


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stop_is_one_line_and_the_same_command_goes_on(setting: Path, tmp_path: Path, sent: int, code: int, workers: int) -> None:
    out, said = tmp_path / "latents", tmp_path / "said"
    assert children.wait(children.start(encode_until, arguments(setting, out, workers), sent, said)) == code
    assert said.read_text().splitlines()[-1] == f"{out}: stopped ({signal.Signals(sent).name}); the same command goes on"
    assert "Traceback" not in said.read_text()
    shards = len(list(out.glob("data-*.json")))
    assert 0 < shards < 5
    assert not list(out.glob(".*.partial"))
    # How many processes load has no part in what comes out.
    assert children.wait(children.start(encode_until, arguments(setting, out, 0), None, said)) == 0
    assert files(out) == files(setting / "unbroken")


LOADING = """
import os, signal, sys, torch
from autoencoder.data.workers import load

class Numbers:
    def __getitem__(self, number):
        error = {0: ConnectionResetError(104, "reset by peer"), 1: EOFError(), 2: ValueError("of another kind")}[number]
        sys.excepthook(type(error), error, None)
        return number

list(load(Numbers(), range(3), 1, False))
"""


def test_a_loader_process_that_loses_its_connection_is_silent_and_other_errors_are_not() -> None:
    done = subprocess.run([sys.executable, "-c", LOADING], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr == "ValueError: of another kind\n"
