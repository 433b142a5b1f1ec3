"""A diffusion run's latents are of one encoder: another is refused or noted, another decoder noted, statistics are frozen."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.diffusion_children import SMALL_DIFFUSION, begin, refusal, run
from tests.small_latents import Data, encode_photos, write_data, write_photos


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def begun(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after a checkpoint."""
    return begin(data.latents, tmp_path_factory.mktemp("begun") / "run")


def hashes(vae: Path) -> dict[str, str]:
    told = json.loads((vae / "preprocessing.json").read_text())
    return {key: told[key] for key in ("encoder_hash", "decoder_hash")}


def evaluation(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())  # type: ignore[no-any-return]


def notes(folder: Path) -> list[str]:
    return evaluation(folder)["provenance"]["notes"]  # type: ignore[no-any-return]


def assert_noted(folder: Path, output: Path, *said: str) -> None:
    """One note in log and provenance has all of `said`."""
    assert [all(word in note for word in said) for note in notes(folder)].count(True) == 1, notes(folder)
    assert any(all(word in line for word in said) for line in output.read_text().splitlines())


def test_another_encoder_is_refused_with_both_hashes_or_allowed_and_noted(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "run", tmp_path / "output"
    argv = ["--latents", str(data.latents), "--vae", str(data.other), "--train.images=16", "--out", str(folder)]
    both = [hashes(data.vae)["encoder_hash"], hashes(data.other)["encoder_hash"]]
    message = refusal(capsys, argv)
    assert all(said in message for said in (*both, "error: vae: ", "--allow_vae_mismatch"))
    assert run([*SMALL_DIFFUSION, *argv, "--allow_vae_mismatch=true"], output=output) == 0
    assert_noted(folder, output, *both, "allow_vae_mismatch")
    assert evaluation(folder)["provenance"]["encoder_hash"] == both[0]


def test_latents_that_were_replaced_under_a_run(data: Data, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latents, folder, output = tmp_path / "latents", tmp_path / "run", tmp_path / "output"
    shutil.copytree(data.latents, latents)
    argv = ["--latents", str(latents), "--out", str(folder)]
    assert run([*SMALL_DIFFUSION, *argv], kill=("losses", 7)) < 0
    frozen = (folder / "latents.json").read_bytes()
    shutil.rmtree(latents)
    shutil.copytree(data.other_latents, latents)
    both = [hashes(data.vae)["encoder_hash"], hashes(data.other)["encoder_hash"]]
    message = refusal(capsys, argv)
    assert all(said in message for said in (*both, "error: latents: ", "--allow_vae_mismatch"))
    assert run([*SMALL_DIFFUSION, *argv, "--allow_vae_mismatch=true"], output=output) == 0
    assert_noted(folder, output, *both, "of this run")
    assert "going on from step-00000006" in output.read_text()
    assert (folder / "latents.json").read_bytes() == frozen


def test_weights_of_a_run_on_another_encoder(data: Data, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = tmp_path / "run", tmp_path / "output"
    argv = ["--latents", str(data.other_latents), "--init_from", str(begun), "--train.images=32", "--out", str(folder)]
    both = [hashes(data.vae)["encoder_hash"], hashes(data.other)["encoder_hash"]]
    message = refusal(capsys, argv)
    assert all(said in message for said in (*both, "error: init_from: ", "--allow_vae_mismatch"))
    # The note is of the first start, but belongs to the run: it outlives a kill.
    assert run([*SMALL_DIFFUSION, *argv, "--allow_vae_mismatch=true"], kill=("losses", 3), output=output) < 0
    assert run([*SMALL_DIFFUSION, *argv, "--allow_vae_mismatch=true"]) == 0
    assert_noted(folder, output, *both, "allow_vae_mismatch")
    assert any("another normalisation" in note for note in notes(folder))


def test_another_decoder_is_noted_and_drawn_with(data: Data, begun: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "run", tmp_path / "output"
    shutil.copytree(begun, folder)
    argv = [*SMALL_DIFFUSION, "--latents", str(data.latents), "--vae", str(data.finer), "--out", str(folder)]
    assert run(argv, output=output) == 0
    assert_noted(folder, output, hashes(data.vae)["decoder_hash"], hashes(data.finer)["decoder_hash"])
    given, exported = (load_file(vae / "diffusion_pytorch_model.safetensors") for vae in (data.finer, folder / "pipeline" / "vae"))
    folded = json.loads((folder / "pipeline" / "vae" / "preprocessing.json").read_text())["folded"]
    assert folded["of"]["decoder_hash"] == hashes(data.finer)["decoder_hash"]
    decoder = [name for name in given if name.startswith("decoder.")]
    assert all(np.array_equal(given[name], exported[name]) for name in decoder)
    own = load_file(data.vae / "diffusion_pytorch_model.safetensors")
    assert not all(np.array_equal(own[name], exported[name]) for name in decoder)


def test_statistics_stay_those_of_the_first_start(data: Data, tmp_path: Path) -> None:
    latents, folder, output = tmp_path / "latents", tmp_path / "run", tmp_path / "output"
    shutil.copytree(data.latents, latents)
    argv = [*SMALL_DIFFUSION, "--latents", str(latents), "--out", str(folder)]
    assert run(argv, kill=("losses", 7)) < 0
    frozen = json.loads((folder / "latents.json").read_text())
    shutil.rmtree(latents)
    encode_photos(data.vae, write_photos(tmp_path / "photos", each=35), latents)
    manifest = json.loads((latents / "manifest.json").read_text())
    assert not np.allclose(manifest["statistics"]["mean"], frozen["mean"])
    assert run(argv, output=output) == 0
    assert json.loads((folder / "latents.json").read_text()) == frozen
    assert_noted(folder, output, "60 rows then, 70 now", "keeps the normalisation")
    folded = json.loads((folder / "pipeline" / "vae" / "preprocessing.json").read_text())["folded"]
    assert (folded["mean"], folded["std"]) == (frozen["mean"], frozen["std"])
