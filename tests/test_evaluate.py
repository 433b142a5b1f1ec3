"""`evaluate_autoencoder` on small networks with fresh weights: gap, comparison, objective and alarms, in JSON and text."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder import artifact, evaluate, verdict
from autoencoder.config import DataConfig, ModelConfig
from autoencoder.evaluation_text import whole
from autoencoder.experimental.config import ExperimentalConfig
from autoencoder.experimental.module import Families
from autoencoder.experimental.saved import save_families
from autoencoder.likelihood import DiscretizedLogistic, Likelihood, PixelScale
from autoencoder.model import AutoencoderKL, build, decode, encode, widen

SIDE, PHOTOS = 16, 6
GAP = ["--gap.samples=4", "--gap.refine_steps=6"]


def network(seed: int = 0, *, logvar: float = -4.0) -> AutoencoderKL:
    """A network of random weights whose posteriors are about this wide."""
    torch.manual_seed(seed)
    vae = build(
        ModelConfig(preset="tiny", block_out_channels=[8, 8], norm_groups=4, layers_per_block=1), channels=3, resolution=SIDE
    ).requires_grad_(False)
    assert vae.quant_conv is not None and vae.quant_conv.bias is not None
    vae.quant_conv.bias[vae.config["latent_channels"] :] = logvar
    return vae


def saved(folder: Path, vae: AutoencoderKL, likelihood: Likelihood | None = None) -> Path:
    recipe = artifact.preprocessing(DataConfig(source="demo", resolution=SIDE), 256)
    artifact.save_autoencoder(vae, folder, preprocessing=recipe, likelihood=likelihood or DiscretizedLogistic(torch.tensor(0.1)))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draws = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(PHOTOS):
        coarse = draws.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model") / "vae", network())


def measured(model: Path, source: Path, out: Path, *options: str) -> dict[str, Any]:
    argv = ["--model", str(model), "--data.source", str(source), "--data.workers=0", "--out", str(out), *options]
    assert evaluate.main(argv) == 0
    report: dict[str, Any] = json.loads(out.read_text())
    return report


def test_the_gap_is_in_json_and_text_with_progress_on_stderr(
    model: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = measured(model, source, tmp_path / "a.json", *GAP, "--gap.images=5")
    told, shown = report["gap"], capsys.readouterr()
    assert (told["crops"], told["images"], told["samples"], told["refine_steps"]) == (5, 5, 4, 6)
    for who in ("encoder", "refined"):
        assert told[who]["iwae_nats"]["mean"] >= told[who]["elbo_nats"]["mean"]
        assert 1 <= told[who]["effective_sample_size"]["mean"] <= 4.0001
    gained = told["refined"]["elbo_nats"]["mean"] - told["encoder"]["elbo_nats"]["mean"]
    assert told["amortisation_gap_nats"]["mean"] == pytest.approx(gained, abs=1e-3)
    assert f"verdict: {told['verdict']['name']}" in shown.out and "ELBO, mean of 4 samples" in shown.out
    assert "gap measured on 5 / 5 crops" in shown.err
    assert shown.out.startswith(f"{'':22}{'mean':>12}") and max(map(len, shown.out.splitlines())) <= 120


def test_no_gap_unless_asked_for_and_every_crop_only_once(model: Path, source: Path, tmp_path: Path) -> None:
    assert "gap" not in measured(model, source, tmp_path / "a.json")
    report = measured(model, source, tmp_path / "b.json", *GAP, "--data.images=2", "--data.grid=2", "--gap.images=99")
    told = report["gap"]
    assert (told["crops"], told["images"]) == (8, 2)
    # In closed form, both: no noise between them.
    assert told["kl_nats"]["mean"] == pytest.approx(report["metrics"]["kl_nats"]["mean"], rel=1e-5)


def test_the_gap_sees_a_scale_of_each_values_own(source: Path, tmp_path: Path) -> None:
    vae = network()
    widen(vae, 0.2)
    pixel = measured(saved(tmp_path / "vae", vae, PixelScale("discretized_logistic")), source, tmp_path / "a.json", *GAP)
    single = saved(tmp_path / "single", network(), DiscretizedLogistic(torch.tensor(0.2)))
    # All scales are still what they started at: the same distribution.
    assert pixel["gap"]["refined"]["elbo_nats"]["mean"] == pytest.approx(
        measured(single, source, tmp_path / "b.json", *GAP)["gap"]["refined"]["elbo_nats"]["mean"], rel=1e-3
    )


def test_the_gap_is_that_of_the_families_saved_beside_the_network(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flows, judge = [], verdict.judge
    monkeypatch.setattr(verdict, "judge", lambda gap, *, flow: flows.append(flow) or judge(gap, flow=flow))
    vae = network()
    plain, folder = saved(tmp_path / "plain", vae), saved(tmp_path / "flow", vae)
    torch.manual_seed(1)
    config = ExperimentalConfig(posterior="flow", prior="mixture", flow_couplings=2, flow_width=4, components=3)
    families = Families(config, vae, resolution=SIDE)
    for name, parameter in families.named_parameters():
        if ".last." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_families(families, folder)
    ours, theirs = measured(folder, source, tmp_path / "a.json", *GAP), measured(plain, source, tmp_path / "b.json", *GAP)
    for told in (ours, theirs):
        account, error = told["metrics"]["elbo_nats"]["mean"], told["metrics"]["elbo_nats"]["spread"] / math.sqrt(PHOTOS)
        # The same model, by other noise.
        assert told["gap"]["encoder"]["elbo_nats"]["mean"] == pytest.approx(account, abs=4 * error)
    assert flows == [True, False]
    assert ours["gap"]["kl_nats"]["mean"] != pytest.approx(theirs["gap"]["kl_nats"]["mean"], rel=1e-3)


def test_differences_are_those_of_pairs(model: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = measured(model, source, tmp_path / "a.json")
    same = measured(model, source, tmp_path / "b.json", f"--compare={tmp_path / 'a.json'}")["comparison"]
    assert same["images"] == PHOTOS and all(m["mean"] == 0 and m["standard_error"] == 0 for m in same["differences"].values())
    other = saved(tmp_path / "other", network(1))
    capsys.readouterr()
    ours = measured(other, source, tmp_path / "c.json", f"--compare={tmp_path / 'a.json'}")
    pairs = np.array([[a["elbo_nats"], b["elbo_nats"]] for a, b in zip(ours["photos"], theirs["photos"], strict=True)])
    difference = pairs[:, 0] - pairs[:, 1]
    found = ours["comparison"]["differences"]["elbo_nats"]
    assert found["mean"] == pytest.approx(difference.mean()) and abs(found["mean"]) > 0
    assert found["standard_error"] == pytest.approx(difference.std(ddof=1) / math.sqrt(PHOTOS))
    assert "a.json" in capsys.readouterr().out


def test_what_does_not_compare_is_refused_with_the_reason(
    model: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = measured(model, source, tmp_path / "a.json")

    def refused(message: str, *options: str, **changed: object) -> None:
        (tmp_path / "b.json").write_text(json.dumps(report | changed))
        argv = ["--model", str(model), "--data.source", str(source), "--data.workers=0", f"--compare={tmp_path / 'b.json'}", *options]
        assert evaluate.main(argv) == 2
        error = capsys.readouterr().err
        assert "compare" in error and message in error and "Traceback" not in error

    refused("likelihood: laplace against discretized_logistic", "--likelihood.name=laplace", "--likelihood.scale=0.1")
    refused("support: reals against levels", "--likelihood.name=gaussian", "--likelihood.scale=0.1")
    refused("levels: 65536 against 256", "--likelihood.name=discretized_logistic", "--likelihood.scale=0.1", "--likelihood.levels=65536")
    refused("scale: 0.3 against fitted", "--likelihood.name=discretized_logistic", "--likelihood.scale=0.3")
    refused("other images", "--data.images=3")
    refused("other crops", "--data.resize=24")
    refused("no `measure`", measure=None)
    refused("no whole evaluation", measure="discretized_logistic")
    refused("no whole evaluation", provenance={})
    refused("no image in common", photos=[photo | {"id": "x" + photo["id"]} for photo in report["photos"]])


def test_the_refusal_of_a_comparison_says_what_makes_it_one(
    model: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--likelihood.name=laplace", "--likelihood.scale=0.1"]
    measured(model, source, tmp_path / "fitted.json")
    measured(model, source, tmp_path / "chosen.json", *chosen)

    def refused(other: str, *options: str) -> str:
        argv = ["--model", str(model), "--data.source", str(source), "--data.workers=0", f"--compare={tmp_path / other}", *options]
        assert evaluate.main(argv) == 2
        return capsys.readouterr().err

    assert "one likelihood.name and one likelihood.scale, fitted on training images" in refused("fitted.json", *chosen)
    assert "--likelihood.name=laplace --likelihood.scale=0.1;" in refused("chosen.json")
    assert "data.resolution" in refused("fitted.json", "--data.resolution=8")
    told = measured(model, source, tmp_path / "again.json", f"--compare={tmp_path / 'chosen.json'}", *chosen)["comparison"]
    assert told["differences"]["elbo_nats"]["mean"] == 0


def test_a_run_is_compared_with_by_its_folder(model: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    measured(model, source, tmp_path / "run" / "evaluation.json")
    told = measured(model, source, tmp_path / "a.json", f"--compare={tmp_path / 'run'}")["comparison"]
    assert told["file"] == "run" and told["images"] == PHOTOS


def test_a_broken_comparison_is_found_before_the_model_is_opened(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoencoder.measuring.measure", lambda config: pytest.fail("measured"))
    argv = ["--model", "owner/name", f"--data.source={source}", f"--compare={tmp_path / 'b.json'}"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "b.json").write_text("[]")
    assert evaluate.main(argv) == 2 and "is no evaluation" in capsys.readouterr().err
    (tmp_path / "b.json").write_text('{"metrics": {}, "photos": [], "provenance": {}}')
    assert evaluate.main(argv) == 2 and "is no whole evaluation" in capsys.readouterr().err
    (tmp_path / "b.json").write_text("nothing")
    assert evaluate.main(argv) == 2 and "cannot be read as JSON" in capsys.readouterr().err
    assert evaluate.main([*argv[:-1], "--compare=missing.json"]) == 2 and "no such file" in capsys.readouterr().err
    assert evaluate.main([*argv[:-1], f"--compare={tmp_path / 'empty'}"]) == 2
    assert "is a folder without an evaluation.json" in capsys.readouterr().err


def test_a_gap_without_a_likelihood_is_refused(model: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (saved(tmp_path / "vae", network()) / artifact.LIKELIHOOD).unlink()
    assert evaluate.main(["--model", str(tmp_path / "vae"), f"--data.source={source}", *GAP]) == 2
    assert "gap.samples" in capsys.readouterr().err
    assert evaluate.main(["--model", str(model), f"--data.source={source}", "--data.images=1", *GAP]) == 2
    assert "at least 2" in capsys.readouterr().err
    for option in ("--gap.samples=1", "--gap.images=1", "--gap.refine_steps=1", "--gap.lr=0"):
        assert evaluate.main(["--model", str(model), option]) == 2
        assert option[2:].split("=")[0] in capsys.readouterr().err


def test_a_chosen_scale_comes_back_from_its_file_as_it_was_chosen(source: Path, tmp_path: Path) -> None:
    chosen = saved(tmp_path / "chosen", network(), DiscretizedLogistic(0.1))
    measured(
        saved(tmp_path / "fitted", network()),
        source,
        tmp_path / "a.json",
        "--likelihood.name=discretized_logistic",
        "--likelihood.scale=0.1",
    )
    differences = measured(chosen, source, tmp_path / "b.json", f"--compare={tmp_path / 'a.json'}")["comparison"]["differences"]
    assert differences["nll_nats"]["mean"] == pytest.approx(0, abs=1e-3)


def test_levels_that_the_images_do_not_have_are_refused(
    model: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    likelihood = ["--likelihood.name=discretized_logistic", "--likelihood.scale=0.1", "--likelihood.levels=65536"]
    assert evaluate.main(["--model", str(model), f"--data.source={source}", "--data.workers=0", *likelihood]) == 2
    assert "65,536 levels" in capsys.readouterr().err


def test_a_prior_over_images_of_one_size_is_measured_on_that(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "vamp", vae := network())
    save_families(Families(ExperimentalConfig(prior="vamp", components=2), vae, resolution=SIDE), folder)
    assert evaluate.main(["--model", str(folder), f"--data.source={source}", "--data.workers=0", f"--data.resolution={SIDE // 2}"]) == 2
    assert f"images of {SIDE} pixels" in capsys.readouterr().err
    (folder / "experimental.safetensors").write_bytes(b"nothing")
    assert evaluate.main(["--model", str(folder), f"--data.source={source}", "--data.workers=0"]) == 2
    assert "experimental.safetensors: cannot be loaded" in capsys.readouterr().err


def test_a_run_of_another_version_is_measured_without_its_objective(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "run" / "vae", network())
    (tmp_path / "run" / "config.yaml").write_text(f"out: {tmp_path / 'run'}\ngone: 1\n")
    assert measured(tmp_path / "run", source, tmp_path / "a.json")["objective"]["convention"] is None
    assert "left out: gone" in capsys.readouterr().err


def test_a_run_is_measured_at_other_sizes_than_its_own(source: Path, tmp_path: Path) -> None:
    saved(tmp_path / "run" / "vae", network())
    data = f"data: {{source: {source}, resolution: {SIDE}, resize: {SIDE}}}\n"
    (tmp_path / "run" / "config.yaml").write_text(f"out: {tmp_path / 'run'}\n{data}")
    larger = [f"--data.resolution={2 * SIDE}", f"--data.resize={2 * SIDE}"]
    assert measured(tmp_path / "run", source, tmp_path / "a.json", *larger)["objective"]["resolution"] == 2 * SIDE


def test_beta_of_a_runs_objective_at_the_errors_of_posterior_samples(source: Path, tmp_path: Path) -> None:
    vae = network(logvar=-20.0)
    saved(tmp_path / "run" / "vae", vae)
    (tmp_path / "run" / "config.yaml").write_text(f"out: {tmp_path / 'run'}\nobjective: {{convention: ldm, kl: {{weight: 1.0e-3}}}}\n")
    report = measured(tmp_path / "run", source, tmp_path / "a.json")
    pixels = np.stack([np.asarray(Image.open(source / f"{i}.png")) for i in range(PHOTOS)])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        error = (images - decode(vae, encode(vae, images).mode())).abs().mean().item()
    # Posteriors so narrow that a sample is the mode.
    assert report["objective"]["mean_absolute_error"] == pytest.approx(error, rel=1e-3)
    assert report["objective"]["beta"] == pytest.approx(1e-3 / error, rel=1e-3)
    assert report["objective"]["kl_weight"] == 1e-3
    # What the run itself found of its controller goes before what was configured.
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps({"objective": {"kl_weight": 0.5}}))
    assert measured(tmp_path / "run", source, tmp_path / "b.json")["objective"]["kl_weight"] == 0.5


def test_a_model_that_is_no_run_has_the_weights_of_beta_one(model: Path, source: Path, tmp_path: Path) -> None:
    told = measured(model, source, tmp_path / "a.json")["objective"]
    assert told["convention"] is None and told["beta"] == 1
    assert told["equivalent_weights"]["ldm"] == pytest.approx(told["mean_absolute_error"])


def test_idle_channels_and_collapse_raise_alarms(model: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def alarms(model: Path) -> dict[str, str]:
        told = measured(model, source, tmp_path / "a.json")["alarms"]
        assert all(alarm["message"] and alarm["remedy"] for alarm in told)
        return {alarm["name"]: alarm["message"] for alarm in told}

    def silenced(channels: int) -> AutoencoderKL:
        vae = network()
        assert vae.quant_conv is not None and vae.quant_conv.bias is not None
        for first in (0, vae.config["latent_channels"]):
            vae.quant_conv.weight[first : first + channels] = 0
            vae.quant_conv.bias[first : first + channels] = 0
        return vae

    assert "idle_channels" not in alarms(model)
    assert "1 of 4" in alarms(saved(tmp_path / "one", silenced(1)))["idle_channels"]
    capsys.readouterr()
    assert "the KL is 0 nats" in alarms(saved(tmp_path / "all", silenced(4)))["collapse"]
    assert "ALARM collapse: the KL is 0 nats" in capsys.readouterr().out


def test_perceptual_distance_and_elbo_stay_apart(model: Path, source: Path, tmp_path: Path) -> None:
    report = measured(model, source, tmp_path / "a.json")
    with_lpips = copy.deepcopy(report)
    with_lpips["metrics"]["lpips"] = {"mean": 0.5, "spread": 0.1, "low": 0.4, "high": 0.6, "unit": "1"}
    ours, plain = whole(with_lpips).splitlines(), whole(report).splitlines()
    assert [line for line in ours if line not in plain] == [line for line in ours if line.startswith("lpips")]
