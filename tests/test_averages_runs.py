"""Runs with several moving averages: each is validated, the best is exported, all of them resume to the same bits."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from autoencoder import export
from autoencoder.runtime.power_ema import exponent
from diffusion import train as train_diffusion
from tests import faults
from tests.children import SMALL, start, wait
from tests.children import run as run_autoencoder
from tests.diffusion_children import LENGTHS, SMALL_DIFFUSION, run
from tests.small_latents import encode_photos, write_photos, write_vae

LAST = "step-00000012"
NAMES = ["ema-0.050", "ema-0.200"]
LOGGED = ["loss_ema_0.050", "loss_ema_0.200"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    latents = encode_photos(write_vae(folder / "vae", seed=0), write_photos(folder / "photos"), folder / "latents")
    # At this rate the short average is the best one at the end, the long one before.
    return [*SMALL_DIFFUSION, *LENGTHS, "--optimizer.lr=1e-2", "--latents", str(latents)]


@pytest.fixture(scope="module")
def unbroken(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert run([*small, "--checkpoint.every_images=8", "--checkpoint.keep=99", "--out", str(folder)], whole=True) == 0
    return folder


def lines(folder: Path, phase: str) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in read if line["phase"] == phase]


def evaluation(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())  # type: ignore[no-any-return]


def weights(folder: Path, name: str, step: str = LAST) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / step / f"{name}.safetensors")


def assert_same(one: Path, other: Path, step: str = LAST) -> None:
    """The log, and every file of the last checkpoint."""
    for phase in ("train", "validation"):
        assert lines(one, phase) == lines(other, phase)
    names = sorted(f.stem for f in (one / "checkpoints" / step).glob("*.safetensors"))
    assert names == sorted(f.stem for f in (other / "checkpoints" / step).glob("*.safetensors"))
    assert {*NAMES, "model", "optimizer"} <= set(names)
    for name in names:
        first, second = weights(one, name, step), weights(other, name, step)
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[key]) for key, value in first.items()), name


@pytest.mark.parametrize("name", NAMES)
def test_each_average_is_that_of_the_weights_after_each_step(unbroken: Path, name: str) -> None:
    steps = [weights(unbroken, "model", f"step-{step:08d}") for step in range(1, 13)]
    power = exponent(float(name.removeprefix("ema-"))) + 1
    shares = [((n + 1) / 12) ** power - (n / 12) ** power for n in range(12)]
    for key, value in weights(unbroken, name).items():
        expected = sum(share * step[key].double() for share, step in zip(shares, steps, strict=True))
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)


def test_the_best_on_validation_is_told_and_exported(unbroken: Path) -> None:
    logged = lines(unbroken, "validation")
    assert len(logged) == 3
    for line in logged:
        assert line["loss"] == min(line[key] for key in LOGGED)
        assert line[LOGGED[0]] != line[LOGGED[1]]
    told = evaluation(unbroken)
    losses = {name: logged[-1][key] for name, key in zip(NAMES, LOGGED, strict=True)}
    chosen = min(losses, key=lambda name: losses[name])
    # Not the one that a run without a validation would have taken.
    assert chosen == "ema-0.050"
    assert told["averages"] == {"chosen": chosen, "losses": losses}
    assert told["metrics"]["loss"]["mean"] == losses[chosen]
    assert json.loads((unbroken / "checkpoints" / LAST / "state.json").read_text())["averages"] == told["averages"]
    exported = load_file(unbroken / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    blocks = {name: value for name, value in weights(unbroken, chosen).items() if name.startswith("dit.")}
    assert len(blocks) > 10
    assert all(torch.equal(value, exported[name.removeprefix("dit.")]) for name, value in blocks.items())
    told_of = "moving average of length 0.050 (sigma_rel, share of the run); the best of these by validation loss: 0.050 "
    assert told_of in (unbroken / "pipeline" / "README.md").read_text()
    page = (unbroken / "report.html").read_text()
    assert f"Validation loss by length of the moving average, at the end of the run: {losses[chosen]:.4f} at 0.050, " in page


# Before anything is saved, between validations, in the second average's validation, and after the last checkpoint.
@pytest.mark.parametrize("kill", [("losses", 1), ("losses", 7), ("noise_levels", 3), ("noise_levels", 6)])
def test_a_killed_run_resumes_every_average_and_the_choice(unbroken: Path, small: list[str], tmp_path: Path, kill: tuple[str, int]) -> None:
    argv = [*small, "--out", str(tmp_path / "run")]
    assert run(argv, kill=kill) == -signal.SIGKILL
    assert run(argv) == 0
    assert_same(unbroken, tmp_path / "run")
    assert evaluation(unbroken)["averages"] == evaluation(tmp_path / "run")["averages"]
    file = Path("pipeline") / "transformer" / "diffusion_pytorch_model.safetensors"
    assert (unbroken / file).read_bytes() == (tmp_path / "run" / file).read_bytes()


@pytest.mark.parametrize(("step", "name"), [(LAST, "ema-0.050"), ("step-00000003", "ema-0.200")])
def test_a_new_phase_starts_from_the_best_average_else_the_longest(
    unbroken: Path, small: list[str], tmp_path: Path, step: str, name: str
) -> None:
    """The checkpoint of step 3 comes before the first validation."""
    given = shutil.copytree(unbroken, tmp_path / "given") / "checkpoints" / step
    argv = [*small, "--train.images=8", "--optimizer.lr=1e-12", "--init_from", str(given), "--out", str(tmp_path / "run")]
    assert run(argv) == 0
    after = weights(tmp_path / "run", "model", "step-00000001")
    assert all(torch.allclose(value, after[key], atol=1e-7) for key, value in weights(unbroken, name, step).items())
    assert not all(torch.allclose(value, after[key], atol=1e-7) for key, value in weights(unbroken, "model", step).items())


def test_the_preflight_tells_what_the_averages_take(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusion import pipeline

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "gate", lambda *_: 0.0)
        assert train_diffusion.main([*small, "--preflight", "--out", str(tmp_path / "run")]) == 0
    assert "  averages     2 of the weights, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["--train.ema_halflife_images=40"],
            "train.ema_halflife_images: got 40; train.ema_lengths is [0.05, 0.2] beside it; give one of the two",
        ),
        (["--train.ema_lengths=[0.5]"], "train.ema_lengths: got 0.5; give shares of the run, 0.005 to 0.288"),
        (["--train.ema_rampup=0.1"], "train.ema_rampup: got 0.1; it would have no effect: train.ema_halflife_images is null"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    assert train_diffusion.main([*small, *given, "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err


def test_an_autoencoder_is_exported_with_its_best_average(tmp_path: Path) -> None:
    argv = [*SMALL, *LENGTHS, "--train.images=96", "--out", str(tmp_path / "run")]
    assert run_autoencoder(argv) == 0
    (line, *_, last) = lines(tmp_path / "run", "validation")
    # At beta 1, and with the analytic scale, what is compared is the bound.
    assert min(last[key] for key in LOGGED) == pytest.approx(-last["elbo_nats"], rel=1e-6)
    assert line[LOGGED[0]] != line[LOGGED[1]]
    told = evaluation(tmp_path / "run")["averages"]
    assert told["losses"][told["chosen"]] == min(told["losses"].values())
    exported = load_file(tmp_path / "run" / "vae" / "diffusion_pytorch_model.safetensors")
    average = weights(tmp_path / "run", told["chosen"])
    assert torch.equal(exported["encoder.conv_in.weight"], average["vae.encoder.conv_in.weight"])
    assert export.main(["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    said = f"Weights: moving average of length {told['chosen'].removeprefix('ema-')} (sigma_rel, share of the run); the best of these"
    assert said in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_after_a_return_to_a_checkpoint_the_averages_are_those_of_a_sound_run(tmp_path: Path) -> None:
    """At an unchanged learning rate, what a fault left behind would be all the difference."""
    argv = [
        *SMALL, *LENGTHS, "--train.images=96", "--log.every_images=16", "--checkpoint.every_images=32", "--train.on_nonfinite=rollback",
        "--train.rollback_lr=1",
    ]  # fmt: skip
    faulty, sound = _with_fault(tmp_path / "faulty", argv, until=1), _with_fault(tmp_path / "sound", argv, until=0)
    assert lines(faulty, "rollback") and not lines(sound, "rollback")
    assert_same(faulty, sound)


def _with_fault(out: Path, argv: list[str], until: int) -> Path:
    """A run whose image 75 is not finite before it has gone back `until` times."""
    output = out.with_name(f"{out.name}.stderr")
    code = wait(start(faults.train, [*argv, "--out", str(out)], "vae.decoder.conv_in", 75, until, output, None))
    assert code == 0, output.read_text()
    return out
