"""A perceptual distance of the user's own: what is demanded of it, and whole runs with one."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from autoencoder import evaluate, train
from autoencoder.config import TrainAutoencoderConfig
from autoencoder.objective_config import PerceptualConfig
from autoencoder.own_distance import OwnDistance
from autoencoder.perceptual import build_perceptual
from autoencoder.runtime import cli
from autoencoder.runtime.errors import ConfigError
from autoencoder.runtime.own_class import OwnClass
from tests.children import SMALL
from tests.test_training import lines

SHORT = [*SMALL, "--train.images=32", "--log.validate_every_images=32"]
OWN = ["--objective.perceptual.name=own", "--objective.perceptual.weight=3"]


pytestmark = pytest.mark.usefixtures("one_thread")


def distance(name: str, **arguments: Any) -> OwnDistance:
    made = build_perceptual(PerceptualConfig(name="own", own=OwnClass(class_path=f"tests.own_classes.{name}", init_args=arguments)))
    assert isinstance(made, OwnDistance)
    return made


CPU = torch.device("cpu")


def test_it_is_frozen_seeded_and_takes_the_callers_gradient() -> None:
    torch.manual_seed(4)
    before = torch.get_rng_state()
    made, again = distance("Blurred", width=2), distance("Blurred", width=2)
    assert torch.equal(before, torch.get_rng_state())
    for one in (made, again):
        one.check((3, 16, 16), CPU)
    x, y = torch.rand(3, 3, 16, 16), torch.rand(3, 3, 16, 16, requires_grad=True)
    value = made.train()(x, y)
    assert torch.equal(value, again(x, y)) and value.shape == (3,)
    value.sum().backward()
    assert y.grad is not None and y.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in made.parameters()) and not any(m.training for m in made.modules())


def test_a_value_an_image_may_have_more_axes_and_comes_back_in_full_precision() -> None:
    made = distance("Squared")
    made.check((3, 16, 16), CPU, may_miss=True)
    x, y = torch.rand(3, 3, 16, 16), torch.rand(3, 3, 16, 16)
    assert made(x, y.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(made(x, y), (x - y).square().mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("map", r"images \(2, 3, 16, 16\) give \(2, 16, 16\); give a value an image, \(2,\)"),
        ("mean", r"give \(\); give a value an image"),
        ("tuple", r"it gives a tuple, not a tensor"),
        ("raises", r"it raised RuntimeError: no luck \(own_classes.py, line \d+\)"),
        ("infinite", r"not finite for images .* of noise and of zeros"),
        ("cut", r"no gradient to the reconstruction"),
        ("flat", r"no gradient to the reconstruction"),
        ("coupled", r"changes by .* with the other images of its batch"),
        ("random", r"changes by .* from call to call"),
        ("overwrites", r"it changes its input"),
        ("overwrites images", r"it changes its input"),
        ("backward", r"raised RuntimeError: no way back \(own_classes.py, line \d+\)"),
        ("pairs", r"called with images \(1, 3, 16, 16\) it raised IndexError: .* \(own_classes.py, line \d+\)"),
        ("leaves", r"it raised SystemExit \(own_classes.py, line \d+\)"),
    ],
)
def test_what_is_no_distance_an_image_is_refused(fault: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        distance("Faulty", fault=fault).check((3, 16, 16), CPU)
    assert str(error.value).startswith("objective.perceptual.own.class_path: got 'tests.own_classes.Faulty'; ")


def test_a_root_is_refused_only_where_pixels_may_be_missing() -> None:
    distance("Rooted").check((3, 16, 16), CPU)
    with pytest.raises(ConfigError, match=r"not finite where the reconstruction equals the image, as missing pixels do"):
        distance("Rooted").check((3, 16, 16), CPU, may_miss=True)


@pytest.mark.parametrize("by", ["numpy", "random"])
def test_what_other_generators_draw_for_it_is_the_same_every_time(by: str) -> None:
    before, numpy_before = random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    made, again = distance("Drawn", by=by), distance("Drawn", by=by)
    assert random.getstate() == before
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # type: ignore[arg-type]  # noqa: NPY002
    assert torch.equal(made.module.weight, again.module.weight)  # type: ignore[arg-type]


def test_weights_that_no_seed_decides_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^objective\.perceptual\.own\.class_path: .* twice gives two values of weight"):
        distance("Drawn", by="system")


def test_a_class_that_is_no_module_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gives a Constant; give a class that is a torch\.nn\.Module"):
        distance("Constant")
    with pytest.raises(ConfigError, match=r"features\.weight is of a lazy module"):
        distance("Lazy")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--objective.perceptual.name=own"], "objective.perceptual.own.class_path: not given; name `own` needs the class"),
        (["--objective.perceptual.own=tests.own_classes.Blurred"], "give objective.perceptual.name=own with it"),
        ([*OWN, "--objective.perceptual.own=tests.own_classes.Blured"], "has no Blured (closest: Blurred)"),
        ([*OWN, "--objective.perceptual.own=tests.own_classes.Blurred", "--objective.perceptual.own.init_args.wide=3"], "takes (width"),
        ([*OWN, "--objective.perceptual.own=tests.own_classes.Faulty", "--objective.perceptual.own.init_args.fault=cut"], "no gradient"),
    ],
)
def test_a_run_that_cannot_have_it_ends_at_its_start(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*SHORT, *argv, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: objective.perceptual.own.") and said.count("\n") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_with_one_logs_it_and_names_it_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = "tests.own_classes.Blurred"
    argv = [*SHORT, *OWN, f"--objective.perceptual.own={path}", "--objective.perceptual.own.init_args.width=2"]
    assert train.main([*argv, "--log.gradient_norms", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    told = said.out + said.err
    assert f"{path}(width=2), weight 3: in the loss" in told and f"perceptual distance: {path}(width=2), 0.00 M parameters" in told
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["objective"]["perceptual"]["own"] == {
        "class_path": path,
        "init_args": {"width": 2},
    }
    training = [line for line in lines(tmp_path / "run") if line["phase"] == "train"]
    assert all(line["perceptual"] > 0 and line["gradient_norm_perceptual"] > 0 for line in training)
    named = json.loads((tmp_path / "run" / "evaluation.json").read_text())["objective"]["perceptual"]
    assert named == {"name": path, "init_args": {"width": 2}, "weight": 3.0}
    assert f"{path}(width=2)" in (tmp_path / "run" / "report.html").read_text()
    held = {f.stem for f in (tmp_path / "run").glob("checkpoints/*/*.safetensors")}
    assert not any("perceptual" in name for name in held)
    out = tmp_path / "f.json"
    assert evaluate.main(["--model", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["objective"]["perceptual"]["name"] == path
    # Another argument is another run.
    assert train.main([*argv, "--objective.perceptual.own.init_args.width=3", "--out", str(tmp_path / "run")]) == 2
    assert "objective.perceptual.own.init_args.width: 2 -> 3" in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
def test_missing_pixels_are_shown_to_it_as_if_reproduced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.random.default_rng(0).integers(1, 255, (4, 24, 24, 3), dtype=np.uint8)
    images[:, :12] = 0
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(images):
        np.save(tmp_path / "photos" / f"{number}.npy", image)
    data = [f"--data.source={tmp_path / 'photos'}", "--data.nodata=0", "--data.low=0", "--data.high=255"]
    argv = [*SHORT, *data, *OWN, "--out", str(tmp_path / "run")]
    assert train.main([*argv, "--objective.perceptual.own=tests.own_classes.Rooted"]) == 2
    assert "as missing pixels do" in capsys.readouterr().err
    assert train.main([*argv, "--objective.perceptual.own=tests.own_classes.Squared"]) == 0
    training = [line for line in lines(tmp_path / "run") if line["phase"] == "train"]
    # A mean over all values, where the run's own mean squared error is one over those that are observed.
    for line in training:
        assert line["perceptual"] == pytest.approx(line["mean_squared_error"] * line["valid_share"], rel=0.1)


def test_one_of_a_file_that_is_switched_off_is_not_looked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.yaml").write_text("objective: {perceptual: {name: own, own: no_such_module.Distance}}")
    argv = [*SHORT, f"--config={tmp_path / 'own.yaml'}", f"--out={tmp_path / 'run'}"]
    train.check(cli.parse(TrainAutoencoderConfig, [*argv, "--objective.perceptual.name=ssim"], prog="x", description="x"))
    assert train.main(argv) == 2
    assert "there is no module no_such_module" in capsys.readouterr().err
