"""Exports of latents: stock loaders read every row, a stopped export goes on, and what does not fit is refused."""

import errno
import io
import json
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from autoencoder import export_latents
from autoencoder.latents import exporting
from autoencoder.latents.reader import Latents
from autoencoder.runtime.files import put
from tests.encode_children import photos, small_model
from tests.small_latents import encode_photos, rewrite

NAMES = [f"{kind}/{k}.png" for kind in ("ape", "bee") for k in range(5)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 rows in shards of 6, 6, 6 and 2, without those of image 3."""
    folder = tmp_path_factory.mktemp("export")
    small_model(folder / "vae")
    photos(folder / "photos", NAMES)
    (folder / "photos" / "ape" / "3.png").write_bytes(b"no image")
    return encode_photos(folder / "vae", folder / "photos", folder / "latents", "--mirrors", "--shard_rows=6")


def export(made: Path, out: Path, *extra: str) -> int:
    return export_latents.main(["--latents", str(made), "--out", str(out), *extra])


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("rows_at_once", [4, 256])
def test_datasets_reads_every_row_of_the_parquet_files(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, rows_at_once: int
) -> None:
    monkeypatch.setattr(exporting, "ROWS_AT_ONCE", rows_at_once)
    assert export(made, tmp_path / "out", f"--dtype={dtype}") == 0
    files = sorted(str(file) for file in (tmp_path / "out").glob("*.parquet"))
    assert len(files) == 4
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")).with_format("numpy")
    whole = Latents(made).gather(range(18))
    shape = json.loads(pyarrow.parquet.read_schema(files[0]).metadata[b"latents"])["shape"]
    stored = np.float32 if dtype == "fp32" else np.float16
    for name in ("mean", "logvar"):
        assert pyarrow.parquet.read_schema(files[0]).field(name).type == pyarrow.list_(pyarrow.from_numpy_dtype(stored), 256)
        found = np.stack([row[name].reshape(shape) for row in loaded])
        np.testing.assert_array_equal(found, getattr(whole, name).astype(stored))
    np.testing.assert_array_equal(loaded["id"], whole.id)
    np.testing.assert_array_equal(loaded["label"], whole.label)
    assert list(loaded["name"])[6:10] == ["ape/4.png", "ape/4.png", "bee/0.png", "bee/0.png"]
    assert list(loaded["view"])[:4] == [0, 1, 0, 1]


def test_datasets_reads_every_row_of_the_tars(made: Path, tmp_path: Path) -> None:
    assert export(made, tmp_path / "out", "--format=webdataset") == 0
    files = sorted(str(file) for file in (tmp_path / "out").glob("*.tar"))
    loaded = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    whole = Latents(made).gather(range(18))
    for row, found in enumerate(loaded):
        np.testing.assert_array_equal(np.array(found["mean.npy"], np.float32), whole.mean[row])
        np.testing.assert_array_equal(np.array(found["logvar.npy"], np.float32), whole.logvar[row])  # type: ignore[index]
        assert found["__key__"] == f"{whole.id[row]:09d}"
        assert (found["json"]["id"], found["json"]["label"]) == (whole.id[row], whole.label[row])
    assert loaded[6]["json"]["name"] == "ape/4.png"
    with tarfile.open(files[1]) as archive:
        members = [member.name for member in archive.getmembers()][:4]
        assert members == [f"000000008.{ending}" for ending in ("mean.npy", "logvar.npy", "cls", "json")]
        content = archive.extractfile(members[0])
        assert content is not None
        assert np.load(io.BytesIO(content.read())).dtype == np.float32


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_an_export_goes_on_with_the_next_file(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert export(made, whole, f"--format={format}") == 0
    write, written = exporting._write, []

    def stops(path: Path, *rest: object) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(exporting, "_write", stops)
    assert export(made, out, f"--format={format}") == 130
    assert not (out / "latents.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("data-*")}
    assert len(before) == 2
    monkeypatch.setattr(exporting, "_write", write)
    assert export(made, out, f"--format={format}") == 0
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    contents = [{path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"} for folder in (out, whole)]
    assert contents[0] == contents[1]
    told = json.loads((out / "latents.json").read_text())
    manifest = Latents(made).manifest
    assert told["statistics"] == manifest["statistics"]
    assert told["rows_hash"] == manifest["rows_hash"]
    assert sorted(told["export"]["files"]) == sorted(path.name for path in out.glob("data-*"))
    capsys.readouterr()
    assert export(made, out, f"--format={format}") == 0
    assert "finished already (18 rows); nothing to do" in capsys.readouterr().out


def test_what_cannot_be_exported_is_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert export(made, out) == 0
    assert export(made, out, "--dtype=fp16") == 2
    assert "out: got" in capsys.readouterr().err
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("")
    assert export(made, tmp_path / "used") == 2
    assert "a folder with other files and no latents.json" in capsys.readouterr().err
    assert export(made, made) == 2
    assert "give another folder than that of the latents" in capsys.readouterr().err
    assert export(tmp_path, tmp_path / "no") == 2
    assert "latents: got" in capsys.readouterr().err


def test_a_value_that_fp16_cannot_hold_is_named(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    folder = Path(shutil.copytree(made, tmp_path / "latents"))
    mean = Latents(folder).gather(range(4, 8)).mean.copy()
    mean[2, 0, 0, 0] = 7e4
    rewrite(folder, 1, mean=mean)
    assert export(folder, tmp_path / "out", "--dtype=fp16") == 2
    assert "data-00001.safetensors: mean of row 2 is not finite; fp16 ends at 65504: export as fp32" in capsys.readouterr().err
    assert not (tmp_path / "out" / "latents.json").exists()


def test_a_start_that_was_cut_short_is_begun_again(made: Path, tmp_path: Path) -> None:
    (tmp_path / ".latents.json.partial").write_text('{"exp')
    assert export(made, tmp_path) == 0
    assert len(list(tmp_path.glob("*.parquet"))) == 4


@pytest.mark.parametrize("file", ["latents.json", "data-00000.parquet"])
def test_a_full_disk_is_told_and_the_same_command_goes_on(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    def full(path: Path) -> None:
        if path.name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(path)

    monkeypatch.setattr(exporting, "put", full)
    assert export(made, tmp_path) == 2
    assert f"{file}'; cannot be written ([Errno 28] No space left on device)" in capsys.readouterr().err
    monkeypatch.undo()
    assert export(made, tmp_path) == 0
    assert len(list(tmp_path.iterdir())) == 6  # four files, what they are, the lock


def test_a_table_that_is_gone_is_named(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made, tmp_path / "latents")
    (tmp_path / "latents" / "data-00001.parquet").unlink()
    assert export(tmp_path / "latents", tmp_path / "out") == 2
    assert "data-00001.parquet cannot be read" in capsys.readouterr().err
