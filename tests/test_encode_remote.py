"""Latents behind a URL, on `file://` and `memory://`: the bytes of a run on a disk, whatever came in between."""

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from autoencoder import encode
from autoencoder.latents.remote import RemoteLatents
from tests import children
from tests.encode_children import files, photos, small_model

NAMES = [f"{kind}/{k}.png" for kind in ("ape", "bee") for k in range(4)]
MORE = ["ape/9.png", "cow/1.png"]
SHARDS = 3


class Killed(BaseException):
    """No code of ours catches it."""


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, models, and the latents `local` of an unbroken run on a disk."""
    folder = tmp_path_factory.mktemp("remote")
    small_model(folder / "vae")
    photos(folder / "photos", NAMES)
    photos(folder / "grown", NAMES)
    photos(folder / "grown", MORE, seed=1)
    assert encode.main(arguments(folder, folder / "local")) == 0
    return folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files that is this test's, and a memory that is empty."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield tmp_path / "temporary"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/far/away/latents" if request.param == "file" else MEMORY


MEMORY = "memory://bucket/latents"


def arguments(setting: Path, out: str | Path, *more: str, source: str = "photos") -> list[str]:
    given = [f"--model={setting / 'vae'}", f"--data.source={setting / source}", "--data.workers=0", "--precision=fp32"]
    return [*given, "--shard_rows=3", "--batch_size=2", f"--out={out}", *more]


def there(url: str) -> dict[str, bytes]:
    """Every file behind the URL by its path in the folder."""
    system, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(f"{root}/"): system.cat_file(path) for path in system.find(root)}


def write(url: str, content: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(content)


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], command: Callable[[list[str]], int] = encode.main) -> str:
    capsys.readouterr()
    assert command(argv) == 2
    return capsys.readouterr().err


def records_are_true(found: dict[str, bytes]) -> bool:
    """Whether the files of each record that is there are there, as it says."""
    told = [json.loads(content)["files"] for name, content in found.items() if name.startswith("data-") and name.endswith(".json")]
    return all(hashlib.sha256(found[name]).hexdigest() == entry["sha256"] for record in told for name, entry in record.items())


def test_what_is_there_is_what_a_run_on_a_disk_writes(
    setting: Path, url: str, temporary: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert encode.main(arguments(setting, url)) == 0
    said = capsys.readouterr().out
    assert f"\n  staging    {temporary}/firststage-" in said and "MiB: one shard at a time, and before the first the autoencoder\n" in said
    assert said.endswith(f"{url}: 8 rows in {SHARDS} shards, written\n")
    assert there(url) == files(setting / "local")
    assert list(temporary.iterdir()) == []
    for system in (LocalFileSystem, MemoryFileSystem):
        for way in ("put_file", "pipe_file"):
            monkeypatch.setattr(system, way, None)
    for more in ((), ("--only=encode",), ("--only=finalize",), ("--append",), ("--preflight",), ("--worker=1", "--workers=2")):
        assert encode.main(arguments(setting, url, *more)) == 0
    assert list(temporary.iterdir()) == []


def test_buckets_go_there_with_their_plan(setting: Path, tmp_path: Path) -> None:
    buckets = ("--data.buckets=16x16,16x24",)
    assert encode.main(arguments(setting, tmp_path / "here", *buckets)) == 0
    for stage in ("plan", "encode", "finalize"):
        assert encode.main(arguments(setting, MEMORY, *buckets, f"--only={stage}")) == 0
    assert there(MEMORY) == files(tmp_path / "here")
    assert "buckets-00000.npy" in there(MEMORY)


def test_stopped_before_each_sending_the_same_command_goes_on_to_the_same_bytes(setting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, seen, count = files(setting / "local"), set[int](), [0]

    def stopping(way: str, call: int) -> Callable[..., None]:
        real = getattr(MemoryFileSystem, way)

        def counted(*given: Any, **options: Any) -> None:
            if count[0] == call:
                raise Killed
            count[0] += 1
            real(*given, **options)

        return counted

    for call in range(99):
        count[0] = 0
        with monkeypatch.context() as patched:
            for way in ("put_file", "pipe_file"):
                patched.setattr(MemoryFileSystem, way, stopping(way, call))
            try:
                assert encode.main(arguments(setting, MEMORY)) == 0
                break
            except Killed:
                found = there(MEMORY)
        assert "manifest.json" not in found or found == expected
        assert records_are_true(found)
        seen.add(sum(name.startswith("data-") for name in found))
        assert encode.main(arguments(setting, MEMORY)) == 0
        assert there(MEMORY) == expected
        MemoryFileSystem.store.clear()
    # Listing, index, plan, four files of the model, three of each shard, manifest.
    assert call == 3 + len(list((setting / "local" / "vae").iterdir())) + 3 * SHARDS + 1
    assert seen == set(range(3 * SHARDS + 1))


def killed(argv: list[str], call: int, torn: bool) -> None:
    """`encode_dataset` until SIGKILL in that sending, counted from 0; `torn`: when half of the file is there."""
    real = LocalFileSystem.put_file

    def half(self: LocalFileSystem, here: str, target: str, **_: Any) -> None:
        if count[0] == call:
            if torn:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                Path(target).write_bytes(Path(here).read_bytes()[: os.path.getsize(here) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1
        real(self, here, target)

    count = [0]
    LocalFileSystem.put_file = half
    sys.exit(encode.main(argv))


@pytest.mark.parametrize(("first", "second"), [(1, 1), (4, 2), (6, 0), (7, 1), (8, 2)])
def test_killed_with_half_a_file_sent_the_same_command_sends_it_again(setting: Path, tmp_path: Path, first: int, second: int) -> None:
    url = f"file://{tmp_path}/latents"
    argv = arguments(setting, url, f"--staging={tmp_path / 'stage'}")
    for call, torn in ((first, False), (second, True)):
        assert children.wait(children.start(killed, argv, call, torn)) == -signal.SIGKILL
        # What was being made is left, and of no use.
        assert len(list((tmp_path / "stage").glob("firststage-*/latents"))) == 1
    assert encode.main(argv) == 0
    assert there(url) == files(setting / "local")
    assert list((tmp_path / "stage").iterdir()) == []


def test_shards_that_were_damaged_there_are_made_again_and_no_others(setting: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert encode.main(arguments(setting, url)) == 0
    write(f"{url}/data-00001.safetensors", there(url)["data-00001.safetensors"][:100])
    system, root = fsspec.core.url_to_fs(url)
    system.rm_file(f"{root}/data-00002.json")
    sent, real = [], type(system).put_file

    def noted(self: Any, here: str, target: str, **options: Any) -> None:
        sent.append((Path(target).name, threading.current_thread().name[:6]))
        real(self, here, target, **options)

    monkeypatch.setattr(type(system), "put_file", noted)
    assert encode.main(arguments(setting, url)) == 0
    # Beside the encoder, in the thread that writes.
    endings = ("safetensors", "parquet", "json")
    assert sent == [(f"data-{n:05d}.{end}", "writer") for n in (1, 2) for end in endings]
    assert there(url) == files(setting / "local")


def test_workers_and_stages_have_the_url_alone_in_common(setting: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no plan.json in it; run the same with --only plan first" in refused(capsys, arguments(setting, url, "--only=encode"))
    assert there(url) == {}
    assert encode.main(arguments(setting, url, "--only=plan")) == 0
    assert not any(name.startswith("data-") for name in there(url))
    assert encode.main(arguments(setting, url, "--only=encode", "--worker=1", "--workers=2")) == 0
    assert f"{url}: shards 0, 2 of 3 " in refused(capsys, arguments(setting, url, "--only=finalize"))
    assert encode.main(arguments(setting, url, "--only=encode", "--worker=0", "--workers=2")) == 0
    assert "manifest.json" not in there(url)
    assert encode.main(arguments(setting, url, "--only=finalize")) == 0
    assert there(url) == files(setting / "local")


def main(argv: list[str]) -> None:
    sys.exit(encode.main(argv))


def test_workers_at_once_end_with_the_bytes_of_one(setting: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/latents"
    workers = [children.start(main, arguments(setting, url, f"--worker={i}", "--workers=2")) for i in (0, 1)]
    assert [children.wait(worker) for worker in workers] == [0, 0]
    assert there(url) == files(setting / "local")


def test_of_two_who_make_a_shard_the_first_ones_stays(setting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autoencoder.latents import pipeline

    real, sent = pipeline._gather, list[str]()

    def meanwhile(*given: Any) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(pipeline, "_gather", real)
            assert encode.main(arguments(setting, MEMORY, "--worker=0", "--workers=1")) == 0
        patched_put(sent)
        return real(*given)

    def patched_put(sent: list[str]) -> None:
        put = MemoryFileSystem.put_file
        monkeypatch.setattr(MemoryFileSystem, "put_file", lambda self, here, target: (sent.append(target), put(self, here, target))[1])
        monkeypatch.setattr(pipeline, "_gather", real)

    monkeypatch.setattr(pipeline, "_gather", meanwhile)
    assert encode.main(arguments(setting, MEMORY, "--worker=1", "--workers=3")) == 0
    assert sent == []
    assert there(MEMORY) == files(setting / "local")


def test_images_are_appended_there_as_on_a_disk(setting: Path, tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(setting / "local", tmp_path / "local")
    assert encode.main(arguments(setting, tmp_path / "local", "--append", source="grown")) == 0
    assert encode.main(arguments(setting, url)) == 0
    assert encode.main(arguments(setting, url, "--append", "--only=plan", source="grown")) == 0
    assert encode.main(arguments(setting, url, "--append", source="grown")) == 0
    assert there(url) == files(tmp_path / "local")


@pytest.mark.parametrize("knows_create", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_who_plans_second_goes_on_with_the_same_plan_and_stops_at_another(
    setting: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], knows_create: bool, same: bool
) -> None:
    real = MemoryFileSystem.pipe_file

    def planned_first(self: Any, path: str, content: bytes, **options: str) -> None:
        monkeypatch.setattr(MemoryFileSystem, "pipe_file", limited if not knows_create else real)
        # Another machine has a staging folder of its own.
        monkeypatch.setattr("socket.gethostname", lambda: "another")
        assert encode.main(arguments(setting, MEMORY, "--only=plan", *([] if same else ["--seed=1"]))) == 0
        monkeypatch.setattr("socket.gethostname", lambda: "this")
        first.append(there(MEMORY)["plan.json"])
        MemoryFileSystem.pipe_file(self, path, content, **options)

    def limited(self: Any, path: str, content: bytes, **options: str) -> None:
        if options:
            raise TypeError("unexpected keyword argument 'mode'")
        real(self, path, content)

    first = list[bytes]()
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", planned_first)
    code = encode.main(arguments(setting, MEMORY))
    if same:
        assert code == 0
        assert there(MEMORY) == files(setting / "local")
    elif knows_create:
        assert code == 2
        assert f"{MEMORY} holds latents of another plan:\n  seed: 1 -> 0\n" in capsys.readouterr().err
        assert there(MEMORY)["plan.json"] == first[0]
    else:
        # The last plan is the one that is there: its owner ends with it, and the other finds it when it is done.
        assert code == 0
        assert there(MEMORY) == files(setting / "local")


def test_who_finds_another_plan_when_its_shards_are_done_writes_no_manifest(
    setting: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode.main(arguments(setting, "memory://bucket/other", "--seed=1", "--only=plan")) == 0
    other, real = there("memory://bucket/other")["plan.json"], MemoryFileSystem.put_file

    def put(self: Any, here: str, target: str) -> None:
        real(self, here, target)
        if target.endswith("data-00002.json"):
            MemoryFileSystem.pipe_file(self, "/bucket/latents/plan.json", other)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    message = refused(capsys, arguments(setting, MEMORY))
    assert f"{MEMORY}: plan.json is not that of these shards any more: another process has planned here" in message
    assert "manifest.json" not in there(MEMORY)


@pytest.mark.parametrize("way", ["find", "put_file", "cat_file", "info"])
def test_a_network_that_fails_ends_it_with_what_to_do(
    setting: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], way: str, temporary: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TimeoutError("no answer")

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, way, fail)
        message = refused(capsys, arguments(setting, MEMORY))
    told = "TimeoutError: no answer; check the network and the credentials, then the same command goes on\n"
    assert message.endswith(f"error: {MEMORY}: {told}")
    assert list(temporary.iterdir()) == []
    assert encode.main(arguments(setting, MEMORY)) == 0
    assert there(MEMORY) == files(setting / "local")


def test_at_most_one_shard_is_on_this_machine(setting: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, most = MemoryFileSystem.put_file, list[int]()

    def put(self: Any, here: str, target: str) -> None:
        most.append(len(list(temporary.rglob("*.safetensors")) + list(temporary.rglob(".data-*.safetensors*"))))
        real(self, here, target)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    assert encode.main([*arguments(setting, MEMORY), "--shard_rows=1"]) == 0
    # Of a shard latents, table and record are sent; the table and the record when the latents have gone.
    assert most[-25:] == [1, 0, 0] * 8 + [0]


def test_what_cannot_be_used_is_refused(setting: Path, tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(f"{MEMORY}/notes.txt", b"mine")
    assert f"out: got '{MEMORY}'; a folder with other files and no plan.json" in refused(capsys, arguments(setting, MEMORY))
    assert "a file; give a folder for the latents" in refused(capsys, arguments(setting, f"{MEMORY}/notes.txt"))
    assert there(MEMORY) == {"notes.txt": b"mine"}
    assert "give a folder for the latents behind it" in refused(capsys, arguments(setting, "memory://"))
    assert "give a path, or a URL of a protocol that fsspec knows" in refused(capsys, arguments(setting, "what://x/y"))
    assert "staging: got '/tmp'; leave it out unless `out` is a URL" in refused(capsys, arguments(setting, "out", "--staging=/tmp"))
    (tmp_path / "file").touch()
    assert "staging: got " in refused(capsys, arguments(setting, url, f"--staging={tmp_path / 'file'}"))
    MemoryFileSystem.store.clear()
    held = RemoteLatents(url, staging=None, worker=0)
    message = refused(capsys, arguments(setting, url))
    assert message.startswith("error: staging: got ") and "in use by process" in message
    held.close()
    assert encode.main(arguments(setting, url, "--preflight")) == 0
    assert there(url) == {}
    assert encode.main(arguments(setting, url)) == 0
    write(f"{url}/plan.json", b"{")
    assert f"out: got '{url}'; its plan.json cannot be read" in refused(capsys, arguments(setting, url))
