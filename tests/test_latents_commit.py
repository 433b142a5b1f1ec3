"""Several processes at one shard at once, and what they leave: whole files of one of them, or nothing."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from safetensors.numpy import load_file

from autoencoder import encode
from autoencoder.latents import commit, shards
from autoencoder.latents.commit import STALE, abandoned, beside, is_partial
from autoencoder.latents.folder import LatentsFolder
from autoencoder.runtime.errors import TrainingError
from tests.encode_children import files, finish, photos, small_model, start


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commit")
    small_model(folder / "vae")
    photos(folder / "photos", [f"{k}.png" for k in range(10)])
    assert encode.main(arguments(folder, folder / "alone")) == 0
    return folder


def arguments(setting: Path, out: Path, *more: str) -> list[str]:
    given = [f"--model={setting / 'vae'}", f"--data.source={setting / 'photos'}", "--data.workers=0", "--precision=fp32"]
    return [*given, "--shard_rows=5", f"--out={out}", *more]


def encoded(setting: Path, shard: int) -> shards.Encoded:
    latents, table, record = (setting / "alone" / name for name in shards.names(shard))
    return shards.Encoded(load_file(latents), pyarrow.parquet.read_table(table), json.loads(record.read_text())["bad"])


@pytest.mark.parametrize("moment", range(3))
def test_two_workers_in_the_middle_of_one_shard_leave_the_same_bytes(
    setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    plan = LatentsFolder(setting / "alone", dry=True).plan()
    assert plan is not None
    put, calls = shards.put, []

    def interrupted(path: Path, partial: Path) -> None:
        calls.append(path)
        if len(calls) == moment + 1:
            with monkeypatch.context() as other:
                other.setattr("autoencoder.latents.commit._TOKEN", "another")
                shards.write(tmp_path, plan, 1, encoded(setting, 1))
        put(path, partial)

    monkeypatch.setattr(shards, "put", interrupted)
    shards.write(tmp_path, plan, 1, encoded(setting, 1))
    assert len(calls) == 6
    assert files(tmp_path) == {name: (setting / "alone" / name).read_bytes() for name in shards.names(1)}


def test_a_shard_that_another_has_done_meanwhile_stays(setting: Path, tmp_path: Path) -> None:
    plan = LatentsFolder(setting / "alone", dry=True).plan()
    assert plan is not None
    first, second = encoded(setting, 1), encoded(setting, 1)
    # As of unlike hardware.
    second.tensors["mean"] += np.float32(1e-6)
    record = shards.write(tmp_path, plan, 1, first)
    before = files(tmp_path)
    assert shards.write(tmp_path, plan, 1, second) == record
    assert files(tmp_path) == before


@pytest.mark.parametrize(("step", "call"), [("_check_written", 0), ("_size_and_digest", 0), ("put", 0), ("put", 1), ("put", 2)])
def test_a_worker_whose_shard_another_has_finished_and_tidied_goes_on(
    setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, call: int
) -> None:
    folder, plan = LatentsFolder(tmp_path, shared=True), LatentsFolder(setting / "alone", dry=True).plan()
    assert plan is not None
    original, calls = getattr(shards, step), []

    def meanwhile(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == call + 1:
            with monkeypatch.context() as other:
                other.setattr("autoencoder.latents.commit._TOKEN", "another")
                other.setattr(shards, step, original)
                shards.write(tmp_path, plan, 1, encoded(setting, 1))
            folder.tidy()
        return original(*arguments)

    monkeypatch.setattr(shards, step, meanwhile)
    assert shards.write(tmp_path, plan, 1, encoded(setting, 1)) == json.loads((tmp_path / "data-00001.json").read_text())
    assert files(tmp_path) == {name: (setting / "alone" / name).read_bytes() for name in shards.names(1)}
    folder.close()


def test_what_dead_processes_left_goes_at_the_start_and_everyones_at_the_end(setting: Path, tmp_path: Path) -> None:
    path = tmp_path / "data-00001.parquet"
    mine = beside(path)
    process = start(["--help"])
    dead = mine.with_name(mine.name.replace(f"-{mine.name.rsplit('-', 2)[1]}-", f"-{process.pid}-"))
    finish(process)
    # Of a container of the same name, in which processes have the numbers of dead ones here; and as old as none at work is.
    foreign, old = (path.with_name(f".data-00001.parquet.{'0a' * 6}-{process.pid}-abcde{n}.partial") for n in range(2))
    leftovers = (mine, dead, foreign, old)
    for leftover in leftovers:
        leftover.write_text("half")
        assert is_partial(leftover.name)
    now = mine.stat().st_mtime
    os.utime(old, (now, now - STALE - 60))
    assert [abandoned(leftover, now) for leftover in leftovers] == [False, True, False, True]
    assert not abandoned(path.with_name(".gone.partial"), now)
    LatentsFolder(tmp_path, shared=True).close()
    assert [leftover.exists() for leftover in leftovers] == [True, False, True, False]
    assert encode.main(arguments(setting, tmp_path, "--worker=0", "--workers=1")) == 0
    assert files(tmp_path) == files(setting / "alone")


def test_processes_whose_numbers_say_nothing_of_each_other_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    known = commit._processes()
    assert known == commit._processes()
    others = {known}
    for namespace in ("pid:[4026531836]", "pid:[4026532847]"):
        monkeypatch.setattr(os, "readlink", lambda _, told=namespace: told)
        others.add(commit._processes())
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    others.add(commit._processes())
    assert len(others) >= 3


def test_a_shard_that_vanishes_while_it_is_written_and_is_not_done_is_said(
    setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = LatentsFolder(setting / "alone", dry=True).plan()
    assert plan is not None
    put = shards.put

    def vanished(path: Path, partial: Path) -> None:
        partial.unlink()
        put(path, partial)

    monkeypatch.setattr(shards, "put", vanished)
    with pytest.raises(TrainingError, match=r"data-00001.safetensors could not be written .*; check the disk"):
        shards.write(tmp_path, plan, 1, encoded(setting, 1))
    assert files(tmp_path) == {}
