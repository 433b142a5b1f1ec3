"""The examples of docs/extending.md: their files as they stand in the page, its commands at a small size."""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoencoder.adversarial.saved import FILE
from diffusion.command import main
from tests.children import SMALL
from tests.test_training import lines

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line.startswith("firststage ")]
SIZE = [
    *SMALL, "--train.images=48", "--log.validate_every_images=48", "--train.compile=false", "--data.resize=null",
    "--optimizer.warmup_images=0",
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread", "no_report")
GAME = [
    "--objective.adversarial.start=8", "--objective.adversarial.warmup_images=8", "--objective.adversarial.ramp_images=8",
    "--objective.adversarial.gate=[0,1]",
]  # fmt: skip


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the page's files in it, and some images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names = []
    for kind, text in BLOCKS:
        if kind in ("python", "yaml"):
            name = text.partition("\n")[0].removeprefix("# ")
            (tmp_path / name).write_text(text)
            names.append(name)
    assert names == ["mine.py", "critic.py", "critic.yaml", "frames.py"]
    frames = np.random.default_rng(0).integers(0, 256, (24, 20, 24, 3), dtype=np.uint8)
    np.save(tmp_path / "recording.npy", frames)
    (tmp_path / "photos").mkdir()
    for number, frame in enumerate(frames[:8]):
        Image.fromarray(frame).save(tmp_path / "photos" / f"{number}.png")
    yield tmp_path
    for name in names:
        sys.modules.pop(name.removesuffix(".py"), None)


def run(out: str) -> None:
    """The page's commands that make or read `out`, in order."""
    found = [shlex.split(line)[1:] for line in COMMANDS if out in line]
    assert found
    for argv in found:
        small: list[str] = []
        if argv[0] == "train_autoencoder":
            # Beside the example neither LPIPS, whose weights are not here, nor PatchGAN, which such images are too small for.
            unused = {"perceptual": "--objective.perceptual.name=own" not in argv, "adversarial": "critic.yaml" not in argv}
            game = [] if unused["adversarial"] else GAME
            small = [*SIZE, *game, *(f"--objective.{term}.name=none" for term, off in unused.items() if off)]
        assert main([*argv, *small]) == 0


def test_the_distance_trains(written: Path) -> None:
    run("spectrum")
    assert all(line["perceptual"] > 0 for line in lines(Path("runs/spectrum")) if line["phase"] == "train")


def test_the_discriminator_trains(written: Path) -> None:
    run("critic")
    assert (written / "runs" / "critic" / FILE).is_file()
    assert any(line.get("adversarial_weight", 0) > 0 for line in lines(Path("runs/critic")))


def test_the_images_are_inspected_trained_on_measured_and_encoded(written: Path) -> None:
    run("frames")
    manifest = json.loads((written / "latents" / "frames" / "manifest.json").read_text())
    assert manifest["segments"][0]["source"]["own"] == {"class_path": "frames.Frames", "init_args": {"file": "recording.npy"}}
    assert manifest["rows"] == 24 and manifest["labels"] == ["first", "second", "third", "last"]
