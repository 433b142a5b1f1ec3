"""`train_autoencoder` from its command line: bad input, preflight, bad images, non-finite losses."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder import evaluate, export, train
from autoencoder.likelihood import LIKELIHOODS
from autoencoder.model import build
from autoencoder.model_config import PRESETS, ModelConfig
from autoencoder.objective_config import LikelihoodConfig
from autoencoder.runtime.loop import Trainer
from autoencoder.scale import AnalyticScale
from autoencoder.task import AutoencoderTask
from tests.children import SMALL

ROOT = Path(__file__).parents[1]
SHORT = [*SMALL, "--train.images=16"]


pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--data.resolution=a"], "data.resolution: got 'a'; give an integer"),
        (["--data.resolution=17"], "data.resolution: got 17; give a multiple of 2"),
        (["--data.resolutoin=16"], "data.resolutoin: no such setting; closest: data.resolution"),
        (["--model.preset=kl-f9"], "model.preset: got 'kl-f9'"),
        (["--model.preset=null"], "model.preset: not given; give one of tiny, kl-f4, kl-f8, kl-f16, or model.pretrained"),
        (["--model.block_out_channels=[8, 9]"], "model.block_out_channels"),
        (["--data.source=/no/such/folder"], "data.source: got '/no/such/folder'"),
        (["--data.source=EMPTY"], "holds no images"),
        (["--data.source=EMPTY/*.parquet"], "no file matches"),
        (["--data.split=nowhere"], "data.split: got 'nowhere'"),
        (["--data.channels=2", "--model.pretrained=PRETRAINED"], "data.channels"),
        (["--model.pretrained=/no/such/model"], "model.pretrained"),
        (["--init_from=/no/such/run"], "init_from"),
        (["--objective.perceptual.name=lpips"], "objective.perceptual.weights"),
        (
            ["--objective.likelihood.name=discretized_logistic", "--objective.likelihood.levels=65536"],
            "these images have 256 levels; give 256",
        ),
        (["--objective.likelihood.value=-1"], "objective.likelihood.value: got -1.0"),
        (["--train.images=many"], "train.images: got 'many'"),
        (["--train.precision=fp16"], "train.precision: got 'fp16'"),
        (["--log.trackers=[nonesuch]"], "log.trackers"),
        (["--config=EMPTY/missing.yaml"], "config: got"),
        (["--config=BROKEN"], "broken.yaml"),
        (["--config=WRONG"], "train.batch_size"),
    ],
)
def test_bad_input_ends_with_2_and_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: list[str], said: str
) -> None:
    # A machine with a GPU, or with LPIPS weights in its cache, is to refuse the same.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.yaml").write_text("data: [1, 2\n")
    (tmp_path / "wrong.yaml").write_text("train: {batch_size: 0}\n")
    if any("PRETRAINED" in a for a in argv):
        build(ModelConfig(preset="tiny"), channels=3, resolution=16).save_pretrained(tmp_path / "pretrained")
    for name in ("EMPTY", "BROKEN", "WRONG", "PRETRAINED"):
        path = tmp_path / {"EMPTY": "empty", "BROKEN": "broken.yaml", "WRONG": "wrong.yaml", "PRETRAINED": "pretrained"}[name]
        argv = [a.replace(name, str(path)) for a in argv]
    # What the command line says would hide what the file says, and the shape of a network that of the pretrained one.
    hiding = "--train.batch_size" if any("wrong.yaml" in a for a in argv) else "--model." if "--model.pretrained" in str(argv) else "none"
    small = [a for a in SHORT if not a.startswith(hiding)]
    assert train.main([*small, *argv, "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in message


def test_a_missing_out_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(SHORT) == 2
    assert "out: not given; give --out OUT" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train_autoencoder", "evaluate_autoencoder", "reconstruct", "export_autoencoder", "report"])
def test_bad_input_as_a_process(command: str) -> None:
    done = subprocess.run(
        [sys.executable, f"scripts/{command}.py", "--nonsense", "1"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: nonsense: no such setting")
    assert len(done.stderr.splitlines()) == 1


def test_preflight_prints_memory_and_hours_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*SMALL, "--preflight", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    for word in ("memory", "GiB", "images/s", "hours", "checkpoint"):
        assert word in printed
    assert not (tmp_path / "run").exists()


def test_16_bit_pixels_are_in_the_recipe_whatever_the_likelihood(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(12):
        Image.fromarray(np.full((20, 20), 5000 * i, np.uint16)).save(tmp_path / "images" / f"{i}.png")
    argv = [*SHORT, f"--data.source={tmp_path / 'images'}", "--data.channels=1", "--checkpoint.every_images=8"]
    assert train.main([*argv, "--out", str(tmp_path / "run")]) == 0
    assert export.main(["--checkpoint", str(tmp_path / "run" / "checkpoints" / "step-00000001"), "--out", str(tmp_path / "vae")]) == 0
    for folder in (tmp_path / "run" / "vae", tmp_path / "vae"):
        assert json.loads((folder / "preprocessing.json").read_text())["pixels"]["levels"] == 65536


def folder_with_bad_images(folder: Path, good: int, bad: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(good):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}-good.png")
    for i in range(bad):
        (folder / f"{i}-bad.png").write_bytes(b"")
    return folder


def test_bad_images_are_skipped_counted_and_listed(tmp_path: Path) -> None:
    source = folder_with_bad_images(tmp_path / "images", good=30, bad=3)
    run = tmp_path / "run"
    assert train.main([*SMALL, "--train.images=64", f"--data.source={source}", "--data.validation_source=demo", "--out", str(run)]) == 0
    listed = {json.loads(line)["id"] for line in (run / "bad_images.jsonl").read_text().splitlines()}
    assert listed == {"0-bad.png", "1-bad.png", "2-bad.png"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if line["phase"] == "train"][-1]["bad_images"] == 3


def test_bad_validation_images_are_listed_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, run = folder_with_bad_images(tmp_path / "images", good=5, bad=2), tmp_path / "run"
    assert train.main([*SHORT, f"--data.validation_source={source}", "--out", str(run)]) == 0
    assert {json.loads(line)["id"] for line in (run / "bad_images.jsonl").read_text().splitlines()} == {"0-bad.png", "1-bad.png"}
    assert len(json.loads((run / "evaluation.json").read_text())["photos"]) == 5
    compared = f"--compare={run / 'evaluation.json'}"
    assert evaluate.main(["--model", str(run), "--out", str(tmp_path / "out.json"), compared]) == 0
    assert "2 images could not be read" in capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["bad_images"].keys() == {"0-bad.png", "1-bad.png"}
    # The run's own evaluation is of the same images, noise and weights.
    assert report["comparison"]["images"] == 5 and abs(report["comparison"]["differences"]["elbo_nats"]["mean"]) < 0.01


def test_nothing_but_bad_images_to_measure_on_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, run = folder_with_bad_images(tmp_path / "images", good=0, bad=2), tmp_path / "run"
    assert train.main([*SHORT, "--out", str(run)]) == 0
    assert evaluate.main(["--model", str(run), f"--data.source={source}"]) == 2
    assert "none of the images to measure on can be read: 0-bad.png" in capsys.readouterr().err


def test_more_bad_images_than_allowed_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder_with_bad_images(tmp_path / "images", good=30, bad=3)
    argv = [*SMALL, f"--data.source={source}", "--data.validation_source=demo", "--data.max_bad=2", "--out", str(tmp_path / "run")]
    assert train.main(argv) == 1
    assert "more than data.max_bad=2" in capsys.readouterr().err


def poisoned(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Make the perceptual term of one microbatch infinite."""
    losses, seen = AutoencoderTask.losses, [0]

    def poison(*arguments: Any, probe: bool = False) -> Any:
        terms = losses(*arguments, probe=probe)
        if seen[0] == at:
            terms.named["perceptual"] = terms.named["perceptual"] * torch.inf
            terms.loss = terms.loss + terms.named["perceptual"]
        seen[0] += 1
        return terms

    monkeypatch.setattr(AutoencoderTask, "losses", poison)


PERCEPTUAL = [*SMALL, "--objective.perceptual.name=ssim", "--train.images=80", "--log.every_images=16"]


def test_a_non_finite_loss_ends_the_run_and_names_its_term(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, at=6)
    assert train.main([*PERCEPTUAL, "--out", str(tmp_path / "run")]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: non-finite loss, perceptual")
    assert "step-00000005" in {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}


def test_a_skipped_step_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: dict[int, dict[str, torch.Tensor]] = {}
    stepped: Callable[..., None] = Trainer._step

    def recorded(self: Trainer[Any], step: int, batches: list[Any]) -> None:
        stepped(self, step, batches)
        held = self._held()
        states[step] = {f"{k}/{n}": v.clone() for k in ("model", "ema", "optimizer", "controllers") for n, v in held[k].tensors().items()}

    monkeypatch.setattr(Trainer, "_step", recorded)
    poisoned(monkeypatch, at=6)
    argv = [*PERCEPTUAL, "--train.on_nonfinite=skip", "--out", str(tmp_path / "run")]
    assert train.main(argv) == 0
    assert all(torch.equal(states[5][k], v) for k, v in states[6].items())
    assert not all(torch.equal(states[6][k], v) for k, v in states[7].items())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    skipped = [line for line in lines if line.get("skipped_steps")]
    assert [(line["step"], line["skipped_steps"], line["nonfinite"]) for line in skipped] == [(8, 1.0, ["loss", "perceptual"])]


@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_the_analytic_scale_becomes_the_errors_own(name: str) -> None:
    scale = AnalyticScale(LikelihoodConfig(name=name, value=7.0), torch.device("cpu"))  # type: ignore[arg-type]
    errors = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.1
    moment = LIKELIHOODS[name].moment(errors).mean()
    scale.update(moment, torch.zeros(()))
    torch.testing.assert_close(scale.value, LIKELIHOODS[name].scale_from_moment(moment))
    scale.update(torch.tensor(torch.nan), torch.ones(()))
    torch.testing.assert_close(scale.value, LIKELIHOODS[name].scale_from_moment(moment))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_are_shapes_that_fit(preset: str) -> None:
    shape = ModelConfig(preset=preset).shape()  # type: ignore[arg-type]
    assert 2 ** (len(shape["block_out_channels"]) - 1) == {"tiny": 4, "kl-f4": 4, "kl-f8": 8, "kl-f16": 16}[preset]


def test_kl_f8_has_as_many_parameters_as_the_published_network() -> None:
    with torch.device("meta"):
        vae = build(ModelConfig(preset="kl-f8"), channels=3, resolution=256)
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863


def test_a_run_as_a_process(tmp_path: Path) -> None:
    argv = [sys.executable, "scripts/train_autoencoder.py", *SHORT, "--out", str(tmp_path / "run")]
    done = subprocess.run(
        argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr


def test_16_bit_grey_images_train_at_65536_levels(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 65536, (20, 20), dtype=np.uint16)).save(tmp_path / "images" / f"{i}.png")
    argv = [*SHORT, f"--data.source={tmp_path / 'images'}", "--data.channels=1", "--objective.likelihood.name=discretized_logistic"]
    assert train.main([*argv, "--out", str(tmp_path / "wrong")]) == 2
    assert train.main([*argv, "--objective.likelihood.levels=65536", "--out", str(tmp_path / "run")]) == 0
    recipe = json.loads((tmp_path / "run" / "vae" / "preprocessing.json").read_text())
    assert recipe["pixels"] == {"range": [-1.0, 1.0], "levels": 65536, "channels": 1}
    bits = json.loads((tmp_path / "run" / "evaluation.json").read_text())["metrics"]["bits_per_dim"]["mean"]
    # Uniform noise has 16 bits a value; an untrained network's bound lies above them.
    assert 16 <= bits < 25
