"""What a source string names."""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from autoencoder.data.paths import check_source, folder_splits, locate, walk_images
from autoencoder.runtime.errors import ConfigError, UsageError


def touch(path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_sources_are_told_apart(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("photos/a.PNG", "b.parquet", "a.parquet", "deep/er/c.tar"):
        touch(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("demo").kind == "demo"
    assert (locate("photos").kind, locate("photos").paths) == ("folder", ("photos",))
    assert locate("~/photos").paths == (str(tmp_path / "photos"),)
    assert (locate("*.parquet").kind, locate("*.parquet").paths) == ("parquet", ("a.parquet", "b.parquet"))
    assert (locate("**/*.tar").kind, locate("**/*.tar").paths) == ("webdataset", ("deep/er/c.tar",))
    assert (locate("owner/some-name_1.0").kind, locate("owner/some-name_1.0").paths) == ("hub", ())
    for source in ("demo", "photos", "*.parquet", "a.parquet", "**/*.tar", "owner/name"):
        check_source(source)


@pytest.mark.parametrize(
    ("source", "remedy"),
    [
        ("missing", "no such file or folder"),
        ("./missing/folder", "no such file or folder"),
        ("photos/missing", "no such file or folder"),
        ("owner/missing.parquet", "no such file or folder"),
        ("", "no such file or folder"),
        ("missing/*.parquet", "no file matches"),
        ("photos/notes.txt", "not .txt"),
        ("mixed/*", "not .parquet, .tar"),
        ("no-images", "holds no images"),
    ],
)
def test_what_names_no_images_is_refused(source: str, remedy: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("photos/a.jpg", "photos/notes.txt", "mixed/a.parquet", "mixed/b.tar", "no-images/a.txt", "no-images/.hidden.png"):
        touch(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=remedy) as caught:
        check_source(source, "validation_source")
    assert (caught.value.key, caught.value.given) == ("validation_source", source)


def test_images_are_found_in_the_order_of_their_names(tmp_path: pathlib.Path) -> None:
    for name in ("b/2.png", "b/10.JPEG", "a.webp", "B/1.tif", "b/.1.png", ".cache/x.png", "b/readme.md", "b/c/3.png"):
        touch(tmp_path / name)
    assert list(walk_images(str(tmp_path))) == ["a.webp", "B/1.tif", "b/10.JPEG", "b/2.png", "b/c/3.png"]


def test_pipes_and_sockets_named_like_images_are_passed_over_with_one_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    os.mkfifo(photos / "pipe.png")
    with pytest.raises(ConfigError, match="the folder holds no images"):
        check_source(str(photos))
    assert (list(walk_images(str(photos))), capsys.readouterr().err.count("\n")) == ([], 1)
    touch(photos / "b" / "1.png")
    (photos / "to-a-pipe.png").symlink_to("pipe.png")
    (photos / "to-an-image.png").symlink_to("b/1.png")
    # The path of a socket is to be short.
    monkeypatch.chdir(photos / "b")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("2.jpg")
        check_source(str(photos))
        assert list(walk_images(str(photos))) == ["to-an-image.png", os.path.join("b", "1.png")]
    said = f"note: {photos}: 3 files are pipes, sockets or devices and are passed over, though named like an image\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("subfolders", "splits"),
    [
        (["train", "validation"], ["train", "validation"]),
        (["train", "test", "annotations"], ["annotations", "test", "train"]),
        (["train"], ["train"]),
        (["train", "plane", "car"], []),
        (["validation", "test"], []),
        (["cat", "dog"], []),
        ([], []),
    ],
)
def test_splits_of_a_folder(subfolders: list[str], splits: list[str], tmp_path: pathlib.Path) -> None:
    for name in [*subfolders, ".git"]:
        (tmp_path / name).mkdir()
    assert folder_splits(str(tmp_path)) == splits


def test_checking_paths_imports_nothing_heavy() -> None:
    code = (
        "import sys, autoencoder.data.paths; print(sorted({'torch', 'datasets', 'numpy', 'PIL', 'pyarrow', 'fsspec'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("look", [lambda root: list(walk_images(root)), lambda root: check_source(root)])
def test_links_that_go_in_a_circle_are_refused_and_others_followed(tmp_path: pathlib.Path, look: Callable[[str], object]) -> None:
    touch(tmp_path / "photos" / "a" / "text.txt")
    touch(tmp_path / "elsewhere" / "1.png")
    # The same folder twice is no circle, and a link to nothing but itself no folder.
    for name in ("b", "c"):
        os.symlink(tmp_path / "elsewhere", tmp_path / "photos" / name)
    os.symlink("self", tmp_path / "photos" / "self")
    assert list(walk_images(str(tmp_path / "photos"))) == [os.path.join("b", "1.png"), os.path.join("c", "1.png")]
    assert folder_splits(str(tmp_path / "photos")) == []
    (tmp_path / "elsewhere" / "1.png").unlink()
    for name in ("back", "again"):
        os.symlink(tmp_path / "photos", tmp_path / "elsewhere" / name)
    with pytest.raises(UsageError, match="is a link back to a folder that it is in"):
        look(str(tmp_path / "photos"))
