"""Killed at any moment, by one process or several workers, `encode_dataset` goes on to the bytes of an unbroken run."""

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.encode_children import files, finish, photos, small_model, start

PHASES = (1, 3, 2)
"""Workers, one count after the other."""
LATEST = 24
"""Commit points of a start among which it may be killed: plan, model and some shards."""


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


@pytest.mark.parametrize("kills", [30, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_again_and_again_on_one_three_and_two_workers_the_files_are_an_unbroken_runs(
    setting: Path, tmp_path: Path, kills: int
) -> None:
    more = (f"--data.crops={3 if kills < 100 else 9}", "--shard_rows=2")
    assert finish(start(arguments(setting, tmp_path / "unbroken", *more))) == 0
    expected = files(tmp_path / "unbroken")
    shards = sum(name.endswith(".json") and name.startswith("data") for name in expected)
    assert shards == 80 * (3 if kills < 100 else 9)
    rng, out, killed, points = np.random.default_rng(kills), tmp_path / "killed", 0, set[int]()
    while killed < kills:
        workers = PHASES[3 * killed // kills]
        # The workers of a phase start and die together, each at a commit point, or all at a moment.
        points_of = [int(rng.integers(LATEST)) for _ in range(workers)] if rng.random() < 0.5 else [None] * workers
        processes = [
            start(arguments(setting, out, *more, *([f"--worker={i}", f"--workers={workers}"] if workers > 1 else [])), kill_at=point)
            for i, point in enumerate(points_of)
        ]
        if points_of[0] is None:
            kill_while_it_works(processes, out, rng)
        else:
            points |= {point for point in points_of if point is not None}
        assert {finish(process) for process in processes} == {-signal.SIGKILL}
        killed += workers
        assert not (out / "manifest.json").exists()
    assert len(points) >= min(LATEST, kills // 4)
    assert 0 < len(list(out.glob("data-*.json"))) < shards
    processes = [start(arguments(setting, out, *more, f"--worker={i}", "--workers=2")) for i in range(2)]
    assert [finish(process) for process in processes] == [0, 0]
    assert files(out) == expected


def kill_while_it_works(processes: list[Any], out: Path, rng: np.random.Generator) -> None:
    """SIGKILL soon after the next shard is done."""
    done, deadline = len(list(out.glob("data-*.json"))), time.monotonic() + 60
    while len(list(out.glob("data-*.json"))) <= done:
        assert time.monotonic() < deadline and processes[0].is_alive(), "no shard was written"
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.02))
    for process in processes:
        process.kill()


def test_killed_before_each_rename_the_files_are_an_unbroken_runs(setting: Path, tmp_path: Path) -> None:
    more = ("--shard_rows=100",)
    assert finish(start(arguments(setting, tmp_path / "unbroken", *more))) == 0
    expected = files(tmp_path / "unbroken")
    # Listing, index, plan, model, two shards of three files each, manifest.
    for rename in range(11):
        out = tmp_path / str(rename)
        assert finish(start(arguments(setting, out, *more), kill_at=rename)) == -signal.SIGKILL
        assert files(out) != expected
        assert finish(start(arguments(setting, out, *more))) == 0
        assert files(out) == expected
    assert finish(start(arguments(setting, tmp_path / "11", *more), kill_at=11)) == 0


def test_only_shards_without_a_valid_record_are_encoded_again(setting: Path, tmp_path: Path) -> None:
    argv = arguments(setting, tmp_path, "--shard_rows=16")
    assert finish(start(argv)) == 0
    expected = files(tmp_path)
    (tmp_path / "data-00001.json").unlink()
    with (tmp_path / "data-00003.safetensors").open("r+b") as file:
        file.truncate(100)
    (tmp_path / "data-00005.parquet").unlink()
    (tmp_path / "data-00006.json").write_text('{"recipe_hash": ')
    (tmp_path / "data-00007.json").write_text("null")
    record = tmp_path / "data-00008.json"
    # One digit of a sum: still a record, but not the one that was written.
    flipped = bytearray(record.read_bytes())
    place = flipped.index(b'"m2"') + 20
    flipped[place] = ord("1") if flipped[place] != ord("1") else ord("2")
    record.write_bytes(flipped)
    (tmp_path / ".data-00004.parquet.partial").write_text("left over")
    kept, damaged = (0, 2, 4, 9), (1, 3, 5, 6, 7, 8)
    before = {n: (tmp_path / f"data-{n:05d}.safetensors").stat().st_ino for n in (*kept, *damaged)}
    assert finish(start(argv)) == 0
    assert files(tmp_path) == expected
    assert all((tmp_path / f"data-{n:05d}.safetensors").stat().st_ino == before[n] for n in kept)
    # Renamed from a file beside it, which had another inode.
    assert all((tmp_path / f"data-{n:05d}.safetensors").stat().st_ino != before[n] for n in damaged)
