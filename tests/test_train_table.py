"""Whole runs of variance-preserving processes: what they leave, resumed bitwise, sampled again from their pipelines."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion import pipeline, sample
from tests.diffusion_children import SMALL_DIFFUSION, run
from tests.small_latents import encode_photos, write_photos, write_vae
from tests.test_train_diffusion import assert_same_run, evaluation


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    latents = encode_photos(write_vae(folder / "vae", seed=0), write_photos(folder / "photos"), folder / "latents")
    return [*SMALL_DIFFUSION, "--latents", str(latents), "--process.name=vp"]


def test_a_run_of_v_leaves_a_pipeline_that_stock_code_samples_alike(small: list[str], tmp_path: Path) -> None:
    settings = ["--process.schedule=squaredcos_cap_v2", "--sampling.guidance_interval=[0.1,0.7]", "--sampling.sampler=dpm++"]
    folder = tmp_path / "run"
    assert run([*small, *settings, "--out", str(folder)], whole=True) == 0
    scheduler = json.loads((folder / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    told = {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2", "use_flow_sigmas": False, "lambda_min_clipped": -5.1}
    assert {key: scheduler[key] for key in told} == told
    provenance = evaluation(folder)["provenance"]
    assert provenance["pipeline"]["largest_difference_to_stock"] < pipeline.GATE_TOLERANCE  # type: ignore[index]
    assert provenance["sampling"] == {
        "sampler": "dpm++", "steps": 2, "guidance": 1.5, "guidance_interval": [0.1, 0.7], "time_shift": 1.0,
    }  # fmt: skip


def test_a_killed_run_of_noise_resumes_to_the_same_bits_and_is_sampled_by_any_sampler(small: list[str], tmp_path: Path) -> None:
    argv = [*small, "--process.prediction=epsilon", "--sampling.sampler=ddim"]
    assert run([*argv, "--out", str(tmp_path / "whole")]) == 0
    broken = [*argv, "--out", str(tmp_path / "run")]
    assert run(broken, kill=("losses", 7)) == -signal.SIGKILL
    assert run(broken) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    drawn = []
    for sampler in ("euler", "heun", "dpm++", "ddim"):
        out = tmp_path / sampler
        asked = ["--pipeline", str(tmp_path / "run"), "--out", str(out), "--images", "2", "--steps", "50", "--sampler", sampler]
        assert sample.main(asked) == 0
        drawn.append(np.stack([np.asarray(Image.open(out / f"{n:06d}.png")).astype(int) for n in range(2)]))
    # One probability flow, of a network that has hardly begun to learn.
    assert max(np.abs(images - drawn[1]).mean() for images in drawn) < 6
    assert len({images.tobytes() for images in drawn}) == 4


def test_a_shifted_run_gives_its_shift_to_the_pipeline(small: list[str], tmp_path: Path) -> None:
    argv = [*small, "--process.name=flow", "--sampling.time_shift=2.5", "--train.images=16", "--out", str(tmp_path / "run")]
    assert run(argv) == 0
    scheduler = json.loads((tmp_path / "run" / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["flow_shift"]) == ("flow_prediction", 2.5)
