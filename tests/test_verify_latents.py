"""`verify_latents`: a whole data set passes, every kind of damage is named and mended, and rows are held against their images."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from autoencoder import verify_latents
from autoencoder.data.pixels import to_images
from autoencoder.latents import verification
from autoencoder.latents.comparing import Compared
from autoencoder.latents.peculiarities import TYPES, Measured, duplicates, far_off, rounded, rounding_error
from autoencoder.latents.plan import digest
from autoencoder.latents.reader import Latents, manifest_digest
from autoencoder.latents.statistics import Moments
from autoencoder.metrics import psnr
from autoencoder.model import decode
from autoencoder.pretrained import load
from tests.encode_children import files, photos, small_model
from tests.small_latents import encode_photos

NAMES = [f"{kind}/{k}.png" for kind in ("ape", "bee") for k in range(5)]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos`, `vae` and `latents`: 20 rows in shards of 6, 6, 6 and 2, without those of image 3; images 1 and 2 are equal."""
    folder = tmp_path_factory.mktemp("verify")
    small_model(folder / "vae")
    photos(folder / "photos", NAMES)
    shutil.copy(folder / "photos" / "ape" / "1.png", folder / "photos" / "ape" / "2.png")
    (folder / "photos" / "ape" / "3.png").write_bytes(b"no image")
    encode(folder)
    return folder


def encode(folder: Path) -> Path:
    return encode_photos(folder / "vae", folder / "photos", folder / "latents", "--mirrors", "--shard_rows=6")


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "latents", tmp_path / "latents")
    return tmp_path / "latents"


def verify(latents: Path, *extra: str) -> int:
    return verify_latents.main(["--latents", str(latents), *extra])


def forge(folder: Path, shard: int, **tensors: np.ndarray) -> None:
    """Replace tensors of a shard, with record and manifest that fit: what an encoder with a fault would leave."""
    file, record_file = (folder / f"data-{shard:05d}.{ending}" for ending in ("safetensors", "json"))
    whole = {**load_file(file), **tensors}
    save_file({name: np.ascontiguousarray(value) for name, value in whole.items()}, file)
    told = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    record, manifest = json.loads(record_file.read_text()), json.loads((folder / "manifest.json").read_text())
    record["files"][file.name] = told
    record["moments"] = Moments.of(whole["mean"], whole["logvar"]).to_json()
    record_file.write_text(json.dumps(record))
    manifest["shards"][shard].update(told)
    moments = [Moments.of(t["mean"], t["logvar"]) for t in map(load_file, sorted(folder.glob("data-*.safetensors")))]
    total = moments[0]
    for each in moments[1:]:
        total = total.merge(each)
    manifest["statistics"] = total.statistics()
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))


def flip(path: Path, place: int = -40) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def changed(folder: Path, name: str, place: tuple[int, ...], value: float, shard: int = 1) -> np.ndarray:
    values = load_file(folder / f"data-{shard:05d}.safetensors")[name].copy()
    values[place] = value
    return values


def test_a_whole_data_set_passes_and_its_figures_are_those_of_its_rows(made: Path, tmp_path: Path) -> None:
    assert verify(made / "latents", "--decode=9", f"--out={tmp_path / 'found.json'}") == 0
    told = json.loads((tmp_path / "found.json").read_text())
    assert (told["damage"], told["rows"], told["shards"]) == ([], 18, 4)
    rows = Latents(made / "latents").gather(range(18))
    assert told["statistics"]["largest_deviation"] < 1e-12
    np.testing.assert_allclose(told["statistics"]["mean"], rows.mean.astype(np.float64).mean((0, 2, 3)), rtol=1e-6)
    groups = [[row["id"] for row in group] for group in told["duplicates"]["groups"]]
    assert (told["duplicates"]["rows"], sorted(groups)) == (2, [[2, 4], [3, 5]])
    assert told["duplicates"]["groups"][0][0]["name"] == "ape/1.png"
    assert told["decoded"]["rows"] == 9
    assert told["decoded"]["distance"]["most"] < 1e-5
    assert told["decoded"]["others"] == []
    vae = load(str(made / "vae"))
    chosen = np.linspace(0, 17, 9).round().astype(int)
    expected = []
    for row, id in zip(chosen, rows.id[chosen], strict=True):
        image, view = divmod(int(id), 2)
        whole = np.asarray(Image.open(made / "photos" / NAMES[image]))
        crop = whole[4:20, 2:18][:, :: -1 if view else 1]
        pixels = torch.from_numpy(crop.copy()).permute(2, 0, 1)[None]
        with torch.inference_mode():
            expected.append(psnr(to_images(pixels), decode(vae, torch.from_numpy(rows.mean[row : row + 1]))).item())
    assert told["decoded"]["psnr_db"]["mean"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert told["decoded"]["psnr_db"]["least"] == pytest.approx(min(expected), abs=1e-3)
    assert told["decoded"]["rounding_psnr_db"]["fp16"] > told["decoded"]["rounding_psnr_db"]["bf16"] + 10


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: flip(f / "data-00001.safetensors"), "data-00001.safetensors: its bytes have changed: SHA-256"),
        (lambda f: flip(f / "data-00001.parquet"), "data-00001.parquet: its bytes have changed"),
        (lambda f: (f / "data-00001.safetensors").write_bytes(b"short"), "data-00001.safetensors: 5 bytes, the manifest says"),
        (lambda f: (f / "data-00001.safetensors").unlink(), "data-00001.safetensors: cannot be read (No such file or directory)"),
        (lambda f: (f / "data-00001.parquet").unlink(), "data-00001.parquet: cannot be read"),
        (lambda f: (f / "data-00001.json").unlink(), "data-00001.json: is missing"),
        (lambda f: (f / "data-00001.json").write_text("{"), "data-00001.json: cannot be read"),
        (
            lambda f: (f / "data-00001.json").write_text((f / "data-00001.json").read_text().replace('"rows": 4', '"rows": 5')),
            "data-00001.json: `rows` is 5, the manifest says 4",
        ),
        (
            lambda f: forge(f, 1, mean=changed(f, "mean", (2, 1, 3, 3), np.nan)),
            "00001.safetensors: mean of row 2 (id 10) is not finite",
        ),
        (lambda f: forge(f, 1, logvar=changed(f, "logvar", (0, 0, 0, 0), np.inf)), "logvar of row 0 (id 8) is not finite"),
        (lambda f: forge(f, 1, label=changed(f, "label", (1,), 2)), "row 1 has label 2, but the table has 2 classes; mend the source"),
        (lambda f: forge(f, 1, id=changed(f, "id", (1,), 12)), "data-00001.safetensors: its ids do not ascend"),
        (lambda f: forge(f, 1, id=np.array([7, 8, 9, 10])), "data-00001.parquet: its rows are not those of data-00001.safetensors"),
        (lambda f: forge(f, 1, id=np.array([8, 9, 10, 99])), "ids 8 to 99, the record says 6 to 11"),
        (lambda f: edit(f, lambda m: m["statistics"]["std"].__setitem__(1, 0.5)), "manifest.json: `statistics` are"),
        (lambda f: edit(f, lambda m: m.update(bad=[])), "manifest.json: 20 rows were planned, 18 are there and 0 are listed as unreadable"),
        (lambda f: edit(f, lambda m: m.update(rows=19)), "manifest.json: 19 rows, its shards have 18"),
        (
            lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace('"rows": 18', '"rows": 17')),
            "manifest.json: edited since it was written",
        ),
        (lambda f: flip(f / "manifest.json", 40), "manifest.json: "),
        (lambda f: flip(f / "vae" / "diffusion_pytorch_model.safetensors"), "vae/: its encoder_hash is"),
        (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no"), "vae/: cannot be opened"),
        (lambda f: shutil.rmtree(f / "vae"), "vae/: is missing"),
    ],
)
def test_damage_is_named_with_its_file_and_a_remedy(
    copy: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], said: str
) -> None:
    damage(copy)
    assert verify(copy, "--threads=1") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if said in line]
    assert "; " in line.partition(": ")[2]


def test_damaged_shards_are_mended_to_the_same_bytes(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(shutil.copytree(made, tmp_path / "whole"))
    latents, before = whole / "latents", files(made / "latents")
    flip(latents / "data-00001.safetensors")
    (latents / "data-00003.parquet").write_bytes(b"")
    assert verify(latents) == 1
    assert (latents / "manifest.json").is_file()
    assert verify(latents, "--mend") == 1
    assert "the records of 2 shards and manifest.json are deleted" in capsys.readouterr().out
    assert sorted(path.name for path in latents.glob("data-*.json")) == ["data-00000.json", "data-00002.json"]
    monkeypatch.chdir(whole)
    encode(whole)
    assert "goes on" not in capsys.readouterr().err
    after = files(latents)
    names = [name for name in before if name.startswith("data-")]
    assert {name: after[name] for name in names} == {name: before[name] for name in names}
    assert verify(latents) == 0
    assert verify(latents, "--mend") == 0
    assert (latents / "manifest.json").is_file()


def test_rows_that_are_not_of_their_images_are_named(made: Path, copy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tensors = load_file(copy / "data-00002.safetensors")
    order = [2, 1, 0, 3, 4, 5]
    forge(copy, 2, mean=tensors["mean"][order], logvar=tensors["logvar"][order])
    assert verify(copy) == 0
    assert verify(copy, "--decode=18", f"--out={tmp_path / 'found.json'}") == 1
    told = json.loads((tmp_path / "found.json").read_text())["decoded"]
    assert [row["id"] for row in told["others"]] == [12, 14]
    assert all(row["distance"] > 1 for row in told["others"])
    assert "data-00002.safetensors: row of id 12 is not the latent of bee/1.png" in capsys.readouterr().err
    forge(copy, 2, mean=tensors["mean"], logvar=tensors["logvar"], label=np.zeros(6, np.int64))
    assert verify(copy, "--decode=18") == 1
    assert "row of id 12 has label 0, bee/1.png has 1" in capsys.readouterr().err


def test_images_that_moved_are_given_and_others_are_refused(
    made: Path, copy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    photos_there = shutil.copytree(made / "photos", tmp_path / "moved")
    plan = json.loads((copy / "plan.json").read_text())
    del plan["sha256"]
    plan["segments"][0]["source"]["name"] = "/no/such/folder"
    (copy / "plan.json").write_text(json.dumps({**plan, "sha256": digest(plan)}))
    edit(copy, lambda m: m["segments"][0]["source"].update(name="/no/such/folder"))
    assert verify(copy, "--decode=4") == 2
    assert "the images (/no/such/folder) are not where they were" in capsys.readouterr().err
    assert verify(copy, "--decode=4", f"--data.source={photos_there}") == 0
    (photos_there / "bee" / "4.png").unlink()
    assert verify(copy, "--decode=4", f"--data.source={photos_there}") == 2
    assert "other images than those of the latents" in capsys.readouterr().err
    assert verify(copy, f"--data.source={photos_there}") == 2
    assert "give decode, the number of rows to compare, with it" in capsys.readouterr().err


def test_a_wrong_source_is_refused_before_a_shard_is_read(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path / "others", NAMES[:3], seed=5)
    monkeypatch.setattr(verification, "look", lambda *_: pytest.fail("a shard was read"))
    assert verify(made / "latents", "--decode=2", f"--data.source={tmp_path / 'others'}") == 2
    assert "other images than those of the latents" in capsys.readouterr().err


def test_images_of_a_split_are_found_again(made: Path, tmp_path: Path) -> None:
    photos(tmp_path / "photos" / "train", NAMES[:2])
    photos(tmp_path / "photos" / "validation", NAMES)
    encode_photos(made / "vae", tmp_path / "photos", tmp_path / "latents", "--data.split=validation")
    assert verify(tmp_path / "latents", "--decode=3") == 0


def test_a_folder_that_is_not_finished_is_a_wrong_argument(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(tmp_path / "no") == 2
    (copy / "manifest.json").unlink()
    assert verify(copy) == 2
    assert "not finished" in capsys.readouterr().err


def test_rows_of_an_appended_segment_are_compared_with_its_images(made: Path, tmp_path: Path) -> None:
    grown = shutil.copytree(made / "photos", tmp_path / "grown")
    encode_photos(made / "vae", grown, tmp_path / "latents")
    photos(grown, ["ape/0a.png", "cat/1.png", "bee/9.png"], seed=7)
    encode_photos(made / "vae", grown, tmp_path / "latents", "--append")
    out = tmp_path / "found.json"
    rows = len(Latents(tmp_path / "latents"))
    assert verify(tmp_path / "latents", f"--decode={rows}", f"--out={out}") == 0
    assert json.loads(out.read_text())["decoded"]["rows"] == rows
    photos(tmp_path / "others", NAMES[:3], seed=5)
    assert verify(tmp_path / "latents", "--decode=2", f"--data.source={tmp_path / 'others'}") == 2, "nothing is of what was asked for"


# What rows are like


@pytest.mark.parametrize("type", ["fp16", "bf16"])
def test_the_expected_rounding_error_is_the_measured_one(type: str) -> None:
    values = (np.random.default_rng(0).standard_normal(200_000) * 3).astype(np.float32)
    measured = np.sqrt(np.square(rounded(values, type).astype(np.float64) - values).mean())
    assert np.sqrt(np.square(rounding_error(values, type)).mean()) == pytest.approx(measured, rel=0.01)


def test_bf16_rounds_as_torch_does_and_spacings_are_numpys() -> None:
    values = np.concatenate([np.random.default_rng(1).standard_normal(10_000) * 10.0**k for k in range(-6, 5)]).astype(np.float32)
    np.testing.assert_array_equal(rounded(values, "bf16"), torch.from_numpy(values).to(torch.bfloat16).float().numpy())
    np.testing.assert_allclose(rounding_error(values, "fp32") * np.sqrt(12), np.spacing(np.abs(values)), rtol=1e-12)
    halves = rounded(values, "fp16").astype(np.float16)
    assert (halves == 0).any()
    np.testing.assert_allclose(rounding_error(halves, "fp16") * np.sqrt(12), np.spacing(np.abs(halves)), rtol=1e-3)
    assert list(TYPES) == ["fp32", "fp16", "bf16"]


def test_rows_far_off_are_those_beyond_six_deviations_of_a_normal() -> None:
    values = np.random.default_rng(0).standard_normal(10_001).astype(np.float32)
    values[17], values[5] = 9, -7
    distance = far_off(values)
    assert np.flatnonzero(distance).tolist() == [5, 17]
    assert distance[17] == pytest.approx(9, rel=0.05)
    assert not far_off(np.ones(10)).any()
    assert not far_off(np.empty(0)).any()


def test_equal_rows_are_grouped_largest_group_first() -> None:
    rng = np.random.default_rng(0)
    mean = rng.standard_normal((9, 2, 3, 3)).astype(np.float32)
    mean[[4, 8]], mean[[2, 5, 7]] = mean[0], mean[1]
    logvar = np.zeros_like(mean)
    statistics = {"mean": [0.0, 0.0], "std": [1.0, 2.0]}
    measured = Measured.of(mean, logvar, statistics)
    assert duplicates(measured.digest) == (5, [[1, 2, 5, 7], [0, 4, 8]])
    logvar[8, 0, 0, 0] = 1e-3
    assert duplicates(Measured.of(mean, logvar, statistics).digest) == (4, [[1, 2, 5, 7], [0, 4]])
    np.testing.assert_allclose(measured.norm, np.sqrt(np.square(mean / np.array([1.0, 2.0])[:, None, None]).mean((1, 2, 3))), rtol=1e-5)
    np.testing.assert_allclose(measured.kl, 0.5 * np.square(mean).mean((1, 2, 3)), rtol=1e-5)
    assert duplicates(np.empty(0, np.uint64)) == (0, [])


def test_a_row_that_decodes_far_worse_than_the_others_is_named() -> None:
    psnr_db = np.random.default_rng(0).normal(30, 0.5, 100)
    psnr_db[7] = 20
    others = {"distance": np.zeros(100), "label": np.zeros(100), "source_label": np.zeros(100), "id": np.arange(100)}
    compared = Compared(name=[""] * 100, psnr=psnr_db, rounding={}, unreadable=[], **others)
    assert compared.low == [7]
    assert compared.others == []


def test_killed_while_mending_the_damage_is_still_found(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in (1, 2):
        flip(copy / f"data-0000{shard}.safetensors")
    removed, unlink = list[str](), Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(path.name)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    assert verify(copy, "--mend") == 130
    monkeypatch.undo()
    assert verify(copy) == 1, "not `not finished`, after which the next run believes what is left"


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{}"), lambda path: path.write_text(path.read_text()[:-9])])
def test_without_its_plan_nothing_is_mended(copy: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]) -> None:
    damage(copy / "plan.json")
    assert verify(copy, "--decode=2") == 1
    assert "plan.json: cannot be read" in capsys.readouterr().err
    flip(copy / "data-00001.safetensors")
    assert verify(copy, "--mend") == 2
    assert "put it back first" in capsys.readouterr().err
    assert len(Latents(copy)) == 18


def test_a_report_goes_into_a_file_not_a_folder(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(copy, f"--out={tmp_path}") == 2
    assert "a folder; give the name of a JSON file" in capsys.readouterr().err


@pytest.mark.filterwarnings("error")
def test_a_shard_without_a_row_is_whole_and_forged_moments_are_damage(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path / "photos", NAMES[:4])
    (tmp_path / "photos" / NAMES[3]).write_bytes(b"no image")
    latents = encode_photos(made / "vae", tmp_path / "photos", tmp_path / "latents", "--shard_rows=3")
    assert verify(latents, "--decode=2") == 0
    file = latents / "data-00001.json"
    record = json.loads(file.read_text())
    assert record["rows"] == 0
    file.write_text(json.dumps(record | {"moments": record["moments"] | {"count": 64}}))
    assert verify(latents) == 1
    assert "data-00001.json: its moments are not those of the rows" in capsys.readouterr().err
