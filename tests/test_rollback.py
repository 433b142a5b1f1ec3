"""Whole runs whose network goes wrong: stopped with module and images named, skipped, or taken back to a checkpoint, exactly."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from autoencoder.runtime.rollback import newest_sound
from tests.children import SMALL, start, together, wait
from tests.faults import train

# Steps of eight images, a log line every second one, a checkpoint every fourth: the image at 75 is in the tenth of twenty steps.
ARGV = [*SMALL, "--log.every_images=16", "--checkpoint.every_images=32", "--log.validate_every_images=1000"]
FAULTY = 75
ROOT = Path(__file__).parents[1]


def run(out: Path, *argv: str, place: str = "vae.decoder.conv_in", until: int = 1, kill_at: int | None = None) -> tuple[int, str]:
    """Exit code and messages."""
    output = out.with_name(f"{out.name}.stderr")
    code = wait(start(train, [*ARGV, *argv, "--out", str(out)], place, FAULTY, until, output, kill_at))
    return code, output.read_text()


def lines(folder: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in read]


def states(folder: Path) -> dict[str, torch.Tensor]:
    newest = max(folder.glob("checkpoints/step-*"))
    return {f"{file.stem}/{key}": value for file in newest.glob("*.safetensors") for key, value in load_file(file).items()}


def assert_same(one: Path, other: Path) -> None:
    assert lines(one) == lines(other)
    first, second = states(one), states(other)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.fixture(scope="module")
def rolled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("rolled") / "run"
    code, told = run(folder, "--train.on_nonfinite=rollback", "--train.rollback_lr=0.25", until=2)
    assert code == 0, told
    return folder, told


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("vae.decoder.conv_in", "the output of vae.decoder.conv_in"),
        ("vae.encoder.mid_block.resnets.0.conv1", "the output of vae.encoder.mid_block.resnets.0.conv1"),
        # An infinite gradient there first shows at what comes before it on the way back.
        ("vae.decoder.mid_block.resnets.1.norm2:backward", "the gradient at the output of vae.decoder.mid_block.resnets.1.norm2"),
    ],
)
def test_a_stopped_run_names_module_and_image(tmp_path: Path, place: str, named: str) -> None:
    code, told = run(tmp_path / "run", place=place)
    assert code == 1
    assert "non-finite" in told and "in the steps up to 10, in step 10 first in " + named in told
    # One of the demo's six photos, and of the eight in the batch only it.
    assert told.split(named)[1].split(";")[0].startswith(", of image ")
    assert "Traceback" not in told


def test_a_skipping_run_says_where_and_goes_on(tmp_path: Path) -> None:
    code, told = run(tmp_path / "run", "--train.on_nonfinite=skip")
    assert code == 0
    assert "in step 10 first in the output of vae.decoder.conv_in" in told
    (bad,) = [line for line in lines(tmp_path / "run") if line.get("nonfinite")]
    assert (bad["step"], bad["skipped_steps"]) == (10, 1)


def test_a_rollback_goes_back_lowers_the_learning_rate_and_is_in_the_log(rolled: tuple[Path, str]) -> None:
    folder, told = rolled
    back = [line for line in lines(folder) if line["phase"] == "rollback"]
    assert [(line["step"], line["images"], line["from_step"], line["lr_factor"]) for line in back] == [
        (8, 64, 10, 0.25),
        (8, 64, 10, 0.0625),
    ]
    assert told.count("back to 64 images") == 2
    shown = [line["step"] for line in lines(folder) if line["phase"] == "train"]
    assert shown == list(range(2, 21, 2))
    rates = {line["step"]: line["lr"] for line in lines(folder) if line["phase"] == "train"}
    assert rates[12] / rates[8] == pytest.approx(0.0625 * (1 + torch.cos(torch.tensor(0.6 * torch.pi))).item()
                                                 / (1 + torch.cos(torch.tensor(0.4 * torch.pi))).item(), rel=1e-5)  # fmt: skip


def test_what_follows_a_rollback_is_what_follows_the_checkpoint_at_the_lower_rate(rolled: tuple[Path, str], tmp_path: Path) -> None:
    """A run that goes on from the step-8 checkpoint of a sound run, with the same returns in its state, has the same bits."""
    sound = tmp_path / "sound"
    assert run(sound, "--train.on_nonfinite=rollback", "--train.rollback_lr=0.25", until=0, kill_at=9)[0] == -signal.SIGKILL
    state = sound / "checkpoints" / "step-00000008" / "state.json"
    told = json.loads(state.read_text())
    back = [{k: v for k, v in line.items() if k != "phase"} for line in lines(rolled[0]) if line["phase"] == "rollback"]
    state.write_text(json.dumps(told | {"rollbacks": back}))
    assert run(sound, "--train.on_nonfinite=rollback", "--train.rollback_lr=0.25", until=0)[0] == 0
    assert_same(sound, rolled[0])


# The steps of a process: ten, two more after the first return, two after the second, then on to the end.
@pytest.mark.parametrize("kill_at", [10, 11, 13, 15])
def test_a_run_killed_around_its_rollbacks_resumes_to_the_same_bits(rolled: tuple[Path, str], tmp_path: Path, kill_at: int) -> None:
    out, argv = tmp_path / "run", ("--train.on_nonfinite=rollback", "--train.rollback_lr=0.25")
    assert run(out, *argv, until=2, kill_at=kill_at)[0] == -signal.SIGKILL
    assert run(out, *argv, until=2)[0] == 0
    assert_same(out, rolled[0])


def test_a_run_that_goes_wrong_at_any_rate_stops_after_its_rollbacks(tmp_path: Path) -> None:
    code, told = run(tmp_path / "run", "--train.on_nonfinite=rollback", "--train.rollbacks=1", until=9)
    assert code == 1
    assert "after 1 return to a checkpoint (train.rollbacks)" in told
    assert "Traceback" not in told


def test_a_run_without_a_sound_checkpoint_goes_back_to_its_start(tmp_path: Path) -> None:
    code, told = run(tmp_path / "run", "--train.on_nonfinite=rollback", "--checkpoint.every_images=null", "--train.images=96")
    assert code == 0, told
    assert [line["step"] for line in lines(tmp_path / "run") if line["phase"] == "rollback"] == [0]


def test_a_checkpoint_after_the_bad_step_is_not_gone_back_to(tmp_path: Path) -> None:
    # The next log line comes two checkpoints after the bad step: those two would lead to it again.
    argv = ("--train.on_nonfinite=rollback", "--log.every_images=64", "--checkpoint.every_images=8", "--train.images=136")
    code, told = run(tmp_path / "run", *argv)
    assert code == 0, told
    assert [(line["step"], line["from_step"]) for line in lines(tmp_path / "run") if line["phase"] == "rollback"] == [(9, 16)]


def test_the_newest_checkpoint_without_bad_steps_is_chosen(tmp_path: Path) -> None:
    for step, bad in ((1, []), (2, []), (3, ["loss"])):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps({"nonfinite": bad}))
        (folder / "complete").touch()
    assert newest_sound(tmp_path) == tmp_path / "step-00000002"
    assert newest_sound(tmp_path / "none") is None


def test_two_processes_go_back_together(rolled: tuple[Path, str], tmp_path: Path) -> None:
    argv = [*ARGV, "--train.on_nonfinite=rollback", "--train.rollback_lr=0.25", "--out", str(tmp_path / "run")]
    together(2, tmp_path / "console", train, argv, "vae.decoder.conv_in", FAULTY, 2)
    said = (tmp_path / "console").read_text()
    assert said.count("in step 10 first in the output of vae.decoder.conv_in, of image ") == 2
    one, two = lines(rolled[0]), lines(tmp_path / "run")
    assert [(line["phase"], line["step"]) for line in one] == [(line["phase"], line["step"]) for line in two]
    assert one[-1]["nll_nats"] == pytest.approx(two[-1]["nll_nats"], rel=1e-3)
