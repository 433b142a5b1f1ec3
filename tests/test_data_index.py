"""Indexed folders: what a written index opens, what it costs, and files that are not what was indexed."""

import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import pyarrow as pa
import pytest

from autoencoder.config import DataConfig
from autoencoder.data import folder as folders
from autoencoder.data.index import opening, table
from autoencoder.data.paths import find_images
from autoencoder.data.sources import Indexed, Source, Subset, open_images
from autoencoder.runtime.errors import UsageError
from tests.source_files import FILES, write_tree

NAMES = ("ape/1.png", "ape/x/3.png", "bee/2.png", "bee/10.png")


def opened(root: pathlib.Path, index: pathlib.Path | None = None, split: str = "train") -> Source:
    return open_images(DataConfig(source=str(root)), split=split, index=index)


def facts(source: Source) -> tuple[object, ...]:
    records = [source.read(k) for k in range(len(source))]
    return source.labels, source.fingerprint, [(record.id, record.label, record.pixels.tobytes()) for record in records]


def written(source: Source, path: pathlib.Path) -> pathlib.Path:
    assert isinstance(source, Indexed)
    source.write_index(path)
    return path


def test_a_written_index_opens_the_same_source_wherever_the_folder_lies(tmp_path: pathlib.Path) -> None:
    write_tree(tmp_path / "here", *(f"train/{name}" for name in NAMES), "val/cat/1.png")
    source = opened(tmp_path / "here")
    index = written(source, tmp_path / "index.arrow")
    expected = facts(source)
    (tmp_path / "here").rename(tmp_path / "there")
    again = opened(tmp_path / "there", index)
    assert facts(again) == expected
    assert again.labels == ["ape", "bee", "cat"]
    # Reading one that was opened gives the same bits, so that a copy of a copy is the original.
    assert written(again, tmp_path / "copy.arrow").read_bytes() == index.read_bytes()


def test_with_an_index_nothing_is_looked_through(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path / "photos", *NAMES)
    index = written(opened(tmp_path / "photos"), tmp_path / "index.arrow")
    write_tree(tmp_path / "photos", "ape/0.png")

    def scan(root: str) -> None:
        raise AssertionError(f"looked through {root}")

    monkeypatch.setattr(folders, "find_images", scan)
    assert [opened(tmp_path / "photos", index).read(k).id for k in range(4)] == ["ape/1.png", "ape/x/3.png", "bee/10.png", "bee/2.png"]


def test_an_index_is_mapped_and_travels_as_its_path(tmp_path: pathlib.Path) -> None:
    write_tree(tmp_path / "photos", *NAMES)
    index = written(opened(tmp_path / "photos"), tmp_path / "index.arrow")
    before = pa.total_allocated_bytes()
    mapped = table.Index.open(index)
    assert pa.total_allocated_bytes() == before
    other = pickle.loads(pickle.dumps(opened(tmp_path / "photos", index)))
    assert other.read(3).id == "bee/2.png"
    assert len(pickle.dumps(mapped)) < 300
    # One that was never written travels as it is.
    assert pickle.loads(pickle.dumps(opened(tmp_path / "photos"))).read(3).id == "bee/2.png"


def test_an_index_of_other_settings_or_of_another_version_or_none_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path / "photos", "train/1.png", "val/2.png")
    index = written(opened(tmp_path / "photos"), tmp_path / "index.arrow")
    with pytest.raises(UsageError, match=r"was made with .*'split': 'train'.*, not with .*'split': 'val'"):
        opened(tmp_path / "photos", index, split="val")
    with pytest.raises(UsageError, match=r"gone.arrow cannot be read as an index"):
        opened(tmp_path / "photos", tmp_path / "gone.arrow")
    (tmp_path / "half.arrow").write_bytes(index.read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"half.arrow cannot be read as an index"):
        opened(tmp_path / "photos", tmp_path / "half.arrow")
    monkeypatch.setattr(table, "VERSION", 7)
    with pytest.raises(UsageError, match=r"is an index of version 2, this is for version 7"):
        opened(tmp_path / "photos", index)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_file_that_is_not_the_one_indexed_is_no_bad_image(tmp_path: pathlib.Path, loaded: bool) -> None:
    write_tree(tmp_path, "a.png", "b.png", "c.png")
    source = opened(tmp_path, written(opened(tmp_path), tmp_path / "index.arrow") if loaded else None)
    (tmp_path / "b.png").write_bytes(FILES[1] + b"\0")
    (tmp_path / "c.png").unlink()
    assert source.read(0).id == "a.png"
    size = len(FILES[1])
    with pytest.raises(
        UsageError, match=rf"data.source: .*b.png has changed since it was indexed: it has {size + 1} bytes, .* {size} bytes"
    ):
        source.read(1)
    with pytest.raises(UsageError, match=r"c.png has changed since it was indexed: it is gone"):
        Subset(source, pa.array([2]).to_numpy()).read(0)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_file_replaced_by_one_of_its_size_is_named_and_a_copy_that_keeps_times_is_not(tmp_path: pathlib.Path, loaded: bool) -> None:
    write_tree(tmp_path / "photos", "a.png", "b.png", "c.png")
    for number, name in enumerate("abc"):
        os.utime(tmp_path / "photos" / f"{name}.png", ns=(0, 1_700_000_000_123_456_789 + number))
    index = written(opened(tmp_path / "photos"), tmp_path / "index.arrow")
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "photos", copy)
    # As an archive of whole seconds would unpack it.
    os.utime(copy / "c.png", ns=(0, 1_700_000_000_000_000_000))
    source = opened(copy, index if loaded else None)
    assert [source.read(k).id for k in range(3)] == ["a.png", "b.png", "c.png"]
    content = bytearray((copy / "b.png").read_bytes())
    content[-20] ^= 1
    (copy / "b.png").write_bytes(content)
    assert source.read(0).id == "a.png"
    with pytest.raises(UsageError, match=r"b.png has changed .*: it was modified at 20.*, when it was indexed at 2023-11-1"):
        source.read(1)


def test_links_are_followed_and_one_that_leads_nowhere_is_a_bad_image(tmp_path: pathlib.Path) -> None:
    write_tree(tmp_path, "elsewhere/1.png", "photos/b.png")
    (tmp_path / "photos" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "c.png").symlink_to(tmp_path / "nowhere.png")
    found = list(find_images(str(tmp_path / "photos")))
    assert [(image.name, image.bytes) for image in found] == [("b.png", len(FILES[1])), ("c.png", -1), ("a/1.png", len(FILES[0]))]
    with pytest.raises(Exception, match="No such file") as caught:
        opened(tmp_path / "photos").read(1)
    assert not isinstance(caught.value, UsageError)


def test_names_that_are_not_utf8_are_kept(tmp_path: pathlib.Path) -> None:
    name = os.fsdecode(b"caf\xe9 \xf0.png")
    write_tree(tmp_path, name, "ü.png")
    source = opened(tmp_path)
    assert sorted(source.read(k).id for k in range(2)) == sorted([name, "ü.png"])
    assert facts(opened(tmp_path, written(source, tmp_path / "index.arrow"))) == facts(source)


def test_order_labels_and_fingerprint_are_those_of_names_and_sizes(tmp_path: pathlib.Path) -> None:
    write_tree(tmp_path, "b/2.png", "b/10.png", "B/1.png", "b/c/3.png", "B/c.png")
    names = ["B/1.png", "B/c.png", "b/10.png", "b/2.png", "b/c/3.png"]
    source = opened(tmp_path)
    assert [source.read(k).id for k in range(5)] == names
    assert [source.read(k).label for k in range(5)] == [0, 0, 1, 1, 1]
    assert source.fingerprint == opening.fingerprint((name, (tmp_path / name).stat().st_size) for name in names)


def test_long_scans_say_how_far_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_EVERY", -1.0)
    assert list(opening.told(range(200), "files")) == list(range(200))
    assert capsys.readouterr().err.splitlines()[1] == "index: 128 files in 0 s"
    assert list(opening.told("ab", "tars", of=2)) == ["a", "b"]
    assert capsys.readouterr().err.splitlines() == ["index: 1 of 2 tars in 0 s", "index: 2 of 2 tars in 0 s"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert list(opening.told("ab", "tars", of=2)) == ["a", "b"]
    assert capsys.readouterr().err == ""


RESIDENT = """
import gc, resource, sys
from pathlib import Path
from autoencoder.config import DataConfig
from autoencoder.data.folder import FolderSource
from autoencoder.data.index.table import Index, table_of
from autoencoder.data.folder import _SCHEMA

def resident() -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

rows = 200_000
table_of([(b"x", 1, 1, 0)], _SCHEMA)
gc.collect()
before = resident()
made = Index(table_of(((f"n{k % 1000:08d}/n{k:016d}.JPEG".encode(), k, k, k % 1000) for k in range(rows)), _SCHEMA), {})
gc.collect()
print((resident() - before) / rows)
made.write(Path(sys.argv[1]))
del made
gc.collect()
before = resident()
again = Index.open(Path(sys.argv[1]))
assert sum(again.value("label", row) for row in range(0, rows, 100)) > 0
print((resident() - before) / rows)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_row_of_an_index_takes_less_than_200_bytes_of_memory_and_a_mapped_one_next_to_none(tmp_path: pathlib.Path) -> None:
    run = [sys.executable, "-c", RESIDENT, str(tmp_path / "index.arrow")]
    made, mapped = map(float, subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())
    assert 40 < made < 200
    assert mapped < 10
