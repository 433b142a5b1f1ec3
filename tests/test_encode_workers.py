"""Several workers and single stages: the same bytes as one process that does all."""

import os
import shlex
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import torch

from autoencoder import encode
from autoencoder.data.folder import FolderSource
from autoencoder.latents import announcing
from autoencoder.latents.folder import LatentsFolder
from autoencoder.latents.gaps import ranges
from autoencoder.latents.plan import Plan
from autoencoder.latents.setup import _device
from autoencoder.latents.worker import Worker
from autoencoder.runtime.errors import ConfigError
from tests.encode_children import files, finish, photos, small_model, start

NAMES = [f"{kind}/{k}.png" for kind in ("ape", "bee") for k in range(10)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    small_model(folder / "vae")
    photos(folder / "photos", NAMES)
    (folder / "photos" / "ape" / "3.png").write_bytes(b"no image")
    assert encode.main(arguments(folder, folder / "alone")) == 0
    return folder


def arguments(setting: Path, out: Path, *more: str) -> list[str]:
    given = [f"--model={setting / 'vae'}", f"--data.source={setting / 'photos'}", "--data.workers=0", "--precision=fp32"]
    return [*given, "--mirrors", "--shard_rows=5", "--batch_size=2", f"--out={out}", *more]


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    capsys.readouterr()
    assert encode.main(argv) == 2
    return capsys.readouterr().err


def records(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("data-")) for path in folder.glob("data-*.json"))


@pytest.mark.parametrize("order", [[(0, 3), (1, 3), (2, 3)], [(2, 3), (0, 2), (1, 2)], [(1, 2), (0, 1)]])
def test_workers_one_after_another_write_the_bytes_of_one_process(setting: Path, tmp_path: Path, order: list[tuple[int, int]]) -> None:
    for number, of in order:
        before = records(tmp_path)
        assert encode.main(arguments(setting, tmp_path, f"--worker={number}", f"--workers={of}")) == 0
        assert set(records(tmp_path)) - set(before) == set(range(number, 8, of)) - set(before)
        assert (tmp_path / "manifest.json").is_file() == (len(records(tmp_path)) == 8)
    assert files(tmp_path) == files(setting / "alone")


def test_workers_at_once_and_twice_the_same_worker_write_the_bytes_of_one_process(setting: Path, tmp_path: Path) -> None:
    workers = [(0, 2), (1, 2), (1, 2), (0, 1)]
    processes = [start(arguments(setting, tmp_path, f"--worker={i}", f"--workers={n}")) for i, n in workers]
    assert [finish(process) for process in processes] == [0] * 4
    assert files(tmp_path) == files(setting / "alone")


def test_launched_processes_are_workers(
    setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert encode.main(arguments(setting, tmp_path)) == 0
        said = capsys.readouterr()
        assert (said.out.startswith("plan: 40 rows")) == (rank == 0)
        assert f"worker {rank} of 3: encoded {5 * len(range(rank, 8, 3))} / {5 * len(range(rank, 8, 3))} rows" in said.err
        if rank != 1:
            assert f"worker {rank} of 3: {tmp_path}: its shards are done, " in said.out
    assert said.out.endswith(f"(`bad`)\n{tmp_path}: 38 rows in 8 shards, written\n")
    assert files(tmp_path) == files(setting / "alone")
    assert "workers: got 3 in one of 3 launched processes" in refused(capsys, arguments(setting, tmp_path, "--worker=0", "--workers=3"))
    assert "only: got 'plan' in one of 3 launched processes" in refused(capsys, arguments(setting, tmp_path, "--only=plan"))


def test_each_worker_of_a_machine_takes_a_gpu_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert [_device(Worker(number=n, of=8, shared=True, place=n % 4)).index for n in range(5)] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--worker=0"], "worker: got 0; give --workers too"),
        (["--workers=2"], "worker: not given; with --workers 2 give 0 to 1, to each process another"),
        (["--worker=2", "--workers=2"], "worker: got 2; with --workers 2 give 0 to 1"),
        (["--worker=-1", "--workers=2"], "worker: got -1; with --workers 2 give 0 to 1"),
        (["--workers=0"], "workers: got 0; give at least 1"),
        (["--worker=0", "--workers=2", "--only=finalize"], "workers: got 2; one process does --only finalize"),
        (["--append", "--only=finalize"], "append: got True; --only finalize adds no images"),
        (["--preflight", "--only=plan"], "preflight: got True; it stops before any stage"),
        (["--only=encode"], "no plan.json in it; run the same with --only plan first"),
        (["--only=finalize"], "no plan.json in it; run the same with --only plan first"),
        (["--append"], "no latents to append to; leave --append out"),
    ],
)
def test_what_makes_no_sense_is_refused_and_leaves_nothing(
    setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert said in refused(capsys, arguments(setting, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_worker_that_is_refused_says_which_it_is(setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, arguments(setting, tmp_path / "out", "--worker=1", "--workers=2", "--data.resolution=15"))
    assert message.startswith("error: worker 1 of 2: data.resolution: got 15")
    assert not (tmp_path / "out").exists()


def test_stage_by_stage_it_is_the_same(setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode.main(arguments(setting, tmp_path, "--only=plan")) == 0
    said = capsys.readouterr().out
    assert "8 shards are planned, 8 of them are to be encoded" in said
    # What it says to run next is what is run below.
    told = [shlex.split(line)[2:] for line in said.splitlines() if line.startswith("  firststage encode_dataset ")]
    assert told == [[*arguments(setting, tmp_path), "--only", stage] for stage in ("encode", "finalize")]
    assert {path.name for path in tmp_path.iterdir()} == {
        "plan.json",
        "images-00000.parquet",
        "index-00000.arrow",
        "vae",
        ".lock",
        ".planning",
    }
    frozen = files(tmp_path)
    assert encode.main(arguments(setting, tmp_path, "--only=plan")) == 0
    assert files(tmp_path) == frozen
    assert "shards 0-7 of 8 (data.source " in refused(capsys, arguments(setting, tmp_path, "--only=finalize"))
    assert encode.main(told[0]) == 0
    assert "0 of all 8 are not; --only finalize writes the manifest" in capsys.readouterr().out
    assert not (tmp_path / "manifest.json").exists()
    # Neither model nor images are needed to finalize.
    nowhere = ["--model=nowhere", "--data.source=nowhere", f"--out={tmp_path}", "--only=finalize"]
    moved = tmp_path / "data-00003.json"
    content = moved.read_bytes()
    for number in (1, 2, 3):
        (tmp_path / f"data-{number:05d}.json").rename(tmp_path.parent / f"{number}.json")
    assert "shards 1-3 of 8" in refused(capsys, nowhere)
    for number in (1, 2):
        (tmp_path.parent / f"{number}.json").rename(tmp_path / f"data-{number:05d}.json")
    assert "shard 3 of 8 (data.source " in refused(capsys, nowhere)
    moved.write_bytes(content)
    for _ in range(2):
        assert encode.main(nowhere) == 0
        assert files(tmp_path) == files(setting / "alone")


def test_more_bad_images_than_tolerated_are_found_whoever_met_them(
    setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (0, 1):
        assert encode.main(arguments(setting, tmp_path, "--only=encode" if number else "--only=plan")) == 0
    assert "data.max_bad is 0: ape/3.png" in refused(capsys, arguments(setting, tmp_path, "--only=finalize", "--data.max_bad=0"))


def test_one_process_and_workers_keep_out_of_each_others_way(setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worker = LatentsFolder(tmp_path, shared=True)
    assert "in use by process" in refused(capsys, arguments(setting, tmp_path))
    other = LatentsFolder(tmp_path, shared=True)
    worker.close()
    other.close()
    alone = LatentsFolder(tmp_path)
    assert "in use by process" in refused(capsys, arguments(setting, tmp_path, "--worker=0", "--workers=2"))
    alone.close()


def test_a_plan_without_shards_is_replaced_by_one_process_alone(setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode.main(arguments(setting, tmp_path, "--only=plan", "--seed=3")) == 0
    wrong = files(tmp_path)
    assert "seed: 3 -> 0" in refused(capsys, arguments(setting, tmp_path, "--worker=0", "--workers=2"))
    assert files(tmp_path) == wrong
    assert encode.main(arguments(setting, tmp_path)) == 0
    assert "note: replaces what " in capsys.readouterr().err
    assert files(tmp_path) == files(setting / "alone")


def test_of_two_plans_at_once_the_first_is_frozen(setting: Path, tmp_path: Path) -> None:
    plan = LatentsFolder(setting / "alone", dry=True).plan()
    assert plan is not None
    other = Plan(plan.recipe | {"seed": 1}, plan.segments, plan.shapes, plan.labels, plan.decoder_hash)
    first, second = LatentsFolder(tmp_path, shared=True), LatentsFolder(tmp_path, shared=True)
    assert first.freeze(plan, None, {"images-00000.parquet": lambda path: path.write_bytes(b"first")})
    assert not second.freeze(other, None, {"images-00000.parquet": lambda path: path.write_bytes(b"second")})
    assert second.plan() == plan
    assert (tmp_path / "images-00000.parquet").read_bytes() == b"first"
    first.close()
    second.close()


def test_precision_auto_is_the_plans(setting: Path, tmp_path: Path) -> None:
    assert encode.main(arguments(setting, tmp_path, "--only=plan", "--precision=bf16")) == 0
    assert encode.main(arguments(setting, tmp_path, "--only=encode", "--precision=auto", "--data.max_bad=1")) == 0


def test_a_disk_without_room_for_the_files_is_refused(setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = LatentsFolder(setting / "alone", dry=True).plan()
    assert plan is not None
    with monkeypatch.context() as patched:
        patched.setattr(announcing.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
        patched.setattr(announcing.os, "statvfs", lambda _: SimpleNamespace(f_files=100, f_favail=23))
        announcing.check_room(tmp_path, plan, list(range(7)))
        with pytest.raises(ConfigError, match="24 files are to be written, but the disk takes 23 more"):
            announcing.check_room(tmp_path, plan, list(range(8)))
    monkeypatch.setattr(announcing.resource, "getrlimit", lambda _: (3 * plan.bytes_of(0) // 5, -1))
    with pytest.raises(ConfigError, match=r"shard_rows: got 5; .* files may have .* give shard_rows of 3 at most"):
        announcing.check_room(tmp_path, plan, [0])


def test_numbers_as_ranges() -> None:
    assert ranges([]) == []
    assert ranges([3, 7, 8, 9, 11]) == [(3, 3), (7, 9), (11, 11)]


def test_an_index_is_kept_beside_the_plan(setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FolderSource, "write_index", lambda self, path: path.write_bytes(self.name.encode()), raising=False)
    assert encode.main(arguments(setting, tmp_path, "--only=plan")) == 0
    assert (tmp_path / "index-00000.arrow").read_bytes() == str(setting / "photos").encode()
    assert encode.main(arguments(setting, tmp_path, "--only=plan", "--seed=1")) == 0
    assert (tmp_path / "index-00000.arrow").is_file()


def test_a_refused_worker_leaves_the_plan_of_one_that_has_gone(setting: Path, tmp_path: Path) -> None:
    folder = LatentsFolder(tmp_path / "latents", shared=True)
    assert finish(start(arguments(setting, tmp_path / "latents", "--worker=0", "--workers=2"), kill_at=8)) < 0
    (tmp_path / "latents" / "data-00000.json").unlink(missing_ok=True)
    folder.withdraw()
    folder.close()
    assert encode.main(arguments(setting, tmp_path / "latents", "--only=encode")) == 0


def test_names_need_not_be_utf8(setting: Path, tmp_path: Path) -> None:
    photos(tmp_path / "photos", ["a.png", "b.png"])
    os.rename(tmp_path / "photos" / "b.png", os.path.join(os.fsencode(tmp_path / "photos"), b"\xff.png"))
    (tmp_path / "photos" / "c.png").write_bytes(b"no image")
    argv = arguments(setting, tmp_path / "latents", f"--data.source={tmp_path / 'photos'}")
    assert encode.main(argv) == 0
    assert pyarrow.parquet.read_table(tmp_path / "latents" / "data-00000.parquet")["name"].to_pylist() == ["a.png"] * 2 + ["?.png"]
    assert encode.main(argv) == 0


def test_who_mends_a_finished_folder_says_what_it_did(setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode.main(arguments(setting, tmp_path)) == 0
    (tmp_path / "data-00002.json").unlink()
    capsys.readouterr()
    assert encode.main(arguments(setting, tmp_path)) == 0
    assert capsys.readouterr().out.endswith("38 rows in 8 shards, written\n")
    assert encode.main(arguments(setting, tmp_path)) == 0
    assert capsys.readouterr().out.endswith("finished already (38 rows); nothing to do\n")
