"""Sources behind URLs, through fsspec: `file://`, `memory://`, and protocols whose package is missing."""

import pathlib
import pickle
from collections.abc import Iterator

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from autoencoder.config import DataConfig
from autoencoder.data import remote
from autoencoder.data.index import members
from autoencoder.data.loader import TrainLoader
from autoencoder.data.paths import check_source, folder_splits, locate, visible_subfolders
from autoencoder.data.sources import Indexed, Source, WithColumns, open_images, open_train_and_validation
from autoencoder.runtime.errors import ConfigError, UsageError
from tests.source_files import FILES, PIXELS, tar, write_parquet, write_tree

KINDS = ("folder", "tars", "parquet")
NAMES = ("train/ape/1.png", "train/bee/10.png", "train/bee/2.png", "train/bee/x/3.png", "val/ape/0.png", "val/.hidden/1.png", "val/a.txt")


@pytest.fixture
def files(tmp_path: pathlib.Path) -> pathlib.Path:
    write_tree(tmp_path / "data" / "folder", *NAMES)
    for k in range(2):
        entries = [(f"{n}.{end}", data) for n in range(3 * k, 3 * k + 3) for end, data in (("png", FILES[n]), ("txt", b"a"), ("cls", b"7"))]
        (tmp_path / "data" / f"{k}.tar").write_bytes(tar(entries))
        write_parquet(tmp_path / "data" / f"{k}.parquet", range(5 * k, 5 * k + 5), 2, label=["b", "a", None, "b", "c"])
    return tmp_path / "data"


@pytest.fixture
def memory(files: pathlib.Path) -> Iterator[str]:
    there = fsspec.filesystem("memory")
    there.put(str(files), "/bucket/data", recursive=True)
    yield "memory://bucket/data"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, files: pathlib.Path) -> str:
    if request.param == "file":
        return f"file://{files}"
    address: str = request.getfixturevalue("memory")
    return address


def pattern(kind: str) -> str:
    return {"folder": "/folder", "tars": "/*.tar", "parquet": "/*.parquet"}[kind]


def opened(source: str, index: pathlib.Path | None = None) -> Source:
    return open_images(DataConfig(source=source), split="train", index=index)


def facts(source: Source) -> tuple[object, ...]:
    records = [source.read(k) for k in range(len(source))]
    return source.labels, source.fingerprint, [(record.id, record.label, record.pixels.tobytes()) for record in records]


@pytest.mark.parametrize("kind", KINDS)
def test_a_url_gives_what_the_files_beneath_it_give(files: pathlib.Path, url: str, kind: str, tmp_path: pathlib.Path) -> None:
    here, there = opened(f"{files}{pattern(kind)}"), opened(url + pattern(kind))
    assert facts(there) == facts(here)
    assert facts(pickle.loads(pickle.dumps(there))) == facts(here)
    assert isinstance(there, Indexed)
    there.write_index(tmp_path / "index.arrow")
    assert facts(opened(url + pattern(kind), tmp_path / "index.arrow")) == facts(here)
    # What was indexed there may be read here.
    assert facts(opened(f"{files}{pattern(kind)}", tmp_path / "index.arrow")) == facts(here)


@pytest.mark.parametrize("kind", ["tars", "parquet"])
def test_other_columns_come_from_there_too(url: str, kind: str) -> None:
    source = opened(url + pattern(kind))
    assert isinstance(source, WithColumns)
    if kind == "tars":
        assert source.columns(np.array([4, 0]), ["__key__", "txt"]).to_pydict() == {"__key__": ["4", "0"], "txt": ["a", "a"]}
    else:
        assert source.columns(np.array([4, 9, 0]), ["number"]).to_pydict() == {"number": [4, 9, 0]}


def test_splits_and_single_files_are_found(url: str) -> None:
    assert folder_splits(f"{url}/folder") == ["train", "val"]
    assert visible_subfolders(f"{url}/folder/val") == ["ape"]
    train, validation = open_train_and_validation(DataConfig(source=f"{url}/folder/"))
    assert [validation.read(k).id for k in range(len(validation))] == ["ape/0.png"]
    assert [train.read(k).label for k in range(4)] == [0, 1, 1, 1]
    single = locate(f"{url}/1.tar")
    assert (single.kind, len(single.paths), single.paths[0].removeprefix(single.base)) == ("webdataset", 1, "1.tar")
    for source in ("/folder", "/*.tar", "/**/*.tar", "/0.parquet"):
        check_source(url + source)


def test_what_is_not_there_is_refused(url: str) -> None:
    for source, said in (
        ("/nothing", "no such file or folder there"),
        ("/nothing/*.tar", "no file matches"),
        ("/folder/val/a.txt", "not .txt"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            check_source(url + source, "data.source")
        assert (caught.value.key, caught.value.given) == ("data.source", url + source)


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_changed_since_they_were_indexed_are_refused(url: str, kind: str) -> None:
    source, other = (pickle.loads(pickle.dumps(opened(url + pattern(kind)))) for _ in range(2))
    name = {"folder": "/folder/train/ape/1.png", "tars": "/0.tar", "parquet": "/0.parquet"}[kind]
    with fsspec.open(url + name, "ab") as file:
        file.write(bytes(100))
    with pytest.raises(UsageError, match=r"data.source: (file|memory)://.* has changed since it was indexed: it has [\d,]+ bytes"):
        source.read(0)
    there, path = fsspec.core.url_to_fs(url + name)
    there.rm(path)
    with pytest.raises(UsageError, match="it is gone"):
        other.read(0)


@pytest.mark.parametrize(("kind", "workers"), [("folder", 2), ("tars", 1), ("parquet", 1)])
def test_loader_processes_read_from_there(files: pathlib.Path, kind: str, workers: int) -> None:
    def batches(source: str, workers: int) -> list[bytes]:
        config = DataConfig(source=source, resolution=8, flip=False, workers=workers)
        shape = {"latent_shape": (1, 1, 1), "first_step": 0, "rank": 0, "world": 1, "pin_memory": False}
        loader = TrainLoader(opened(source), config, seed=0, batch_size=4, microbatch=2, images=12, **shape)  # type: ignore[arg-type]
        return [batch.pixels.numpy().tobytes() for _, step in loader for batch in step]

    assert batches(f"file://{files}{pattern(kind)}", workers) == batches(f"{files}{pattern(kind)}", 0)


def test_a_protocol_without_its_package_or_without_a_name_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    with pytest.raises(ConfigError, match=r"data.source: got 'what://x'; .*what.*; give a path, or a URL of a protocol that fsspec knows"):
        check_source("what://x", "data.source")
    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ConfigError, match=r"got 's3://b/\*.tar'; s3:// needs a package that is not installed: Install s3fs to access S3"):
        check_source("s3://b/*.tar", "data.source")


def test_a_store_that_cannot_be_reached_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(url: str) -> None:
        raise PermissionError("Forbidden")

    monkeypatch.setattr(fsspec.core, "url_to_fs", unreachable)
    with pytest.raises(ConfigError, match=r"cannot be reached: PermissionError: Forbidden; check the address, the network and the cred"):
        check_source("s3://bucket/*.tar", "data.source")


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_fails_while_reading_makes_no_bad_image(memory: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pickle.loads(pickle.dumps(opened(memory + pattern(kind))))

    def fail(*_: object, **__: object) -> None:
        raise TimeoutError("no answer")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    monkeypatch.setattr(MemoryFileSystem, "open", fail)
    with pytest.raises(UsageError, match=r"data.source: .*cannot be read.*TimeoutError: no answer"):
        source.read(0)


def test_members_of_tars_there_are_kept_by_their_version(memory: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(members, "WORTH_KEEPING", -1.0)
    first = facts(opened(f"{memory}/*.tar"))
    assert len(list((tmp_path / "cache" / "firststage" / "tars").iterdir())) == 2
    monkeypatch.setattr(members, "_members", None)
    assert facts(opened(f"{memory}/*.tar")) == first
    with fsspec.open(f"{memory}/0.tar", "rb") as file:
        same = file.read()
    with fsspec.open(f"{memory}/0.tar", "wb") as file:
        file.write(same)
    with pytest.raises(TypeError):
        opened(f"{memory}/*.tar")


def test_pixels_are_those_of_the_files(url: str) -> None:
    assert np.array_equal(opened(f"{url}/*.tar").read(5).pixels, PIXELS[5])
    assert np.array_equal(opened(f"{url}/*.parquet").read(9).pixels, PIXELS[9])


def test_only_urls_are_remote() -> None:
    assert [remote.is_remote(source) for source in ("s3://b/*.tar", "photos", "C:/photos", "owner/name", "demo")] == [True] + [False] * 4
