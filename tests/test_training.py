"""Whole runs: resumed bitwise wherever they are killed, stopped by signals, extended, refused."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.children import SMALL, run, start, train

TIMINGS = ("images_per_second",)


def lines(folder: Path) -> list[dict[str, object]]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in read]


def assert_same_run(one: Path, other: Path, step: int = 20) -> None:
    """Weights, average, optimiser, controllers and logged scalars are the same bits."""
    assert lines(one) == lines(other)
    names = {f.name for f in (one / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")}
    assert {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "controllers.safetensors"} <= names
    for name in names:
        first, second = (load_file(run / "checkpoints" / f"step-{step:08d}" / name) for run in (one, other))
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert torch.equal(value, second[key]), f"{name}: {key}"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert run([*SMALL, "--out", str(folder)], pictures=True) == 0
    return folder


def test_a_run_leaves_what_the_contract_names(unbroken: Path) -> None:
    names = {p.name for p in unbroken.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "images", "vae", "report.html", "evaluation.json", "finished.json"} <= names
    assert {"preprocessing.json", "likelihood.safetensors", "config.json"} <= {p.name for p in (unbroken / "vae").iterdir()}
    last = lines(unbroken)[-1]
    assert (last["phase"], last["step"], last["images"]) == ("validation", 20, 160)
    for name in ("nll_nats", "kl_nats", "elbo_nats", "psnr_db", "ssim", "active_channels"):
        assert name in last
    assert last["elbo_nats"] == pytest.approx(-last["nll_nats"] - last["kl_nats"])  # type: ignore[operator]


# 12 is in the middle of an epoch of the six photos as well, and so is every other step of eight images.
@pytest.mark.parametrize("kill_at", [10, 12])
def test_a_killed_run_resumes_to_the_same_bits(unbroken: Path, tmp_path: Path, kill_at: int) -> None:
    argv = [*SMALL, "--out", str(tmp_path / "run")]
    assert run(argv, kill_at=kill_at) == -signal.SIGKILL
    assert run(argv) == 0
    assert_same_run(unbroken, tmp_path / "run")


def test_a_run_killed_inside_an_accumulation_resumes_to_the_same_bits(tmp_path: Path) -> None:
    accumulating = [*SMALL, "--train.microbatch=3", "--optimizer.name=muon"]
    assert run([*accumulating, "--out", str(tmp_path / "whole")]) == 0
    argv = [*accumulating, "--out", str(tmp_path / "run")]
    # Three microbatches a step: this is the second of the eleventh step.
    assert run(argv, kill_at=31) == -signal.SIGKILL
    assert run(argv) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_bf16_runs_resume_to_the_same_bits(tmp_path: Path) -> None:
    argv = [*SMALL, "--train.precision=bf16", "--objective.perceptual.name=ssim", "--objective.likelihood.scale=learned"]
    assert run([*argv, "--out", str(tmp_path / "whole")]) == 0
    assert run([*argv, "--out", str(tmp_path / "run")], kill_at=10) == -signal.SIGKILL
    assert run([*argv, "--out", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint_and_its_exit_code(unbroken: Path, tmp_path: Path, number: int, code: int) -> None:
    argv = [*SMALL, "--checkpoint.every_images=null", "--out", str(tmp_path / "run")]
    process = start(train, argv)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/complete"))
    assert not (tmp_path / "run" / "finished.json").exists()
    assert run(argv) == 0
    assert lines(tmp_path / "run") == lines(unbroken)


def test_a_finished_run_has_nothing_to_do_and_a_longer_one_goes_on(tmp_path: Path) -> None:
    argv = [*SMALL, "--train.images=40", "--out", str(tmp_path / "run")]
    assert run(argv) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert run(argv) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    output = tmp_path / "stderr"
    assert run([*argv, "--train.images=48"], output=output) == 0
    assert lines(tmp_path / "run")[-1]["images"] == 48
    assert "train.images: 40 -> 48" in output.read_text()


def test_a_run_killed_while_it_exports_exports_again(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    weights = (folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    (folder / "finished.json").unlink()
    (folder / "vae" / "config.json").unlink()
    (folder / ".vae.partial").mkdir()
    assert run([*SMALL, "--out", str(folder)]) == 0
    assert (folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    assert (folder / "vae" / "config.json").exists()
    assert (folder / "finished.json").exists()
    assert not (folder / ".vae.partial").exists()
    assert lines(folder) == lines(unbroken)


def test_max_hours_leaves_a_checkpoint_and_exit_code_0(unbroken: Path, tmp_path: Path) -> None:
    argv = [*SMALL, "--out", str(tmp_path / "run")]
    assert run([*argv, "--train.max_hours=1e-9"]) == 0
    assert not (tmp_path / "run" / "finished.json").exists()
    assert run(argv) == 0
    assert_same_run(unbroken, tmp_path / "run")


def test_a_new_phase_starts_from_the_weights_of_a_run(unbroken: Path, tmp_path: Path) -> None:
    argv = [*SMALL, "--train.images=8", "--optimizer.lr=1e-12", "--init_from", str(unbroken), "--out", str(tmp_path / "run")]
    assert run(argv) == 0
    before, after = (load_file(f / "vae" / "diffusion_pytorch_model.safetensors") for f in (unbroken, tmp_path / "run"))
    assert all(torch.allclose(before[k], after[k], atol=1e-6) for k in before)


def test_weights_of_another_architecture_are_refused(unbroken: Path, tmp_path: Path) -> None:
    output = tmp_path / "stderr"
    argv = [*SMALL, "--model.latent_channels=2", "--init_from", str(unbroken), "--out", str(tmp_path / "run")]
    assert run(argv, output=output) == 2
    assert "init_from" in output.read_text()
    assert "same architecture" in output.read_text()


def test_a_damaged_checkpoint_is_named(unbroken: Path, tmp_path: Path) -> None:
    argv = [*SMALL, "--out", str(tmp_path / "run")]
    assert run(argv, kill_at=10) == -signal.SIGKILL
    file = tmp_path / "run" / "checkpoints" / "step-00000010" / "model.safetensors"
    if not file.exists():
        file = tmp_path / "run" / "checkpoints" / "step-00000005" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    output = tmp_path / "stderr"
    assert run(argv, output=output) == 2
    assert str(file) in output.read_text()
    assert "Traceback" not in output.read_text()
