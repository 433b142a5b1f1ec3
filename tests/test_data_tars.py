"""WebDatasets: samples, labels, other fields, the cache of members, and tars that cannot be read."""

import io
import os
import pathlib
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from autoencoder.config import DataConfig
from autoencoder.data.index import members, samples
from autoencoder.data.index.listed import Listed
from autoencoder.data.sources import BadImage, Indexed, Source, WithColumns, open_images
from autoencoder.data.tars import TarSource
from autoencoder.runtime.errors import ConfigError, UsageError
from tests.source_files import FILES, PIXELS, tar


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(folder: pathlib.Path, index: pathlib.Path | None = None, **settings: str) -> Source:
    return open_images(DataConfig(source=f"{folder}/*.tar", **settings), split="train", index=index)  # type: ignore[arg-type]


def samples_of(first: int, count: int, **others: str) -> list[tuple[str, bytes]]:
    return [
        member
        for k in range(first, first + count)
        for member in [(f"{k:03d}.png", FILES[k]), *((f"{k:03d}.{field}", text.format(k=k).encode()) for field, text in others.items())]
    ]


def test_images_are_read_where_they_lie(tmp_path: pathlib.Path) -> None:
    for shard in range(3):
        (tmp_path / f"{shard}.tar").write_bytes(tar(samples_of(5 * shard, 5, cls="{k}\n")))
    source = opened(tmp_path)
    assert len(source) == 15 and source.labels is None
    for k in np.random.default_rng(0).permutation(15).tolist():
        record = source.read(k)
        assert (record.id, record.label) == (f"{k}:{k:03d}.png", k)
        assert np.array_equal(record.pixels, PIXELS[k])
    assert np.array_equal(pickle.loads(pickle.dumps(source)).read(7).pixels, PIXELS[7])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_of_all_formats_are_found(tmp_path: pathlib.Path, format: int) -> None:
    long = "d" * 80 + "/" + "n" * (90 if format == tarfile.USTAR_FORMAT else 200)
    names = [f"{long}.png", "ü/é.png", "plain.PNG"]
    (tmp_path / "x.tar").write_bytes(tar(list(zip(names, FILES, strict=False)), format=format))
    source = opened(tmp_path)
    assert [source.read(k).id for k in range(3)] == [f"{k}:{name}" for k, name in enumerate(names)]
    assert all(np.array_equal(source.read(k).pixels, PIXELS[k]) for k in range(3))


def test_many_more_tars_than_may_be_open(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoencoder.data.ranges._OPEN", 3)
    for shard in range(12):
        (tmp_path / f"{shard:02d}.tar").write_bytes(tar(samples_of(shard, 1)))
    source = opened(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for k in (*range(12), *range(12)):
        assert np.array_equal(source.read(k).pixels, PIXELS[k])
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_threads_may_read_side_by_side(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoencoder.data.ranges._OPEN", 1)
    for shard in range(6):
        (tmp_path / f"{shard:02d}.tar").write_bytes(tar(samples_of(shard, 1)))
    source = opened(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: source.read(k % 6).pixels, range(300)))
    assert all(np.array_equal(pixels, PIXELS[k % 6]) for k, pixels in enumerate(found))


def test_keys_are_names_up_to_the_first_dot_with_their_folder(tmp_path: pathlib.Path) -> None:
    entries = [("./a.b/1.seg.npy", b"x"), ("./a.b/1.png", FILES[0]), ("c/1.png", FILES[1]), ("c/.hidden.png", b""), ("c/__x.png", b"")]
    (tmp_path / "x.tar").write_bytes(tar([*entries, ("readme", b""), ("c/1.txt", b"t")]))
    source = opened(tmp_path, image_column="png")
    assert [source.read(k).id for k in range(2)] == ["0:./a.b/1.png", "1:c/1.png"]
    assert isinstance(source, WithColumns)
    assert source.columns(np.array([1, 0]), ["__key__", "txt"]).to_pydict() == {"__key__": ["c/1", "./a.b/1"], "txt": ["t", None]}


def test_duplicate_keys_are_samples_of_their_own(tmp_path: pathlib.Path) -> None:
    for shard in range(2):
        (tmp_path / f"{shard}.tar").write_bytes(tar([("a.png", FILES[2 * shard]), ("a.png", FILES[2 * shard + 1])]))
    source = opened(tmp_path)
    assert [source.read(k).id for k in range(4)] == ["0:a.png", "1:a.png", "2:a.png", "3:a.png"]
    assert all(np.array_equal(source.read(k).pixels, PIXELS[k]) for k in range(4))


def test_labels_are_numbers_or_the_names_of_classes_and_may_be_missing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "1.tar").write_bytes(tar([("a.cls", b"dog"), ("a.png", FILES[0]), ("b.png", FILES[1])]))
    (tmp_path / "2.tar").write_bytes(tar([("c.png", FILES[2]), ("c.cls", b" ape\n"), ("c.size", b"7"), ("c.txt", b"12")]))
    source = opened(tmp_path)
    assert source.labels == ["ape", "dog"]
    assert [source.read(k).label for k in range(3)] == [1, -1, 0]
    numbers = opened(tmp_path, label_column="txt")
    assert numbers.labels is None
    assert [numbers.read(k).label for k in range(3)] == [-1, -1, 12]
    with pytest.raises(ConfigError, match=r"data.label_column: got 'size'; columns that can hold labels: cls, txt"):
        opened(tmp_path, label_column="size")


def test_a_caption_is_no_label(tmp_path: pathlib.Path) -> None:
    (tmp_path / "1.tar").write_bytes(tar(samples_of(0, 2, txt="a caption " * 9)))
    with pytest.raises(ConfigError, match=r"data.label_column: got 'txt'; 000.txt has 90 bytes; class names and numbers have 64 at most"):
        opened(tmp_path, label_column="txt")


def test_other_fields_come_by_name(tmp_path: pathlib.Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar(samples_of(0, 3, txt="photo {k}, ü", json='{{"size": {k}}}', cls="{k}", bin="raw {k}")))
    (tmp_path / "1.tar").write_bytes(tar(samples_of(3, 2, caption="a")))
    source = opened(tmp_path)
    assert isinstance(source, WithColumns)
    assert source.others(None, "data.columns") == ["__key__", "txt", "json", "caption"]
    assert source.columns(np.array([4, 1, 1]), ["__key__", "txt", "json"]).to_pydict() == {
        "__key__": ["004", "001", "001"],
        "txt": [None, "photo 1, ü", "photo 1, ü"],
        "json": [None, '{"size": 1}', '{"size": 1}'],
    }
    assert source.columns(np.array([2]), ["bin"]).to_pydict() == {"bin": [b"raw 2"]}
    with pytest.raises(ConfigError, match=r"data.columns: got 'size'; the table has __key__, txt, json, cls, bin, caption"):
        source.others(["size"], "data.columns")


def test_of_two_images_a_sample_one_is_chosen_by_its_ending(tmp_path: pathlib.Path) -> None:
    for shard in range(2):
        rows = [member for k in range(3) for member in ((f"{k}.png", FILES[k]), (f"{k}.mask.png", FILES[10 + k]))]
        (tmp_path / f"{shard}.tar").write_bytes(tar(rows))
    with pytest.raises(ConfigError, match=r"data.image_column: not given; columns that can hold images: png, mask.png \(of 0\); give one"):
        opened(tmp_path)
    with pytest.raises(ConfigError, match=r"data.image_column: got 'jpg'; columns that can hold images: png, mask.png"):
        opened(tmp_path, image_column="jpg")
    masks = opened(tmp_path, image_column="mask.png")
    assert masks.read(4).id == "4:1.mask.png"
    assert np.array_equal(masks.read(4).pixels, PIXELS[11])


def test_samples_may_have_images_of_different_kinds_or_none(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar([("a.png", FILES[0]), ("b.gif", FILES[1]), ("c.txt", b"no image"), ("d.png", b"")]))
    source = opened(tmp_path)
    assert [source.read(k).id for k in range(2)] == ["0:a.png", "1:b.gif"]
    for row, id, reason in ((2, "2:c", "the sample has no image"), (3, "3:d.png", "not an image of a known format")):
        with pytest.raises(BadImage) as caught:
            source.read(row)
        assert (caught.value.id, caught.value.reason) == (id, reason)
    (tmp_path / "x.tar").write_bytes(tar([("c.txt", b"no image")]))
    with pytest.raises(ConfigError, match=r"no column holds images, among txt"):
        opened(tmp_path)


def test_a_written_index_opens_the_same_samples_without_the_headers(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    for shard in range(2):
        (tmp_path / "here" / f"{shard}.tar").write_bytes(tar(samples_of(3 * shard, 3, cls="kind {k}", txt="{k}")))
    source = opened(tmp_path / "here")
    assert isinstance(source, Indexed)
    source.write_index(tmp_path / "index.arrow")
    expected = [source.read(k) for k in range(6)]
    (tmp_path / "here").rename(tmp_path / "there")
    # Tars that came later are not in it.
    (tmp_path / "there" / "2.tar").write_bytes(tar(samples_of(6, 1)))
    monkeypatch.setattr(samples, "members_of", None)
    again = opened(tmp_path / "there", tmp_path / "index.arrow")
    assert (len(again), again.labels, again.fingerprint) == (6, source.labels, source.fingerprint)
    for k, record in enumerate(expected):
        found = again.read(k)
        assert (found.id, found.label, found.pixels.tobytes()) == (record.id, record.label, record.pixels.tobytes())
    assert isinstance(again, TarSource)
    assert again.columns(np.arange(6), ["txt"])["txt"].to_pylist() == list("012345")


def test_members_are_kept_for_a_version_of_a_tar(tmp_path: pathlib.Path, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listed() -> Listed:
        stat = file.stat()
        return Listed(str(file), stat.st_size, str(stat.st_mtime_ns))

    file = tmp_path / "x.tar"
    file.write_bytes(tar(samples_of(0, 3)))
    members.members_of(listed(), "data.source")
    assert not cache.exists()
    monkeypatch.setattr(members, "WORTH_KEEPING", -1.0)
    first = members.members_of(listed(), "data.source")
    (kept,) = (cache / "firststage" / "tars").iterdir()
    # What is kept is taken: without the tar's own headers there is nothing else to take.
    with monkeypatch.context() as patch:
        patch.setattr(members, "_members", None)
        assert members.members_of(listed(), "data.source").equals(first)
    kept.write_bytes(kept.read_bytes()[:40])
    assert members.members_of(listed(), "data.source").equals(first)
    assert members.map_table(kept).equals(first)
    # As long, but another: the time tells.
    before = listed()
    file.write_bytes(tar([(f"{k:03d}.gif", FILES[k]) for k in range(3)]))
    os.utime(file, ns=(0, int(before.version) + 1))
    assert listed().bytes == before.bytes
    assert members.members_of(listed(), "data.source")["field"].to_pylist() == ["gif"] * 3


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "WORTH_KEEPING", -1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x.tar"))
    (tmp_path / "x.tar").write_bytes(tar(samples_of(0, 3)))
    assert len(opened(tmp_path)) == 3


def test_a_tar_that_changed_since_it_was_indexed_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar(samples_of(0, 3)))
    source = opened(tmp_path)
    source.read(0)
    with open(tmp_path / "x.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(
        UsageError, match=r"data.source: .*x.tar has changed since it was indexed: it has 10,752 bytes, the index has 10,240"
    ):
        source.read(1)
    other = opened(tmp_path)
    (tmp_path / "x.tar").unlink()
    with pytest.raises(UsageError, match="it is gone"):
        pickle.loads(pickle.dumps(other)).read(0)
    (tmp_path / "x.tar").write_bytes(tar(samples_of(0, 3)))
    third = opened(tmp_path)
    os.utime(tmp_path / "x.tar", ns=(0, 1))
    with pytest.raises(UsageError, match="it was modified at 1970-01-01"):
        third.read(1)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda whole: whole[:1100], "is no whole tar"),
        (lambda whole: whole[:1024] + b"?" * 512 + whole[1536:], "no header at byte 1,024, where one should be"),
        (lambda whole: whole[:512], "is no whole tar"),
        (lambda whole: b"no tar" * 1000, "is no whole tar"),
        (lambda whole: b"", "is no whole tar"),
        (lambda whole: b"\x1f\x8b" + whole, "is compressed, and images cannot be read from the middle of it; unpack it"),
    ],
    ids=["cut in a header", "a broken header", "cut before the content", "text", "empty", "gzip"],
)
def test_what_is_no_whole_tar_is_refused(tmp_path: pathlib.Path, damage: object, reason: str) -> None:
    assert callable(damage)
    (tmp_path / "x.tar").write_bytes(damage(tar(samples_of(0, 3))))
    with pytest.raises(ConfigError, match=rf"data.source: got .*x.tar'; .*{reason}"):
        opened(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE])
def test_members_without_bytes_of_their_own_are_refused_and_folders_passed_over(tmp_path: pathlib.Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        member = tarfile.TarInfo("a.png")
        member.size = len(FILES[0])
        archive.addfile(member, io.BytesIO(FILES[0]))
        folder = tarfile.TarInfo("b.dir")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    assert len(opened(tmp_path)) == 1
    with tarfile.open(tmp_path / "x.tar", "a", format=tarfile.GNU_FORMAT) as archive:
        other = tarfile.TarInfo("b.png")
        other.type, other.linkname = kind, "a.png"
        archive.addfile(other)
    with pytest.raises(ConfigError, match=r"b.png is a link or stored as a sparse file; pack it anew with --dereference"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar.zst"])
def test_names_of_compressed_tars_are_refused_with_the_remedy(tmp_path: pathlib.Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=f"{name} is compressed, .*; unpack it to a plain .tar"):
        open_images(DataConfig(source=str(tmp_path / name)), split="train")


def test_a_name_may_have_the_end_of_a_line_in_it(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar([("a\nb/c.png", FILES[0]), ("d\n.png", FILES[1])]))
    assert [opened(tmp_path).read(k).id for k in range(2)] == ["0:a\nb/c.png", "1:d\n.png"]


def test_an_empty_label_is_none_and_one_beyond_32_bits_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar([*samples_of(0, 2, cls="1{k}"), ("002.png", FILES[2]), ("002.cls", b" ")]))
    source = opened(tmp_path)
    assert source.labels is None
    assert [source.read(k).label for k in range(3)] == [10, 11, -1]
    (tmp_path / "a.tar").write_bytes(tar(samples_of(0, 2, cls="2147483648")))
    with pytest.raises(ConfigError, match=r"label_column: .*a label is 2147483648; classes are numbers below 2\*\*31, or names"):
        opened(tmp_path)


def test_names_that_make_a_field_of_every_member_are_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar([(f"{k}.{k:04d}.png", FILES[0]) for k in range(samples.MOST_FIELDS + 1)]))
    with pytest.raises(ConfigError, match=r"a.tar has fields .* like '0500.png', and more than 500 of them"):
        opened(tmp_path)


def test_a_tar_packed_in_another_order_is_another_source(tmp_path: pathlib.Path) -> None:
    members_there = samples_of(0, 5)
    fingerprints = set()
    for packed in (members_there, members_there[::-1], members_there):
        (tmp_path / "a.tar").write_bytes(tar(packed))
        fingerprints.add((opened(tmp_path).fingerprint, (tmp_path / "a.tar").stat().st_size))
    assert len(fingerprints) == 2 and len({size for _, size in fingerprints}) == 1
