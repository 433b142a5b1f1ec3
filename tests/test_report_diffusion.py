"""The report of diffusion runs, one and several."""

import base64
import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from autoencoder.report.page import render
from autoencoder.report.runs import read_runs
from tests.report_pages import (
    DIFFUSION_EVALUATION,
    DIFFUSION_LINES,
    LATENTS,
    make_diffusion_run,
    make_run,
    page_of,
)

# One diffusion run


def test_the_stage_is_told_by_the_configuration(tmp_path: Path) -> None:
    bare = make_run(tmp_path / "bare")
    (bare / "config.yaml").unlink()
    folders = [make_run(tmp_path / "a"), make_diffusion_run(tmp_path / "b"), bare]
    assert [run.stage.key for run in read_runs(folders)] == ["autoencoder", "diffusion", "autoencoder"]


def test_headlines_are_those_of_the_evaluation_with_its_scale(tmp_path: Path) -> None:
    page = page_of(make_diffusion_run(tmp_path / "run", evaluation=DIFFUSION_EVALUATION))
    assert page.tiles == {"Fréchet distance": "3.125", "Validation loss": "0.1875", "Images seen": "256", "Training time": "16 s"}
    assert "untrained 412.2, training rows 1.875" in page.text
    assert "Distance of 64 samples. Samples 3.125 Training rows (floor) 1.875 Untrained network 412.2" in page.text
    assert page.text.count("Fréchet distance") == 2


def test_an_evaluation_without_samples_has_no_distance(tmp_path: Path) -> None:
    evaluation = copy.deepcopy(DIFFUSION_EVALUATION)
    for key in ("frechet", "frechet_floor", "frechet_untrained"):
        evaluation["metrics"].pop(key)
    evaluation["frechet_on"] = None
    page = page_of(make_diffusion_run(tmp_path / "run", evaluation=evaluation))
    assert page.tiles["Validation loss"] == "0.1875"
    assert "Fréchet" not in page.text


def test_a_run_that_is_not_finished_has_a_page(tmp_path: Path) -> None:
    page = page_of(make_diffusion_run(tmp_path / "run", pictures=True))
    assert page.tiles == {"Validation loss": "0.1875", "Images seen": "256", "Training time": "16 s"}
    assert "validation at 256" in page.text
    assert "No final evaluation yet" in page.text
    assert not {"Nearest training latents", "Loss by noise level", "Every image could be read."} & {*page.words}
    assert len(page.all("img", "src")) == 2


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    page = page_of(make_diffusion_run(tmp_path / "run", lines=[], latents=None))
    assert "Nothing logged yet" in page.text
    assert page.tiles == {"Images seen": "0", "Training time": "0 s"}
    assert "Latents that it was trained on" not in page.text


def test_charts_tell_the_log_s_last_values_and_the_loss_at_each_noise_level(tmp_path: Path) -> None:
    evaluation = copy.deepcopy(DIFFUSION_EVALUATION)
    evaluation["noise_levels"].insert(0, {"t": 0.5, "loss": None})
    alts = page_of(make_diffusion_run(tmp_path / "run", evaluation=evaluation)).all("div", "aria-label")
    assert "Loss over images seen: train ends at 0.1250; validation ends at 0.1875" in alts
    assert "Learning rate over images seen: train ends at 0.001" in alts
    assert "Loss over t at the end of the run: 0.9000 at 0.10, 0.5000 at 0.40, 0.4500 at 0.60, 0.7000 at 0.90" in alts


def test_the_loss_by_noise_level_is_drawn_over_the_whole_of_time(tmp_path: Path) -> None:
    html = render(read_runs([make_diffusion_run(tmp_path / "run", evaluation=DIFFUSION_EVALUATION)]))
    svg = html[html.index("Loss by noise level") :].split("</svg>")[1]
    line = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--series-0\)', svg)[0]
    points = np.array([[float(n) for n in pair] for pair in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", line)])
    levels = np.array([[level["t"], level["loss"]] for level in DIFFUSION_EVALUATION["noise_levels"]])
    for axis, direction in ((0, 1), (1, -1)):
        slope, offset = np.polyfit(levels[:, axis], points[:, axis], 1)
        assert slope * direction > 0
        np.testing.assert_allclose(slope * levels[:, axis] + offset, points[:, axis], atol=0.02)
    assert "t (0: latents, 1: noise)" in svg


def test_the_losses_of_several_moving_averages_are_a_chart(tmp_path: Path) -> None:
    losses = {"ema-0.200": 0.2, "ema-0.050": 0.1875, "ema-0.100": None}
    several = DIFFUSION_EVALUATION | {"averages": {"chosen": "ema-0.050", "losses": losses}}
    a = make_diffusion_run(tmp_path / "a", evaluation=several)
    b = make_diffusion_run(tmp_path / "b", evaluation=DIFFUSION_EVALUATION)
    alone = page_of(a).all("div", "aria-label")
    title = "Validation loss by length of the moving average, at the end of the run: "
    assert title + "0.1875 at 0.050, 0.2000 at 0.200" in alone
    assert "in use 0.1875 at 0.050" in page_of(a).text
    assert title + "a: 0.1875 at 0.050, 0.2000 at 0.200" in page_of(a, b).all("div", "aria-label")
    assert not any(alt.startswith(title) for alt in page_of(b).all("div", "aria-label"))


def test_pictures_are_the_run_s_own_files(tmp_path: Path) -> None:
    run = make_diffusion_run(tmp_path / "run", evaluation=DIFFUSION_EVALUATION, pictures=True)
    page = page_of(run)
    embedded = [base64.b64decode(uri.removeprefix("data:image/png;base64,")) for uri in page.all("img", "src")]
    assert embedded == [(run / "images" / name).read_bytes() for name in ("step-00000004.png", "step-00000008.png", "neighbours.png")]
    assert page.all("img", "alt")[:2] == ["Samples at 128 images", "Samples at 256 images"]
    assert "256 images loss 0.1875" in page.text
    assert "Sampler: heun, 20 steps, guidance 1.5. Classes in turn: astronaut, retina." in page.text
    assert "originals stand above" not in page.text


def test_an_interval_of_guidance_and_a_shift_are_told(tmp_path: Path) -> None:
    run = make_diffusion_run(tmp_path / "run", evaluation=DIFFUSION_EVALUATION, pictures=True)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["sampling"] |= {"guidance_interval": [0.1, 0.75], "time_shift": 2.0}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    told = "Sampler: heun, 20 steps, guidance 1.5, given for t from 0.1 to 0.75, time shift 2. Classes in turn"
    assert told in page_of(run).text


def test_without_classes_there_is_no_guidance_to_tell(tmp_path: Path) -> None:
    run = make_diffusion_run(tmp_path / "run", latents=LATENTS | {"labels": None}, pictures=True)
    page = page_of(run)
    assert "Sampler: heun, 20 steps." in page.text
    assert "guidance 1.5" not in page.text.split("Configuration")[0]


def test_the_frozen_normalisation_is_a_table(tmp_path: Path) -> None:
    page = page_of(make_diffusion_run(tmp_path / "run", evaluation=DIFFUSION_EVALUATION))
    assert "rows_hash r1" in page.text
    assert "shape 2, 4, 4" in page.text
    assert "Latent channel Mean Standard deviation 0 0.1250 0.7500 1 −2.5000 1.2500" in page.text
    assert "notes []" in page.text


def test_values_that_were_not_finite_are_gaps_and_are_told(tmp_path: Path) -> None:
    bad = DIFFUSION_LINES[1] | {"loss": None, "nonfinite": ["loss"]}
    run = make_diffusion_run(tmp_path / "run", lines=[DIFFUSION_LINES[0], bad, *DIFFUSION_LINES[2:]])
    assert "1 line of the log with values that were not finite, first at 64 images (loss)" in page_of(run).text


# Several diffusion runs


def test_several_diffusion_runs_are_compared(tmp_path: Path) -> None:
    evaluation = DIFFUSION_EVALUATION | {"frechet_on": "Distance of 32 samples."}
    a = make_diffusion_run(tmp_path / "a", evaluation=DIFFUSION_EVALUATION)
    b = make_diffusion_run(tmp_path / "b", evaluation=evaluation, config={"denoiser": {"preset": "S"}})
    c = make_diffusion_run(tmp_path / "c")
    page = page_of(a, b, c)
    assert page.headings[0] == (1, "3 runs")
    assert "Validation loss 0.1875 final evaluation 0.1875 final evaluation 0.1875 validation at 256" in page.text
    assert "denoiser.preset tiny S tiny" in page.text
    assert "not measured alike" not in page.text
    assert "a: Distance of 64 samples. b: Distance of 32 samples. a b Samples 3.125 3.125" in page.text
    alts = page.all("div", "aria-label")
    assert any(alt.startswith("Loss over t at the end of the run: a: 0.9000 at 0.10") and "; b: 0.9000" in alt for alt in alts)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"latents": LATENTS | {"encoder_hash": "e2"}}, "latents.encoder_hash"),
        ({"config": {"process": {"t_mean": 0.5, "t_std": 1.0}}}, "process.t_mean"),
    ],
)
def test_runs_that_are_not_measured_alike_are_flagged(tmp_path: Path, other: dict[str, Any], told: str) -> None:
    page = page_of(make_diffusion_run(tmp_path / "a"), make_diffusion_run(tmp_path / "b", **other))
    assert f"Losses and Fréchet distances of these runs are not measured alike: they differ in {told}." in page.text
