"""A disk that is full or cannot be written, and files that go missing: noticed, named, and mended by the next run."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoencoder import encode
from autoencoder.latents import commit
from autoencoder.latents.commit import is_partial
from tests.encode_children import files, finish, photos, small_model, start

NAMES = [f"{k}.png" for k in range(12)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    small_model(folder / "vae")
    photos(folder / "photos", NAMES)
    assert encode.main(arguments(folder, folder / "whole")) == 0
    return folder


def arguments(setting: Path, out: Path, *more: str) -> list[str]:
    given = [f"--model={setting / 'vae'}", f"--data.source={setting / 'photos'}", "--data.workers=0", "--precision=fp32"]
    return [*given, "--shard_rows=4", "--batch_size=2", f"--out={out}", *more]


def partials(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if is_partial(path.name)]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize(
    "file",
    ["images-00000.parquet", "plan.json", "vae", "data-00001.safetensors", "data-00002.parquet", "data-00001.json", "manifest.json"],
)
def test_a_disk_that_takes_no_more_ends_the_run_with_one_message_and_the_next_goes_on(
    setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: str, code: int
) -> None:
    def full(commit: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def committed(source: Any, target: Any) -> None:
            if Path(target).name == file:
                raise OSError(code, os.strerror(code))
            commit(source, target)

        return committed

    with monkeypatch.context() as patched:
        for name in ("replace", "link"):
            patched.setattr(os, name, full(getattr(os, name)))
        assert encode.main(arguments(setting, tmp_path)) == 2
    message = capsys.readouterr().err
    remedy = "make room" if code == errno.ENOSPC else "see to it that it can be written"
    # Of a shard, the first of its files.
    assert file.partition(".")[0] in message
    assert f"cannot be written ({os.strerror(code)}); {remedy}, then the same command goes on" in message
    assert message.count("error: ") == 1 and "Traceback" not in message
    assert partials(tmp_path) == []
    assert not (tmp_path / file).exists()
    assert encode.main(arguments(setting, tmp_path)) == 0
    assert files(tmp_path) == files(setting / "whole")


def test_a_file_that_may_not_grow_ends_the_run_likewise(setting: Path, tmp_path: Path) -> None:
    """The kernel's own refusal, in the middle of writing a shard: its tensors fit, its header does not."""
    argv = arguments(setting, tmp_path / "out")
    largest = 4 * (2 * 4 * 8 * 8 * 4 + 16)
    assert (setting / "whole" / "data-00000.safetensors").stat().st_size > largest
    # The model is larger than a shard: it is there already.
    assert encode.main([*argv, "--only=plan"]) == 0
    process = start(argv, limit=largest)
    assert finish(process) == 2
    assert partials(tmp_path / "out") == []
    assert not list((tmp_path / "out").glob("data-*"))
    assert encode.main(argv) == 0
    assert files(tmp_path / "out") == files(setting / "whole")


def test_a_folder_that_cannot_be_written_is_refused(
    setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = os.open

    def refusing(path: Any, flags: int, *more: int, **options: Any) -> int:
        if flags & os.O_CREAT and Path(path).parent == tmp_path:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refusing)
    assert encode.main(arguments(setting, tmp_path)) == 2
    assert f"out: got '{tmp_path}'; cannot be written (Read-only file system)" in capsys.readouterr().err


def test_errors_of_reading_are_not_taken_for_those_of_writing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), commit.writing(tmp_path / "a"):
        (tmp_path / "nowhere").read_text()


@pytest.mark.parametrize("lost", ["vae", "images-00000.parquet"])
def test_what_is_lost_beside_the_shards_is_said_or_written_again(setting: Path, tmp_path: Path, lost: str) -> None:
    argv = arguments(setting, tmp_path)
    assert encode.main(argv) == 0
    commit.remove(tmp_path / lost)
    (tmp_path / "data-00001.json").unlink()
    assert encode.main(argv) == 0
    expected = {name: content for name, content in files(setting / "whole").items() if name != "images-00000.parquet"}
    assert {name: content for name, content in files(tmp_path).items() if name != "images-00000.parquet"} == expected


@pytest.mark.parametrize("name", ["data-00001.safetensors", "data-00001.parquet", "data-00001.json", "manifest.json"])
def test_a_folder_where_a_file_should_be_is_named(setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert encode.main(arguments(setting, tmp_path)) == 0
    expected = files(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    capsys.readouterr()
    assert encode.main(arguments(setting, tmp_path)) == 2
    assert f"{name} cannot be written (Is a directory); take away what has its name" in capsys.readouterr().err
    (tmp_path / name).rmdir()
    assert encode.main(arguments(setting, tmp_path)) == 0
    assert files(tmp_path) == expected
