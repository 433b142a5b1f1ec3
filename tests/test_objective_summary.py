"""What is optimised, in words: terms apart, notes on the resolution, the start-up log and the console's lines."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoencoder import artifact, train, training
from autoencoder.adversarial_config import AdversarialConfig
from autoencoder.beta import effective_beta
from autoencoder.config import DataConfig, ModelConfig, TrainAutoencoderConfig
from autoencoder.experimental.config import ExperimentalConfig
from autoencoder.objective_config import KLConfig, LikelihoodConfig, ObjectiveConfig, PerceptualConfig
from autoencoder.objective_summary import Measured, describe_objective, lines, resolution_notes
from autoencoder.runtime.console import COLUMNS, Console
from tests.children import SMALL

MEASURED = Measured(mean_absolute_error=0.05, mean_squared_error=0.005, channels=3, resolution=32, latent_shape=(4, 8, 8))
KL = [
    KLConfig(),
    KLConfig(weight=1e-6, schedule="linear", anneal_images="20k"),
    KLConfig(schedule="cyclical"),
    KLConfig(control="target", target=200.0, free_bits=2.0),
    KLConfig(control="geco", target_rmse=0.05, free_bits=0.5, free_bits_per="site"),
]


@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize(
    ("convention", "scale"),
    [
        *itertools.product(["elbo", "ldm", "monai", "diffusers"], ["analytic", "fixed"]),
        *itertools.product(["elbo"], ["learned", "pixel"]),
    ],
)
def test_every_objective_is_told_in_lines_that_fit(kl: KLConfig, convention: Any, scale: Any) -> None:
    likelihood = LikelihoodConfig(name="discretized_logistic", scale=scale)
    config = ObjectiveConfig(convention=convention, likelihood=likelihood, kl=kl, perceptual=PerceptualConfig(name="ssim", weight=0.05))
    told = describe_objective(config, MEASURED)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    said = lines(told)
    assert max(map(len, said)) <= COLUMNS
    (perceptual,) = [line for line in said if "ssim" in line]
    assert perceptual.split()[0] == "perceptual"
    assert "in no ELBO" in perceptual
    (adversarial,) = [line for line in said if "adversarial" in line]
    assert adversarial.split() == ["adversarial", "off"]


def test_figures_of_the_summary() -> None:
    told = describe_objective(ObjectiveConfig(convention="ldm", kl=KLConfig(weight=1e-6)), MEASURED)
    assert told["beta"] == pytest.approx(2e-5)
    assert told["decoder"] == {"family": "laplace", "implied_scale": pytest.approx(1e-6), "best_scale": 0.05}
    assert told["equivalent_weights"] == pytest.approx({"ldm": 1e-6, "monai": 1e-6 / 3072, "diffusers": 2e-7})
    text = "\n".join(lines(told))
    assert "2e-05: the ELBO (beta 1) of a laplace decoder of scale 1e-06, where the errors fit 0.05" in text


def test_what_is_stripped_at_export_is_told() -> None:
    config = ObjectiveConfig(likelihood=LikelihoodConfig(name="gaussian", scale="pixel"), kl=KLConfig(weight=4.0))
    told = describe_objective(config, MEASURED)
    assert "stripped at export" in lines(told)[0]


def test_scales_of_each_values_own_are_not_told_as_one() -> None:
    config = ObjectiveConfig(likelihood=LikelihoodConfig(name="gaussian", scale="pixel"), kl=KLConfig(weight=4.0))
    told = describe_objective(config, MEASURED)
    assert told["beta"] == 4
    assert told["decoder"] == {"family": "gaussian", "implied_scale": None, "best_scale": None}
    said = " ".join(" ".join(lines(told)).split())
    assert "effective beta 4: the KL weight; each value has its own scale, so that the weights below are those of one scale" in said
    assert "the errors fit" not in said


@pytest.mark.parametrize("config", [ObjectiveConfig(), None])
def test_an_experimental_account_says_that_it_is_one(config: ObjectiveConfig | None) -> None:
    chosen = ExperimentalConfig(posterior="flow", prior="mixture", iwae_samples=5)
    told = describe_objective(config, MEASURED, chosen)
    assert json.loads(json.dumps(told)) == told
    families = {"posterior": "flow", "prior": "mixture", "iwae_samples": 5, "encoder_steps": 0}
    assert {key: told["experimental"][key] for key in families} == families
    said = " ".join(" ".join(lines(told)).split())
    assert "experimental posterior flow, prior mixture: KL is log q - log p of a sample; the loss is the importance-weighted" in said
    for plain in (None, ExperimentalConfig()):
        told = describe_objective(config, MEASURED, plain)
        assert told["experimental"] is None
        assert "experimental" not in " ".join(lines(told))


def test_an_autoencoder_of_unknown_objective_gets_the_weights_of_beta_1() -> None:
    told = describe_objective(None, MEASURED)
    assert told["equivalent_weights"] == pytest.approx({"ldm": 0.05, "monai": 0.05 / 3072, "diffusers": 0.01})
    assert "LDM's published 1e-06 is beta 2e-05 here" in " ".join("\n".join(lines(told)).split())


def test_the_weight_in_force_is_told() -> None:
    told = describe_objective(ObjectiveConfig(kl=KLConfig(control="target", target=200.0)), replace(MEASURED, kl_weight=3.0))
    assert (told["kl_weight"], told["beta"]) == (3.0, 3.0)


def test_exact_copies_leave_no_figure_that_json_has_no_word_for() -> None:
    exact = replace(MEASURED, mean_absolute_error=0.0, mean_squared_error=0.0)
    for config in (ObjectiveConfig(convention="diffusers"), ObjectiveConfig(), None):
        told = describe_objective(config, exact)
        json.dumps(told, allow_nan=False)
        assert lines(told)


@pytest.mark.parametrize("convention", ["elbo", "ldm", "diffusers"])
def test_sums_say_nothing_about_the_resolution(convention: Any) -> None:
    sums = ObjectiveConfig(convention=convention, kl=KLConfig(weight=0.1, free_bits=0.5, free_bits_per="site"))
    assert resolution_notes(sums, MEASURED) == []
    assert resolution_notes(sums, MEASURED, trained_at=64) == []


def test_a_mean_over_values_beside_a_summed_kl_is_told_at_half_and_double_the_resolution() -> None:
    weight = 0.05 / 3072  # beta 1 at 32 pixels
    (note,) = resolution_notes(ObjectiveConfig(convention="monai", kl=KLConfig(weight=weight)), MEASURED)
    assert "beta 0.25 at 16 pixels, 1 at 32, 4 at 64" in note
    warned = resolution_notes(ObjectiveConfig(convention="monai", kl=KLConfig(weight=weight)), MEASURED, trained_at=128)
    assert "beta 16 at 128 pixels, 1 at 32" in warned[0]
    assert "init_from was trained at 128 pixels" in warned[1]


def test_nats_an_image_are_told_as_nats_a_latent_value() -> None:
    per_image = 4 * 8 * 8
    (note,) = resolution_notes(ObjectiveConfig(kl=KLConfig(control="target", target=2.0 * per_image)), MEASURED)
    assert "8 at 16 pixels, 2 at 32, 0.5 at 64" in note
    # 128 nats for each of four channels of 64 values.
    (note,) = resolution_notes(ObjectiveConfig(kl=KLConfig(free_bits=128.0)), MEASURED)
    assert "8 at 16 pixels, 2 at 32, 0.5 at 64" in note


@pytest.mark.parametrize(
    ("kl", "reached", "weight", "words"),
    [
        (KL[3], 201.25, 0.5, "KL 200 nats an image: 201.2 at the end of training; the weight, 0.5, is between its bounds"),
        (KL[3], 20.0, 1e-8, "KL 200 nats an image: 20 at the end of training; the weight, 1e-08, is at its lower bound, 1e-08"),
        (KL[4], 0.03, 9999.0, "RMS error 0.05: 0.03 at the end of training; the weight, 1e+04, is at its upper bound, 10000"),
    ],
)
def test_what_a_control_reached_is_told(kl: KLConfig, reached: float, weight: float, words: str) -> None:
    told = describe_objective(ObjectiveConfig(kl=kl), replace(MEASURED, reached=reached, kl_weight=weight))
    assert f"target {words}" in " ".join(" ".join(lines(told)).split())
    assert not any(line.split()[0] == "target" for line in lines(describe_objective(ObjectiveConfig(kl=kl), MEASURED)))


def introduction(init_from: Path | None = None, experimental: ExperimentalConfig | None = None) -> str:
    """The start-up log of a run at 32 pixels, as one line."""
    convention: Any = "monai" if experimental is None else "elbo"
    config = TrainAutoencoderConfig(
        out="run",
        data=DataConfig(resolution=32),
        model=ModelConfig(preset="tiny"),
        objective=ObjectiveConfig(convention=convention, kl=KLConfig(weight=1e-6)),
        experimental=experimental or ExperimentalConfig(),
        init_from=None if init_from is None else str(init_from),
    )
    return " ".join(training.introduction(config, (4, 8, 8), 6, "demo", 3).split())


def test_the_start_up_log_has_the_terms_apart() -> None:
    said = introduction()
    assert "6 training images from demo, 3 held out" in said
    terms = ["pixels and KL mean|e|", "ELBO reported laplace", "perceptual off", "adversarial off", "effective beta", "at 16 pixels"]
    assert [said.index(term) for term in terms] == sorted(said.index(term) for term in terms)
    assert "init_from" not in said


def test_the_start_up_log_names_what_stock_code_does_not_load() -> None:
    said = introduction(experimental=ExperimentalConfig(posterior="flow", encoder_steps=3, encoder_steps_images="1k"))
    assert "posterior flow" in said
    assert "stock code does not load" in said
    assert "3 steps of the encoder alone before each of all, over the first 1,000 images" in said
    assert "experimental" not in introduction()


def test_a_run_from_weights_of_another_resolution_is_warned_at_its_start(tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000001"
    (run / "vae").mkdir(parents=True)
    checkpoint.mkdir(parents=True)
    (run / "vae" / "config.json").write_text("{}")
    (run / "vae" / "preprocessing.json").write_text(json.dumps(artifact.preprocessing(DataConfig(resolution=64), 256)))
    (run / "config.yaml").write_text("out: run\ndata: {resolution: 64}\n")
    (checkpoint / "state.json").write_text("{}")
    (checkpoint / "model.safetensors").touch()
    for weights in (run, checkpoint):
        assert "init_from was trained at 64 pixels" in introduction(weights)
    (run / "vae" / "preprocessing.json").write_text(json.dumps(artifact.preprocessing(DataConfig(resolution=32), 256)))
    assert "init_from" not in introduction(run)
    # Nothing is on record of weights from elsewhere.
    (run / "vae" / "preprocessing.json").unlink()
    assert "init_from" not in introduction(run)


@pytest.mark.usefixtures("one_thread", "no_pictures")
def test_a_run_logs_and_exports_beta_at_its_own_errors_and_weight(tmp_path: Path) -> None:
    kl = ["--objective.kl.weight=1e-3", "--objective.kl.schedule=linear", "--objective.kl.anneal_images=32"]
    argv = [*SMALL, "--train.images=16", "--objective.convention=monai", "--objective.likelihood.name=discretized_logistic", *kl]
    assert train.main([*argv, "--out", str(tmp_path / "run")]) == 0
    config = ObjectiveConfig(convention="monai")
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = [line for line in logged if line["phase"] == "train"]
    assert [line["kl_weight"] for line in seen] == pytest.approx([2.5e-4, 5e-4])
    for line in seen:
        errors = {name: line[name] for name in ("mean_absolute_error", "mean_squared_error")}
        assert line["effective_beta"] == pytest.approx(effective_beta(config, **errors, dims=768, weight=line["kl_weight"]))
        assert line["bits_per_dim"] == pytest.approx(-line["elbo_nats"] / (768 * math.log(2)))
    told = json.loads((tmp_path / "run" / "evaluation.json").read_text())["objective"]
    # The weight that the run came to, half of what was configured: its rise is longer than the run.
    assert (told["convention"], told["assumed"]) == ("monai", False)
    assert told["kl_weight"] == pytest.approx(5e-4)
    assert told["beta"] == pytest.approx(5e-4 * 768 / told["mean_absolute_error"])


@pytest.mark.parametrize("phase", ["train", "validation"])
def test_a_line_of_the_console_has_the_perceptual_term_after_the_account(
    phase: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.0, 10_000.0])
    monkeypatch.setattr("autoencoder.runtime.console.time.monotonic", lambda: next(clock))
    console = Console(5_000_000, shown=True, bar=False)
    scalars = {
        "loss": 234567.8,
        "nll_nats": 234567.8,
        "kl_nats": 12345.6,
        "elbo_nats": -246913.4,
        "perceptual": 0.1234,
        "gradient_norm": 12.5,
    }
    console.line("train", 0, scalars)
    console.line(phase, 1_234_567, scalars | {"bits_per_dim": 3.512})
    first, line = capsys.readouterr().err.splitlines()
    assert "NLL 234,568  KL 12,346  ELBO -246,913  perceptual 0.1234" in first
    assert "NLL 234,568  KL 12,346  3.512 bits/dim  perceptual 0.1234" in line
    assert max(len(first), len(line)) <= COLUMNS


def test_the_weight_is_shown_where_it_moves(capsys: pytest.CaptureFixture[str]) -> None:
    scalars = {"nll_nats": 100.0, "kl_nats": 20.0, "kl_weight": 0.5312, "loss": 110.0}
    Console(1000, shown=True, bar=False, moving=("kl_weight",)).line("train", 500, scalars)
    Console(1000, shown=True, bar=False).line("train", 500, scalars)
    moving, constant = capsys.readouterr().err.splitlines()
    assert "NLL 100  KL 20  weight 0.5312  loss 110" in moving
    assert "NLL 100  KL 20  loss 110" in constant


def test_a_stage_without_an_account_shows_its_loss(capsys: pytest.CaptureFixture[str]) -> None:
    Console(1000, shown=True, bar=False).line("train", 500, {"loss": 1.25, "gradient_norm": math.pi, "lr": 1e-3})
    assert "loss 1.25  gradient 3.142" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "began", "words"),
    [
        ({"weight": 0.25}, None, "once the NLL has stopped falling; the decoder hears it 10,000 images later, in full after 10,000 more"),
        ({"start": "50k", "warmup_images": 0, "ramp_images": 0, "weighting": "fixed"}, None, "weight 0.1 (fixed), from 50,000 images on"),
        ({}, 1234, "from 1,234 images on"),
    ],
)
def test_the_adversarial_term_stands_apart_with_its_start(settings: dict[str, Any], began: int | None, words: str) -> None:
    config = ObjectiveConfig(adversarial=AdversarialConfig(name="hinge", **settings))
    told = describe_objective(config, replace(MEASURED, discriminator_from=began))
    text = " ".join(" ".join(lines(told)).split())
    assert words in text and text.count("in the loss, in no ELBO") == 1
    assert told["beta"] == describe_objective(ObjectiveConfig(), MEASURED)["beta"]
