"""Two processes are one: gradients, controllers, average and validation do not depend on the split."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.children import SMALL, start, together, train, wait
from tests.gradients import launch

# Three steps of eight images and a last one of five: the split of the last is uneven.
ARGV = [
    *SMALL,
    "--train.images=29",
    "--train.microbatch=2",
    "--log.validate_every_images=16",
    "--optimizer.clip_norm=null",
    "--optimizer.lr=1e-5",
]
ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def by_launcher(command: list[str], out: Path, argv: list[str]) -> None:
    """Two processes by a launcher's command."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    out.mkdir()
    command = [*command, "-m", "tests.gradients", "2", str(out), "train_autoencoder", *argv, "--out", str(out / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "out"
    launch(out, 1, ARGV)
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two") / "out"
    by_launcher(TORCHRUN, out, ARGV)
    return out


def test_gradients_of_every_step_are_equal(one: Path, two: Path) -> None:
    single, double = (load_file(out / "gradients.safetensors") for out in (one, two))
    assert single.keys() == double.keys()
    steps = {key.split("/")[0] for key in single}
    assert steps == {"0", "1", "2", "3"}
    for step in steps:
        keys = [key for key in single if key.startswith(f"{step}/")]
        difference = torch.cat([(single[k] - double[k]).flatten() for k in keys]).norm()
        assert difference <= 1e-5 * torch.cat([single[k].flatten() for k in keys]).norm()


def test_weights_average_and_controllers_are_equal(one: Path, two: Path) -> None:
    for name in ("model", "ema", "controllers"):
        single, double = (load_file(out / "run" / "checkpoints" / "step-00000004" / f"{name}.safetensors") for out in (one, two))
        assert single.keys() == double.keys()
        for key, value in single.items():
            torch.testing.assert_close(value, double[key], atol=1e-6, rtol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_logged_and_validated_scalars_are_equal(one: Path, two: Path) -> None:
    single, double = ([json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()] for out in (one, two))
    assert len(single) == len(double)
    for first, second in zip(single, double, strict=True):
        assert first.keys() == second.keys()
        for key in first.keys() - {"images_per_second", "phase"}:
            assert first[key] == pytest.approx(second[key], rel=1e-4, abs=1e-6), key


def test_two_processes_preflight_and_list_bad_images_together(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(12):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(images / f"{i}-good.png")
    for i in range(3):
        (images / f"{i}-bad.png").touch()
    argv = [*SMALL, "--train.images=64", f"--data.source={images}", "--data.validation_source=demo"]
    for name, extra in (("console", []), ("preflight", ["--preflight"])):
        together(2, tmp_path / name, train, [*argv, "--out", str(tmp_path / "run"), *extra])
    assert (tmp_path / "preflight").read_text().count("preflight: ") == 1
    listed = [json.loads(line)["id"] for line in (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()]
    assert sorted(listed) == ["0-bad.png", "1-bad.png", "2-bad.png"]


@pytest.mark.slow
def test_accelerates_launcher_starts_two(tmp_path: Path) -> None:
    by_launcher(ACCELERATE, tmp_path / "out", [*SMALL, "--train.images=8"])


def alone(argv: list[str], output: Path) -> None:
    """A process whose launcher has started two, but says nothing of how they meet."""
    for name in ("ACCELERATE_USE_CPU", "LOCAL_RANK", "MASTER_ADDR"):
        os.environ.pop(name, None)
    os.environ |= {"WORLD_SIZE": "2", "RANK": "0"}
    train(argv, output=output)


def test_processes_that_would_train_alone_are_refused(tmp_path: Path) -> None:
    assert wait(start(alone, [*SMALL, "--out", str(tmp_path / "run")], tmp_path / "stderr")) == 2
    assert "torchrun" in (tmp_path / "stderr").read_text()
