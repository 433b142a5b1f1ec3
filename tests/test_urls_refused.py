"""What only disks have: commands that read latents or write elsewhere than `encode_dataset` refuse URLs, and say how to copy."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from autoencoder import encode, verify_latents
from autoencoder.latents.reader import Latents, LatentsError
from tests.encode_children import files, photos, small_model
from tests.small_latents import encode_photos

NAMES = [f"{kind}/{k}.png" for kind in ("ape", "bee") for k in range(4)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos`, `vae`, and latents of them on a disk, `local`."""
    folder = tmp_path_factory.mktemp("urls")
    small_model(folder / "vae")
    photos(folder / "photos", NAMES)
    encode_photos(folder / "vae", folder / "photos", folder / "local")
    return folder


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], command: Callable[[list[str]], int]) -> str:
    capsys.readouterr()
    assert command(argv) == 2
    return capsys.readouterr().err


def test_other_commands_say_how_to_copy_latents_and_the_copy_is_whole(
    setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"file://{tmp_path}/there"
    # The same command as of `local` but for its place.
    argv = ["--model", str(setting / "vae"), "--data.source", str(setting / "photos"), "--data.workers=0", "--precision=fp32"]
    assert encode.main([*argv, "--shard_rows=32", f"--out={url}"]) == 0
    message = refused(capsys, [f"--latents={url}"], verify_latents.main)
    assert f"latents: got '{url}'; rows are mapped from a disk; copy the folder to one first" in message
    with pytest.raises(LatentsError, match="rows are mapped from a disk; copy the folder to one first"):
        Latents(url)
    monkeypatch.chdir(tmp_path)
    code = message.partition('python -c "')[2].partition('"')[0]
    subprocess.run([sys.executable, "-c", code], check=True)
    assert files(tmp_path / "latents") == files(setting / "local")
    assert len(Latents(tmp_path / "latents").check()) == 8


def test_commands_that_write_on_disks_refuse_urls_before_anything_starts(
    setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from autoencoder import evaluate, export, export_latents, inspect_data, reconstruct, train
    from autoencoder.report import command as report
    from diffusion import sample
    from diffusion import train as train_diffusion

    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    model, latents, photo = str(setting / "vae"), str(setting / "local"), str(setting / "photos")
    for command, given in (
        (train.main, ["--data.source=demo"]),
        (evaluate.main, ["--model", model, "--data.source", photo]),
        (export.main, ["--checkpoint", model]),
        (export_latents.main, ["--latents", latents]),
        (verify_latents.main, ["--latents", latents]),
        (inspect_data.main, ["--source", photo]),
        (reconstruct.main, ["--model", model, "--input", photo]),
        (report.main, ["run"]),
        (sample.main, ["--pipeline", model]),
        (train_diffusion.main, ["--latents", latents]),
    ):
        message = refused(capsys, [*given, "--out=s3://bucket/x"], command)
        assert message == (
            "error: out: got 's3://bucket/x'; encode_dataset alone writes behind URLs; give a path on a disk, and copy it when it is done\n"
        )
    for reads in (train_diffusion.main, export_latents.main, reconstruct.main):
        assert "copy the folder to one first" in refused(capsys, ["--latents=s3://bucket/x", "--out=y"], reads)
    assert sorted(tmp_path.rglob("*")) == before
