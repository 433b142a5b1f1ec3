"""`encode_dataset` from its command line: bad input, another plan, preflight, what a second start does."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from autoencoder import encode
from autoencoder.latents.reader import Latents, LatentsError
from tests.encode_children import files, photos, small_model

ROOT = Path(__file__).parents[1]
NAMES = [f"{kind}/{k}.png" for kind in ("ape", "bee") for k in range(3)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    small_model(folder / "vae")
    small_model(folder / "other", seed=1)
    photos(folder / "photos", NAMES)
    photos(folder / "moved", NAMES)
    photos(folder / "fewer", NAMES[:5], seed=1)
    (folder / "empty").mkdir()
    assert encode.main(arguments(folder, folder / "done")) == 0
    return folder


def arguments(setting: Path, out: Path, *more: str) -> list[str]:
    base = [f"--model={setting / 'vae'}", f"--data.source={setting / 'photos'}", "--data.workers=0", "--precision=fp32", "--shard_rows=4"]
    return [*base, f"--out={out}", *(a.replace("SETTING", str(setting)) for a in more)]


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    capsys.readouterr()
    assert encode.main(argv) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert "error: " in message
    return message


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model=SETTING/no"], "model: got"),
        (["--model=SETTING/empty"], "no autoencoder in it"),
        (["--data.source=SETTING/no"], "data.source: got"),
        (["--data.source=SETTING/empty"], "holds no images"),
        (["--data.source=null"], "data.source: not given; give the images"),
        (["--data.resolution=15"], "data.resolution: got 15; give a multiple of 2"),
        (["--data.resolution=4"], "data.resolution: got 4; give at least 8"),
        (["--data.resize=12"], "data.resize: got 12; give null or at least the resolution (16)"),
        (["--data.crops=2"], "data.crops: got 2; several crops of an image need data.crop=random"),
        (["--data.zoom=[0.5, 1.0]"], "data.zoom: got (0.5, 1.0); a random zoom needs data.crop=random"),
        (["--data.columns=[caption]"], "data.columns: got ['caption']; only tables"),
        (["--data.max_bad=-1"], "data.max_bad"),
        (["--dtype=bf16"], "dtype: got 'bf16'"),
        (["--precision=fp16"], "precision: got 'fp16'; fp16 needs a GPU"),
        (["--batch_size=0"], "batch_size: got 0"),
        (["--shard_rows=0"], "shard_rows: got 0"),
        (["--seed=-1"], "seed: got -1"),
        (["--out=SETTING/photos"], "a folder with other files and no plan.json"),
        (["--out=SETTING/photos/ape/0.png"], "a file; give a folder for the latents"),
        (["--mirors"], "mirors: no such setting; closest: mirrors"),
    ],
)
def test_bad_input_ends_with_2_and_one_message(
    setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: list[str], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert said in refused(capsys, arguments(setting, tmp_path / "out", *argv))
    assert not (tmp_path / "out" / "plan.json").exists()


def test_columns_that_a_table_does_not_have_are_named(setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    rows = {"image": [(setting / "photos" / name).read_bytes() for name in NAMES], "caption": NAMES}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "x.parquet")
    argv = arguments(setting, tmp_path / "out", f"--data.source={tmp_path / 'x.parquet'}", "--data.columns=[captoin]")
    assert "data.columns: got 'captoin'; the table has image, caption" in refused(capsys, argv)


@pytest.mark.parametrize(
    ("more", "changes"),
    [
        (["--mirrors"], ["mirrors: False -> True"]),
        (["--dtype=fp16", "--moments=false"], ["moments: True -> False", "dtype: 'fp32' -> 'fp16'"]),
        (["--data.resolution=8", "--seed=3"], ["data.resolution: 16 -> 8", "seed: 0 -> 3", "shapes: [[4, 8, 8]] -> [[4, 4, 4]]"]),
        (["--batch_size=3", "--shard_rows=5"], ["batch_size: 64 -> 3", "shard_rows: 4 -> 5"]),
        (["--data.crop=random", "--data.zoom=[0.9, 1]"], ["data.crop: 'center' -> 'random'", "data.zoom: [1.0, 1.0] -> [0.9, 1.0]"]),
        (["--data.source=SETTING/fewer"], ["source.images: 6 -> 5"]),
        (["--precision=bf16"], ["precision: 'fp32' -> 'bf16'"]),
    ],
)
def test_another_plan_is_refused_with_every_old_and_new_value(
    setting: Path, capsys: pytest.CaptureFixture[str], more: list[str], changes: list[str]
) -> None:
    before = files(setting / "done")
    message = refused(capsys, arguments(setting, setting / "done", *more))
    for change in changes:
        assert f"\n  {change}\n" in message
    if "fewer" not in more[0]:
        assert message.count("->") == len(changes)
    assert files(setting / "done") == before


def test_latents_of_another_encoder_are_refused_with_both_hashes(setting: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hashes = [json.loads((setting / name / "preprocessing.json").read_text())["encoder_hash"] for name in ("vae", "other")]
    message = refused(capsys, arguments(setting, setting / "done", "--model=SETTING/other"))
    assert f"encoder_hash: '{hashes[0]}' -> '{hashes[1]}'" in message


def test_another_decoder_is_noted(setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from autoencoder import artifact
    from autoencoder.pretrained import load

    vae = load(str(setting / "vae"))
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    recipe = artifact.load_preprocessing(setting / "vae")
    assert recipe is not None
    artifact.save_autoencoder(vae, tmp_path / "vae", preprocessing=recipe, likelihood=None)
    before = files(setting / "done")
    assert encode.main(arguments(setting, setting / "done", f"--model={tmp_path / 'vae'}")) == 0
    assert "decoder has changed" in capsys.readouterr().err
    assert files(setting / "done") == before


def test_a_finished_folder_has_nothing_to_do_wherever_source_and_latents_lie(
    setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(setting / "done", tmp_path / "copy")
    before = files(tmp_path / "copy")
    more = ("--data.source=SETTING/moved", "--data.workers=1", "--data.max_bad=3", f"--model={tmp_path / 'copy' / 'vae'}")
    assert encode.main(arguments(setting, tmp_path / "copy", *more)) == 0
    assert capsys.readouterr().out.endswith("finished already (6 rows); nothing to do\n")
    assert files(tmp_path / "copy") == before


def test_an_edited_manifest_is_refused_by_the_reader_and_rewritten_by_the_command(setting: Path, tmp_path: Path) -> None:
    shutil.copytree(setting / "done", tmp_path / "copy")
    file = tmp_path / "copy" / "manifest.json"
    content = file.read_text()
    file.write_text(content.replace('"rows_per_image": 1', '"rows_per_image": 2'))
    with pytest.raises(LatentsError, match=r"manifest.json: edited since it was written .*; run encode_dataset again"):
        Latents(tmp_path / "copy")
    assert encode.main(arguments(setting, tmp_path / "copy")) == 0
    assert file.read_text() == content


def test_a_start_that_failed_before_its_first_shard_may_be_mended(setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("autoencoder.latents.shards.write", broken)
        assert encode.main(arguments(setting, tmp_path, "--model=SETTING/other", "--mirrors")) == 130
    assert json.loads((tmp_path / "plan.json").read_text())["recipe"]["mirrors"] is True
    assert encode.main(arguments(setting, tmp_path)) == 0
    assert files(tmp_path) == files(setting / "done")


def test_preflight_says_what_would_be_written_and_writes_nothing(setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode.main(arguments(setting, tmp_path / "new", "--preflight", "--mirrors")) == 0
    said = capsys.readouterr().out
    assert "plan: 12 rows (6 images of " in said
    assert "x 2) in 3 shards\n" in said
    assert re.search(r"\n  time       \d+m\d\ds at [\d.]+ rows/s, measured\n", said)
    assert "classes    " in said
    assert "precision fp32" in said
    assert not (tmp_path / "new").exists()
    before = files(setting / "done")
    assert encode.main(arguments(setting, setting / "done", "--preflight")) == 0
    assert capsys.readouterr().out.endswith("all 2 shards are done\n")
    assert "mirrors: False -> True" in refused(capsys, arguments(setting, setting / "done", "--preflight", "--mirrors"))
    assert files(setting / "done") == before


def test_a_disk_without_room_is_refused_before_anything_is_written(
    setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "the disk has 0.0 GiB" in refused(capsys, arguments(setting, tmp_path / "out"))
    assert not files(tmp_path / "out")


def test_a_folder_in_use_is_refused(setting: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from autoencoder.latents.folder import LatentsFolder

    folder = LatentsFolder(setting / "done")
    try:
        assert f"in use by process {os.getpid()}" in refused(capsys, arguments(setting, setting / "done"))
    finally:
        folder.close()


def test_a_plan_that_cannot_be_read_is_refused(setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(setting / "done", tmp_path / "copy")
    plan = tmp_path / "copy" / "plan.json"
    for content in ("[]", "{", '{"version": 2}'):
        plan.write_text(content)
        assert "its plan.json cannot be read" in refused(capsys, arguments(setting, tmp_path / "copy"))
    frozen = (setting / "done" / "plan.json").read_text()
    plan.write_text(frozen.replace('"mirrors": false', '"mirrors": true'))
    assert "its plan.json has been edited" in refused(capsys, arguments(setting, tmp_path / "copy"))
    plan.write_text(frozen.replace('"version": 2', '"version": 3'))
    assert "its plan.json has version 3" in refused(capsys, arguments(setting, tmp_path / "copy"))


def test_help_takes_half_a_second_of_a_processor() -> None:
    # Its own seconds: what it waits for, on a busy machine, is not its doing.
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "scripts/encode_dataset.py", "--help"], cwd=ROOT, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5


def test_the_demos_configuration_ships(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        encode.main(["--config", "demo", "--print_config"])
    said = capsys.readouterr().out
    assert "crops: 3000" in said
    assert "source: demo" in said
