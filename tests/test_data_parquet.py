"""Parquet: row groups read where they lie, a few of them kept, and the order that training reads them in."""

import os
import pathlib
import pickle
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autoencoder.config import DataConfig
from autoencoder.data import parquet
from autoencoder.data.loader import TrainLoader
from autoencoder.data.parquet import ParquetSource
from autoencoder.data.sources import BadImage, Indexed, Source, WithColumns, blocks_of, open_images, open_train_and_validation
from autoencoder.runtime.errors import ConfigError, UsageError
from tests.source_files import FILES, PIXELS, table, write_parquet


def opened(folder: pathlib.Path, index: pathlib.Path | None = None, **settings: str) -> Source:
    return open_images(DataConfig(source=f"{folder}/*.parquet", **settings), split="train", index=index)  # type: ignore[arg-type]


@pytest.fixture
def photos(tmp_path: pathlib.Path) -> pathlib.Path:
    """40 images: row groups of 4, 4, 2 | 3, 3, 3, 1 | 20."""
    (tmp_path / "photos").mkdir()
    for name, images, rows in (("a", range(10), 4), ("b", range(10, 20), 3), ("c", range(20, 40), 99)):
        write_parquet(tmp_path / "photos" / f"{name}.parquet", images, rows, note=[f"note {k}" for k in images])
    return tmp_path / "photos"


def test_rows_are_those_that_pyarrow_reads(photos: pathlib.Path) -> None:
    source = opened(photos)
    for k in np.random.default_rng(0).permutation(40).tolist():
        assert np.array_equal(source.read(k).pixels, PIXELS[k])
        assert (source.read(k).id, source.read(k).label) == (str(k), -1)
    assert np.array_equal(pickle.loads(pickle.dumps(source)).read(23).pixels, PIXELS[23])


def test_a_table_gives_what_datasets_gave(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"]), "boxes": datasets.Sequence(datasets.Value("int64"))}
    )
    rows = {"image": [{"bytes": file, "path": f"{k}.png"} for k, file in enumerate(FILES)], "label": [0, 1] * 20, "boxes": [[1, 2]] * 40}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet", batch_size=7)
    source, told = opened(tmp_path), datasets.load_dataset("parquet", data_files=str(tmp_path / "x.parquet"), split="train")
    assert (len(source), source.labels) == (len(told), told.features["label"].names)
    for k, row in enumerate(told):
        assert np.array_equal(source.read(k).pixels, np.asarray(row["image"]))
        assert source.read(k).label == row["label"]
    assert isinstance(source, WithColumns)
    assert source.others(None, "data.columns") == ["boxes"]
    assert source.columns(np.array([3, 1]), ["boxes", "label"]).to_pydict() == {"boxes": [[1, 2]] * 2, "label": [1, 1]}


def test_columns_come_in_the_order_asked_for(photos: pathlib.Path) -> None:
    source = opened(photos)
    assert isinstance(source, WithColumns)
    assert source.others(None, "data.columns") == ["number", "note"]
    wanted = np.array([39, 0, 11, 11, 3, 25])
    assert source.columns(wanted, ["note", "number"]).to_pydict() == {"note": [f"note {k}" for k in wanted], "number": wanted.tolist()}


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (pa.array(["dog", None, "ape", "dog"]), ["ape", "dog"], [1, -1, 0, 1]),
        (pa.array(["dog", None, "ape", "dog"]).dictionary_encode(), ["ape", "dog"], [1, -1, 0, 1]),
        (pa.array(["dog", None, "ape", "dog"], pa.large_string()), ["ape", "dog"], [1, -1, 0, 1]),
        (pa.array([7, None, 3, 0], pa.uint8()), None, [7, -1, 3, 0]),
        (pa.array([True, None, False, True]), None, [1, -1, 0, 1]),
        (pa.array([None] * 4, pa.string()), [], [-1] * 4),
    ],
    ids=["text", "text by number", "large text", "numbers", "booleans", "none known"],
)
def test_labels_are_numbers_or_the_names_of_classes_and_may_be_missing(
    tmp_path: pathlib.Path, labels: pa.Array, classes: list[str] | None, expected: list[int]
) -> None:
    write_parquet(tmp_path / "x.parquet", range(4), 3, label=labels)
    source = opened(tmp_path)
    assert source.labels == classes
    assert [source.read(k).label for k in range(4)] == expected


def test_two_image_columns_equal_names_and_empty_cells(tmp_path: pathlib.Path) -> None:
    images = [{"bytes": FILES[0], "path": "same.png"}, {"bytes": FILES[1], "path": "same.png"}, {"bytes": None, "path": None}, None]
    pq.write_table(pa.table({"image": images, "mask": [FILES[2], b"", None, FILES[3]]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"data.image_column: not given; columns that can hold images: image, mask"):
        opened(tmp_path)
    source = opened(tmp_path, image_column="image")
    assert [source.read(k).id for k in range(2)] == ["0:same.png", "1:same.png"]
    for row in (2, 3):
        with pytest.raises(BadImage, match="the cell is empty"):
            source.read(row)
    assert np.array_equal(opened(tmp_path, image_column="mask").read(3).pixels, PIXELS[3])


def test_a_written_index_opens_the_same_rows(photos: pathlib.Path, tmp_path: pathlib.Path) -> None:
    source = opened(photos)
    assert isinstance(source, Indexed)
    source.write_index(tmp_path / "index.arrow")
    photos.rename(tmp_path / "there")
    write_parquet(tmp_path / "there" / "d.parquet", range(5), 5)
    again = opened(tmp_path / "there", tmp_path / "index.arrow")
    assert (len(again), again.fingerprint) == (40, source.fingerprint)
    assert all(np.array_equal(again.read(k).pixels, PIXELS[k]) for k in (39, 12, 0))
    with pytest.raises(UsageError, match=r"'image_column': None.* not with .*'image_column': 'image'"):
        opened(tmp_path / "there", tmp_path / "index.arrow", image_column="image")


def test_files_that_do_not_belong_together_are_refused(photos: pathlib.Path) -> None:
    pq.write_table(pa.table({"image": [FILES[0]], "number": [1], "more": [0]}), photos / "d.parquet")
    with pytest.raises(
        ConfigError, match=r"d.parquet has columns other than those of .*a.parquet: .*note \(missing, string\), more \(int64"
    ):
        opened(photos)


def test_columns_of_one_name_are_refused(tmp_path: pathlib.Path) -> None:
    whole = table(range(3), label=[0, 1, 2])
    # Neither the image nor the label: it would be carried along by its name.
    pq.write_table(whole.append_column("number", whole["number"]), tmp_path / "0.parquet")
    with pytest.raises(ConfigError, match=r"data.source: got '.*0.parquet'; has several columns called 'number'; write it anew"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "told", ["{broken", "[]", '{"info": null}', '{"info": {"features": {"label": {"_type": "ClassLabel", "names": 3}}}}']
)
def test_what_others_write_where_datasets_writes_class_names_is_left_alone(tmp_path: pathlib.Path, told: str) -> None:
    pq.write_table(table(range(3), label=[0, 1, 2]).replace_schema_metadata({"huggingface": told}), tmp_path / "0.parquet")
    assert opened(tmp_path).labels is None


def test_cells_of_other_types_are_bad_images_and_labels_beyond_64_bits_refused(tmp_path: pathlib.Path) -> None:
    # As a path, a number would be an open file of this process.
    pq.write_table(pa.table({"image": [{"bytes": 0, "path": 1}] * 3}), tmp_path / "0.parquet")
    with pytest.raises(BadImage, match="the cell holds a int, neither bytes nor a path"):
        opened(tmp_path).read(0)
    pq.write_table(table(range(3), label=pa.array([2**63] * 3, pa.uint64())), tmp_path / "0.parquet")
    with pytest.raises(ConfigError, match=r"data.label_column: not given; image 0 has label 9223372036854775808"):
        opened(tmp_path).read(0)


def test_files_without_rows_are_refused_and_empty_row_groups_left_out(photos: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pq.write_table(pq.read_table(photos / "a.parquet").slice(0, 0), photos / "aa.parquet")
    assert len(opened(photos)) == 40
    (tmp_path / "none").mkdir()
    (photos / "aa.parquet").rename(tmp_path / "none" / "aa.parquet")
    with pytest.raises(ConfigError, match=r"data.source: .*the files have no rows"):
        opened(tmp_path / "none")


def test_a_file_that_changed_since_it_was_indexed_is_refused(photos: pathlib.Path) -> None:
    source = pickle.loads(pickle.dumps(opened(photos)))
    write_parquet(photos / "b.parquet", range(10, 21), 3, note=["other"] * 11)
    (photos / "c.parquet").unlink()
    assert source.read(3).id == "3"
    with pytest.raises(UsageError, match=r"data.source: .*b.parquet has changed since it was indexed"):
        source.read(12)
    with pytest.raises(UsageError, match=r"c.parquet has changed since it was indexed: it is gone"):
        source.read(30)
    os.utime(photos / "a.parquet", ns=(0, 1))
    with pytest.raises(UsageError, match=r"a.parquet has changed since it was indexed: it was modified at 1970-01-01"):
        source.read(5)


def test_kept_row_groups_are_bounded_and_read_once(photos: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, group: int, **arguments: object) -> pa.Table:
        reads.append(group)
        return read(self, group, **arguments)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    # Opening has looked at a few, which another process does not know.
    source = pickle.loads(pickle.dumps(opened(photos)))
    assert isinstance(source, ParquetSource)
    reads.clear()
    for k in range(40):
        source.read(k)
    assert reads == [0, 1, 2, 0, 1, 2, 3, 0]
    source = pickle.loads(pickle.dumps(source))
    monkeypatch.setattr(parquet, "KEPT", 700)
    sizes = set()
    for k in (0, 5, 12, 30, 0, 5, 12, 30, 0, 11, 12, 14, 19):
        source.read(k)
        kept = source._groups._kept
        assert len(kept) == 1 or sum(group.nbytes for group in kept.values()) <= 700
        sizes.add(len(kept))
    assert sizes >= {1, 2}


def test_row_groups_larger_than_what_is_kept_are_told(
    photos: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(photos)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(parquet, "KEPT", 100)
    opened(photos)
    assert (
        "data.source: the largest row group has 0 MiB of images, all read for one of them; write the files anew" in capsys.readouterr().err
    )


def test_threads_may_read_side_by_side(photos: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "KEPT", 1)
    source = opened(photos)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: source.read(k % 40).pixels, range(300)))
    assert all(np.array_equal(pixels, PIXELS[k % 40]) for k, pixels in enumerate(found))


def test_training_reads_each_row_group_once_an_epoch(photos: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = opened(photos)
    assert isinstance(whole, ParquetSource)
    largest = max(whole._index.table["bytes"].to_pylist())
    monkeypatch.setattr(parquet, "SHUFFLED", 2 * largest)
    train, validation = open_train_and_validation(DataConfig(source=f"{photos}/*.parquet", validation_images=4))
    blocks = blocks_of(train)
    assert blocks is not None and len(blocks.starts) == 8
    ids = {source.read(k).id for source in (train, validation) for k in range(len(source))}
    assert ids == {str(k) for k in range(40)}
    config = DataConfig(resolution=8, workers=0, flip=False)
    loader = TrainLoader(
        train, config, seed=0, batch_size=6, microbatch=None, images=72, latent_shape=(1, 1, 1), first_step=0, rank=0, world=1,
        pin_memory=False,
    )  # fmt: skip
    seen = [int(photo) for _, batches in loader for batch in batches for photo in batch.photo]
    for epoch in (seen[:36], seen[36:]):
        assert sorted(epoch) == list(range(36))
    # Windows of two row groups and more: a process that keeps as many changes between few of the eight.
    visits = np.searchsorted(blocks.starts, seen[:36], side="right").tolist()
    last = {block: place for place, block in enumerate(visits)}
    first = {block: visits.index(block) for block in last}
    assert max(sum(first[block] <= place <= last[block] for block in last) for place in range(36)) == blocks.together == 2


def test_a_broken_row_group_names_its_file(photos: pathlib.Path) -> None:
    data = bytearray((photos / "a.parquet").read_bytes())
    data[4:400] = bytes(396)
    (photos / "a.parquet").write_bytes(data)
    with pytest.raises(ConfigError, match=r"data.source: got .*a.parquet'; cannot be read as parquet"):
        opened(photos)


def test_a_column_with_a_dot_in_its_name_counts_its_bytes(tmp_path: pathlib.Path) -> None:
    pq.write_table(pa.table({"image.png": FILES[:8], "image": list(range(8))}), tmp_path / "a.parquet", row_group_size=2)
    source = opened(tmp_path, label_column="image")
    blocks = blocks_of(source)
    assert blocks is not None and blocks.together <= parquet.SHUFFLED // sum(map(len, FILES[:2]))
    assert np.array_equal(source.read(5).pixels, PIXELS[5]) and source.read(5).label == 5
