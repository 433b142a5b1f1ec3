"""Killed at any moment, `encode_dataset` goes on to the bytes of an unbroken run."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.encode_children import files, finish, photos, small_model, start

KILLS = 20


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    small_model(folder / "vae")
    photos(folder / "photos", [f"{kind}/{k}.png" for kind in ("ape", "bee") for k in range(40)])
    (folder / "photos" / "bee" / "7.png").write_bytes(b"no image")
    return folder


def arguments(setting: Path, out: Path, *more: str) -> list[str]:
    return [
        "--model", str(setting / "vae"), "--data.source", str(setting / "photos"), "--data.crop=random", "--data.workers=0",
        "--mirrors", "--precision=fp32", "--batch_size=2", "--out", str(out), *more,
    ]  # fmt: skip


def test_killed_at_twenty_random_moments_the_files_are_an_unbroken_runs(setting: Path, tmp_path: Path) -> None:
    more = ("--data.crops=3", "--shard_rows=2")
    assert finish(start(arguments(setting, tmp_path / "unbroken", *more))) == 0
    expected = files(tmp_path / "unbroken")
    shards = sum(name.endswith(".safetensors") and name.startswith("data") for name in expected)
    assert shards == 80 * 3 * 2 / 2
    rng, done = np.random.default_rng(0), 0
    for kill in range(KILLS):
        process = start(arguments(setting, tmp_path / "killed", *more))
        deadline = time.monotonic() + 60
        while (now := len(list((tmp_path / "killed").glob("data-*.json")))) <= done:
            assert time.monotonic() < deadline and process.is_alive(), f"start {kill} wrote no shard"
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        assert finish(process) == -signal.SIGKILL
        done = now
    assert done < shards
    assert finish(start(arguments(setting, tmp_path / "killed", *more))) == 0
    assert files(tmp_path / "killed") == expected


def test_killed_before_each_rename_the_files_are_an_unbroken_runs(setting: Path, tmp_path: Path) -> None:
    more = ("--shard_rows=100",)
    assert finish(start(arguments(setting, tmp_path / "unbroken", *more))) == 0
    expected = files(tmp_path / "unbroken")
    # Plan, model, two shards of three files each, manifest.
    for rename in range(9):
        out = tmp_path / str(rename)
        assert finish(start(arguments(setting, out, *more), kill_at=rename)) == -signal.SIGKILL
        assert files(out) != expected
        assert finish(start(arguments(setting, out, *more))) == 0
        assert files(out) == expected
    assert finish(start(arguments(setting, tmp_path / "9", *more), kill_at=9)) == 0


def test_only_shards_without_a_valid_record_are_encoded_again(setting: Path, tmp_path: Path) -> None:
    argv = arguments(setting, tmp_path, "--shard_rows=20")
    assert finish(start(argv)) == 0
    expected = files(tmp_path)
    (tmp_path / "data-00001.json").unlink()
    with (tmp_path / "data-00003.safetensors").open("r+b") as file:
        file.truncate(100)
    (tmp_path / "data-00005.parquet").unlink()
    (tmp_path / "data-00006.json").write_text('{"recipe_hash": ')
    (tmp_path / ".data-00004.parquet.partial").write_text("left over")
    untouched = {n: (tmp_path / f"data-{n:05d}.safetensors").stat().st_ino for n in (0, 2, 4, 7)}
    again = {n: (tmp_path / f"data-{n:05d}.safetensors").stat().st_ino for n in (1, 3, 5, 6)}
    assert finish(start(argv)) == 0
    assert files(tmp_path) == expected
    assert all((tmp_path / f"data-{n:05d}.safetensors").stat().st_ino == inode for n, inode in untouched.items())
    # Renamed from a file beside it, which had another inode.
    assert all((tmp_path / f"data-{n:05d}.safetensors").stat().st_ino != inode for n, inode in again.items())
