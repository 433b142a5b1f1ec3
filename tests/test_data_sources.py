"""Sources: what they hold, their labels, splits and fingerprints."""

import io
import os
import pathlib
import pickle
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from autoencoder.config import DataConfig
from autoencoder.data.sources import BadImage, Indexed, Source, WithColumns, open_source, open_train_and_validation
from autoencoder.runtime.errors import ConfigError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 6, 5, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def fill(root: pathlib.Path, *names: str) -> None:
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(PIXELS[k]))


def labels_by_id(source: Source) -> dict[str, int]:
    return {record.id: record.label for record in map(source.read, range(len(source)))}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def test_a_plain_folder(tmp_path: pathlib.Path) -> None:
    fill(tmp_path, "a.png", "b.png", "sub/c.png")
    source = open_source(str(tmp_path), split="train", config=DataConfig())
    assert labels_by_id(source) == {"a.png": -1, "b.png": -1, "sub/c.png": -1}
    assert source.labels is None
    assert all(np.array_equal(source.read(k).pixels, PIXELS[k]) for k in range(3))


def test_class_folders(tmp_path: pathlib.Path) -> None:
    fill(tmp_path, "cat/2.png", "cat/x/1.png", "ape/1.png", "train/1.png")
    source = open_source(str(tmp_path), split="train", config=DataConfig())
    assert source.labels == ["ape", "cat", "train"]
    assert labels_by_id(source) == {"ape/1.png": 0, "cat/2.png": 1, "cat/x/1.png": 1, "train/1.png": 2}


def test_split_folders_share_their_classes(tmp_path: pathlib.Path) -> None:
    fill(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/a/2.png", "val/c/2.png")
    train, validation = open_train_and_validation(DataConfig(source=str(tmp_path)))
    assert labels_by_id(train) == {"a/1.png": 0, "b/1.png": 1, "c/1.png": 2}
    assert labels_by_id(validation) == {"a/2.png": 0, "c/2.png": 2}
    assert train.labels == validation.labels == ["a", "b", "c"]


def test_an_unknown_split_is_refused_with_those_there_are(tmp_path: pathlib.Path) -> None:
    fill(tmp_path, "train/1.png", "test/1.png")
    with pytest.raises(ConfigError, match=r"data.split: got 'val'; .* has test and train"):
        open_source(str(tmp_path), split="val", config=DataConfig())
    with pytest.raises(ConfigError, match=r"data.split: got 'test'; .* has train"):
        open_source(str(tmp_path / "train"), split="test", config=DataConfig())


def test_bad_files_are_named_with_the_reason(tmp_path: pathlib.Path) -> None:
    fill(tmp_path, "good.png")
    (tmp_path / "bad.png").write_text("not an image")
    source = open_source(str(tmp_path), split="train", config=DataConfig())
    with pytest.raises(BadImage) as caught:
        source.read(0)
    assert (caught.value.id, caught.value.reason) == ("bad.png", "not an image of a known format")
    assert np.array_equal(source.read(1).pixels, PIXELS[0])


def test_the_fingerprint_follows_the_files_and_not_their_place(tmp_path: pathlib.Path) -> None:
    def fingerprint(root: pathlib.Path) -> str:
        return open_source(str(root), split="train", config=DataConfig()).fingerprint

    for folder in ("here", "there"):
        fill(tmp_path / folder, "a.png", "b.png")
    original = fingerprint(tmp_path / "here")
    assert original == fingerprint(tmp_path / "there")
    with open(tmp_path / "here/a.png", "ab") as file:
        file.write(b"\0")
    changed = fingerprint(tmp_path / "here")
    os.rename(tmp_path / "there/a.png", tmp_path / "there/c.png")
    assert len({original, changed, fingerprint(tmp_path / "there")}) == 3


def test_parquet_with_an_image_column_and_class_names(tmp_path: pathlib.Path) -> None:
    features = datasets.Features(
        {"photo": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"]), "note": datasets.Value("string")}
    )
    for part in range(2):
        cells = [{"bytes": png(PIXELS[2 * part + k]), "path": f"{k}.png" if k else None} for k in range(2)]
        rows = {"photo": cells, "label": [1, 0], "note": ["", ""]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{part}.parquet")
    source = open_source(f"{tmp_path}/*.parquet", split="train", config=DataConfig())
    assert source.labels == ["no", "yes"]
    assert labels_by_id(source) == {"0": 1, "1:1.png": 0, "2": 1, "3:1.png": 0}
    assert all(np.array_equal(source.read(k).pixels, PIXELS[k]) for k in range(4))
    assert np.array_equal(pickle.loads(pickle.dumps(source)).read(3).pixels, PIXELS[3])


def test_parquet_of_bare_bytes_with_string_labels_and_gaps(tmp_path: pathlib.Path) -> None:
    rows = {
        "data": [png(PIXELS[0]), None, b"?", png(PIXELS[1])],
        "mask": [b"", b"", b"", b""],
        "kind": ["dog", "ape", "ape", None],
        "size": [0.5] * 4,
    }
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "x.parquet")
    name = str(tmp_path / "x.parquet")
    source = open_source(name, split="train", config=DataConfig(image_column="data", label_column="kind"))
    assert source.labels == ["ape", "dog"]
    assert [(source.read(k).label, source.read(k).id) for k in (0, 3)] == [(1, "0"), (-1, "3")]
    for row, reason in ((1, "the cell is empty"), (2, "known format")):
        with pytest.raises(BadImage, match=reason):
            source.read(row)
    for column in (None, "photo", "size"):
        given = "not given" if column is None else f"got {column!r}"
        with pytest.raises(ConfigError, match=f"data.image_column: {given}; columns that can hold images: data, mask"):
            open_source(name, split="train", config=DataConfig(image_column=column))
    with pytest.raises(ConfigError, match=r"data.label_column: got 'size'; columns that can hold labels: kind"):
        open_source(name, split="train", config=DataConfig(image_column="data", label_column="size"))


def test_webdataset(tmp_path: pathlib.Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for k in range(3):
                for extension, data in (("png", png(PIXELS[3 * shard + k])), ("cls", str(k).encode())):
                    member = tarfile.TarInfo(f"{shard}{k}.{extension}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    source = open_source(f"{tmp_path}/*.tar", split="train", config=DataConfig())
    assert [source.read(k).label for k in range(6)] == [0, 1, 2, 0, 1, 2]
    assert source.read(4).id == "4:11.png"
    assert all(np.array_equal(source.read(k).pixels, PIXELS[k]) for k in range(6))


def test_broken_tables_are_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.parquet").write_text("PAR1")
    with pytest.raises(ConfigError, match=r"data.source: .*cannot be read as parquet"):
        open_source(str(tmp_path / "x.parquet"), split="train", config=DataConfig())


def test_hub_names_go_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, split: str) -> datasets.Dataset:
        assert name == "owner/photos"
        pixels = {"train": PIXELS[:20], "test": PIXELS[20:]}[split]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64"), "note": datasets.Value("string")})
        images = [{"bytes": png(p), "path": None} for p in pixels]
        rows = {"image": images, "label": [7] * 20, "note": [f"n{k}" for k in range(20)]}
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "test"])
    train, validation = open_train_and_validation(DataConfig(source="owner/photos", validation_images=20))
    assert np.array_equal(train.read(3).pixels, PIXELS[3])
    assert np.array_equal(validation.read(3).pixels, PIXELS[23])
    assert train.read(0).label == 7
    whole = open_source("owner/photos", split="train", config=DataConfig())
    assert isinstance(whole, WithColumns) and not isinstance(whole, Indexed)
    assert whole.others(None, "data.columns") == ["note"]
    assert whole.columns(np.array([5, 0, 5]), ["note", "label"]).to_pydict() == {"note": ["n5", "n0", "n5"], "label": [7, 7, 7]}
    with pytest.raises(ConfigError, match=r"data.columns: got 'size'; the table has image, label, note"):
        whole.others(["size"], "data.columns")
    with pytest.raises(ConfigError, match=r"data.split: got 'dev'; owner/photos has train and test"):
        open_source("owner/photos", split="dev", config=DataConfig())


def test_a_hub_that_cannot_be_reached_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> list[str]:
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    with pytest.raises(ConfigError, match=r"data.source: got 'owner/photos'; .*ConnectionError: Couldn't reach it; check the name"):
        open_train_and_validation(DataConfig(source="owner/photos"))


def test_the_demo_holds_out_three_photos_with_coffee_among_them() -> None:
    train, validation = open_train_and_validation(DataConfig())
    assert set(labels_by_id(validation)) == {"chelsea", "coffee", "rocket"}
    assert len(labels_by_id(train)) == 6
    for source in (train, validation):
        assert source.labels == sorted(labels_by_id(source))
        assert labels_by_id(source) == {name: label for label, name in enumerate(source.labels)}
    assert validation.read(1).pixels.shape == (400, 600, 3)
    assert open_source("demo", split="train", config=DataConfig(channels=1)).read(0).pixels.shape == (512, 512, 1)


@pytest.mark.parametrize(("images", "wanted", "held_out"), [(40, 3, 3), (40, 64, 4), (5, 64, 1)])
def test_images_are_held_out_where_there_is_no_validation_split(images: int, wanted: int, held_out: int, tmp_path: pathlib.Path) -> None:
    fill(tmp_path, *(f"{k:02d}.png" for k in range(images)))
    config = DataConfig(source=str(tmp_path), validation_images=wanted)
    train, validation = open_train_and_validation(config)
    assert len(validation) == held_out
    assert sorted([*labels_by_id(train), *labels_by_id(validation)]) == [f"{k:02d}.png" for k in range(images)]
    assert labels_by_id(open_train_and_validation(config)[1]) == labels_by_id(validation)
    assert train.fingerprint != validation.fingerprint


def test_a_single_image_cannot_be_split(tmp_path: pathlib.Path) -> None:
    fill(tmp_path, "a.png")
    with pytest.raises(ConfigError, match=r"data.validation_source"):
        open_train_and_validation(DataConfig(source=str(tmp_path)))


def test_a_validation_source_is_used_up_to_the_wanted_number(tmp_path: pathlib.Path) -> None:
    fill(tmp_path / "more", *(f"{k:02d}.png" for k in range(30)))
    config = DataConfig(source="demo", validation_source=str(tmp_path / "more"), validation_images=8)
    train, validation = open_train_and_validation(config)
    assert (len(train), len(validation)) == (6, 8)
    with pytest.raises(ConfigError, match=r"data.validation_source: got 'nowhere'"):
        open_train_and_validation(DataConfig(validation_source="nowhere"))
