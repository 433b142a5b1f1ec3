"""A start that is refused leaves its folder as it found it."""

from pathlib import Path

import pytest

from autoencoder import encode, train
from autoencoder.adversarial.game import Game
from autoencoder.latents.folder import LatentsFolder
from autoencoder.model import build
from autoencoder.model_config import ModelConfig
from autoencoder.runtime.config import TrainConfig
from autoencoder.runtime.errors import UsageError
from autoencoder.runtime.run_folder import RunFolder
from diffusion import train as train_diffusion
from tests.children import SMALL
from tests.test_run_folder import Config

DEPTH = ["--objective.likelihood.name=discretized_logistic", "--objective.likelihood.levels=65536"]
"""Refused at the first batch, when trackers have started."""
SPLIT = ["--data.split=nowhere"]


pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


@pytest.mark.parametrize("refused", [DEPTH, SPLIT])
def test_nothing_stays_of_a_folder_that_was_not_there(tmp_path: Path, refused: list[str]) -> None:
    argv = [a for a in SMALL if "trackers" not in a]
    assert train.main([*argv, *refused, f"--out={tmp_path / 'a' / 'run'}"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_empty_again_and_a_mended_start_meets_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*SMALL, *DEPTH, f"--out={tmp_path}"]) == 2
    assert list(tmp_path.iterdir()) == []
    assert train.main([*SMALL, "--train.images=8", "--resume=never", f"--out={tmp_path}"]) == 0


def test_what_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("left by a crash")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert train.main([*SMALL, *SPLIT, f"--out={tmp_path / 'other'}"]) == 2
    assert train.main([*SMALL, *SPLIT, f"--out={tmp_path / 'new'}"]) == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".lock", "file", "other"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    assert train.main([*SMALL, *SPLIT, f"--out={tmp_path / 'run'}"]) == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_run_that_has_begun_stays(tmp_path: Path) -> None:
    argv = [*SMALL, f"--out={tmp_path}"]
    assert train.main([*argv, "--train.images=8"]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert train.main([*argv, "--train.images=16", "--log.trackers=[nonesuch]"]) == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"} == before
    assert train.main([*argv, "--train.images=8"]) == 0


def test_checkpoints_under_the_new_configuration_keep_it(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, Config(), resume="auto").close()
    (tmp_path / "metrics.jsonl").touch()
    run = RunFolder.open(tmp_path, Config(train=TrainConfig(images="30k")), resume="auto")
    checkpoint = tmp_path / "checkpoints" / "step-00000008"
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete").touch()
    run.withdraw()
    run.close()
    assert "30k" in (tmp_path / "config.yaml").read_text()


def test_what_others_put_there_meanwhile_stays(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "run", Config(), resume="auto")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run.withdraw()
    run.close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_nothing_goes_of_a_folder_that_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    for folder in (RunFolder.open(tmp_path / "run", Config(), resume="auto"), LatentsFolder(tmp_path / "latents")):
        (folder.path / ("metrics.jsonl" if folder.path.name == "run" else "plan.json")).write_text("of another process")
        before = sorted(folder.path.iterdir())
        folder.withdraw()
        folder.close()
        assert sorted(folder.path.iterdir()) == before


def test_a_start_that_is_not_refused_but_fails_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("a programming error")

    monkeypatch.setattr(Game, "__init__", fails)
    with pytest.raises(RuntimeError, match="a programming error"):
        train.main([*SMALL, "--objective.adversarial.name=hinge", "--objective.adversarial.layers=1", f"--out={tmp_path / 'run'}"])
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_latents_and_diffusion_runs_alike(tmp_path: Path) -> None:
    build(ModelConfig(preset="tiny"), channels=3, resolution=16).save_pretrained(tmp_path / "vae")
    argv = [f"--model={tmp_path / 'vae'}", "--data.source=demo", f"--out={tmp_path / 'latents'}"]
    assert encode.main([*argv, "--data.resolution=15"]) == 2
    assert not (tmp_path / "latents").exists()
    assert encode.main([*argv, "--data.resolution=16", "--data.workers=0"]) == 0
    argv = [f"--latents={tmp_path / 'latents'}", f"--out={tmp_path / 'run'}", "--log.trackers=[nonesuch]", "--train.images=64"]
    assert train_diffusion.main([*argv, "--model.preset=dit-s"]) == 2
    assert not (tmp_path / "run").exists()


def test_another_process_is_not_let_in_while_things_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink, refusals = Path.unlink, []

    def unlinked(path: Path, **options: bool) -> None:
        if path.name == "config.yaml":
            with pytest.raises(UsageError, match="in use") as error:
                RunFolder.open(path.parent, Config(), resume="auto")
            refusals.append(str(error.value))
        unlink(path, **options)

    run = RunFolder.open(tmp_path / "run", Config(), resume="auto")
    monkeypatch.setattr(Path, "unlink", unlinked)
    run.withdraw()
    run.close()
    assert len(refusals) == 1
    assert not (tmp_path / "run").exists()


def test_a_preflight_of_latents_takes_nothing_away_from_who_holds_the_folder(tmp_path: Path) -> None:
    dry, holder = LatentsFolder(tmp_path, dry=True), LatentsFolder(tmp_path)
    dry.withdraw()
    assert (tmp_path / ".lock").is_file()
    holder.close()
