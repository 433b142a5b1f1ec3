"""`encode_dataset` with crops of several sizes: aspect-ratio buckets and several resolutions."""

import functools
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from autoencoder import encode, export_latents, reconstruct, verify_latents
from autoencoder.config import DataConfig
from autoencoder.data import sizes
from autoencoder.data.transforms import train_crop
from autoencoder.latents.reader import Latents
from autoencoder.pretrained import load
from autoencoder.runtime.errors import ConfigError
from autoencoder.runtime.rng import generator
from diffusion import space
from tests.encode_children import files, finish, small_model, start

AUTO = ("--data.buckets=auto", "--data.resolution=32", "--data.bucket_step=8")
BUCKETS = [(40, 24), (32, 32), (24, 40)]
"""Those of 32 pixels, (height, width), the narrowest first."""
SIZES = {
    "a": (60, 36),
    "b": (31, 33),
    "c": (20, 30),
    "d": (48, 80),
    "e": (90, 50),
    "f": (10, 90),
    "g": (64, 64),
    "h": (50, 30),
    "i": (40, 40),
}
EXPECTED = {"a": 0, "b": 1, "c": 2, "d": 2, "e": 0, "f": 2, "g": 1, "h": 0, "i": 1, "j": 2, "k": 0}
"""The bucket of each image. `j` is 36 pixels wide and 60 high until EXIF turns it, `k` is no image."""


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth noise, so that resampling does not make one grey of it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of many shapes, a model, and what one process makes of them in buckets."""
    folder = tmp_path_factory.mktemp("buckets")
    small_model(folder / "vae")
    (folder / "photos").mkdir()
    for seed, (name, size) in enumerate(SIZES.items()):
        Image.fromarray(picture(*size, seed)).save(folder / "photos" / f"{name}.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(picture(60, 36, 99)).save(folder / "photos" / "j.png", exif=exif)
    (folder / "photos" / "k.png").write_bytes(b"no image")
    assert encode.main(arguments(folder, folder / "whole", *AUTO)) == 0
    return folder


def arguments(setting: Path, out: Path, *more: str) -> list[str]:
    given = [f"--model={setting / 'vae'}", f"--data.source={setting / 'photos'}", "--data.workers=0", "--precision=fp32"]
    return [*given, "--shard_rows=2", "--batch_size=2", f"--out={out}", *more]


def pixels(setting: Path, name: str) -> np.ndarray:
    with Image.open(setting / "photos" / f"{name}.png") as image:
        values = np.asarray(image.convert("RGB"))
    # EXIF's 6: the first row is the right side, the first column the top.
    return np.rot90(values, -1) if name == "j" else values


def central(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The whole image scaled to cover `size`, and then cut: what a crop is by definition."""
    scale = max(size[0] / values.shape[0], size[1] / values.shape[1])
    height, width = (max(side, round(length * scale)) for side, length in zip(size, values.shape[:2], strict=True))
    whole = np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.LANCZOS))
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return whole[top : top + size[0], left : left + size[1]]


_load = functools.cache(load)


@torch.no_grad()
def stock(setting: Path, crop: np.ndarray) -> np.ndarray:
    """The posterior's mean by diffusers' own `encode`."""
    image = torch.tensor(np.ascontiguousarray(crop)).permute(2, 0, 1)[None] / 127.5 - 1
    mean: np.ndarray = _load(str(setting / "vae")).encode(image).latent_dist.mean[0].numpy()
    return mean


def rows_of(folder: Path) -> dict[tuple[str, int], np.ndarray]:
    """Each stored mean by its image's name and view."""
    found = {}
    for path in sorted(folder.glob("data-*.safetensors")):
        table = pyarrow.parquet.read_table(path.with_suffix(".parquet")).to_pydict()
        tensors = load_file(path)
        assert table["row"] == tensors["id"].tolist()
        found |= {(Path(name).stem, view): mean for name, view, mean in zip(table["name"], table["view"], tensors["mean"], strict=True)}
    return found


def test_rows_are_the_posteriors_of_crops_that_cover_their_buckets(setting: Path) -> None:
    rows = rows_of(setting / "whole")
    assert sorted(rows) == [(name, 0) for name in sorted(EXPECTED) if name != "k"]
    for (name, _), mean in rows.items():
        size = BUCKETS[EXPECTED[name]]
        assert mean.shape == (4, size[0] // 2, size[1] // 2)
        # Lanczos of a part of the image and of the whole may round to neighbouring levels.
        np.testing.assert_allclose(mean, stock(setting, central(pixels(setting, name), size)), atol=0.01)


def test_plan_manifest_and_files_tell_of_the_buckets(setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, manifest = (json.loads((setting / "whole" / name).read_text()) for name in ("plan.json", "manifest.json"))
    assert plan["segments"][0]["buckets"]["images"] == [[4, 3, 4]] and plan["recipe"]["sizes"] == [[list(size) for size in BUCKETS]]
    assert manifest["segments"] == plan["segments"]
    assert np.load(setting / "whole" / "buckets-00000.npy").tolist() == [[EXPECTED[name] for name in sorted(EXPECTED)]]
    assert manifest["shapes"] == [[4, 20, 12], [4, 16, 16], [4, 12, 20]]
    shapes = [entry["shape"] for entry in manifest["shards"]]
    assert shapes == [shape for shape in manifest["shapes"] for _ in range(2)]
    assert [(bad["image"], bad["rows"]) for bad in manifest["bad"]] == [(10, [10, 10])]
    argv = arguments(setting, tmp_path / "other", *AUTO, "--preflight", "--batch_size=4")
    assert encode.main(argv) == 0
    said = capsys.readouterr()
    assert "24x40: 4   32x32: 3   40x24: 4\n" in said.out
    assert "1 of 3 sizes have fewer rows than a batch of 4 (32x32)" in said.err


def test_statistics_are_those_of_a_float64_pass_over_all_shapes(setting: Path) -> None:
    latents = Latents(setting / "whole")
    values: list[list[np.ndarray]] = [[], []]
    for shape in latents.shapes:
        read = latents.of_shape(shape).gather(range(len(latents.of_shape(shape))))
        assert read.logvar is not None
        for held, moments in zip(values, (read.mean, read.logvar), strict=True):
            held.append(moments.astype(np.float64).transpose(1, 0, 2, 3).reshape(4, -1))
    mean, logvar = (np.concatenate(held, axis=1) for held in values)
    np.testing.assert_allclose(latents.mean, mean.mean(1), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(latents.std, np.sqrt(mean.var(1) + np.exp(logvar).mean(1)), rtol=1e-6)
    assert latents.manifest["statistics"]["values"] == mean.shape[1]


def test_two_workers_write_the_bytes_of_one_and_look_at_no_header_again(
    setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = files(setting / "whole")
    workers = [start(arguments(setting, tmp_path / "two", *AUTO, f"--worker={k}", "--workers=2")) for k in range(2)]
    assert [finish(worker) for worker in workers] == [0, 0]
    assert files(tmp_path / "two") == expected
    argv = arguments(setting, tmp_path / "planned", *AUTO)
    assert encode.main([*argv, "--only=plan"]) == 0
    monkeypatch.setattr(sizes, "upright_size", None)
    assert encode.main([*argv, "--only=encode"]) == 0
    assert encode.main([*argv, "--only=finalize"]) == 0
    assert files(tmp_path / "planned") == expected


def test_killed_on_the_way_the_files_are_an_unbroken_runs(setting: Path, tmp_path: Path) -> None:
    expected = files(setting / "whole")
    # After listing and index: buckets, plan, model, and a table of the first shard.
    for rename in (2, 3, 4, 6):
        out = tmp_path / str(rename)
        assert finish(start(arguments(setting, out, *AUTO), kill_at=rename)) == -signal.SIGKILL
        assert finish(start(arguments(setting, out, *AUTO))) == 0
        assert files(out) == expected


def test_appended_images_have_buckets_of_their_own(setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(setting / "photos", tmp_path / "photos")
    shutil.copytree(setting / "whole", tmp_path / "out")
    Image.fromarray(picture(30, 60, 7)).save(tmp_path / "photos" / "bb.png")
    Image.fromarray(picture(30, 30, 8)).save(tmp_path / "photos" / "z.png")
    argv = [*arguments(setting, tmp_path / "out", *AUTO), f"--data.source={tmp_path / 'photos'}", "--append"]
    before = rows_of(tmp_path / "out")
    assert encode.main(argv) == 0
    rows, manifest = rows_of(tmp_path / "out"), Latents(tmp_path / "out").manifest
    assert np.load(tmp_path / "out" / "buckets-00001.npy").tolist() == [[2, 1]]
    assert manifest["segments"][1]["buckets"]["images"] == [[0, 1, 1]]
    assert all(np.array_equal(rows[key], mean) for key, mean in before.items())
    assert rows["bb", 0].shape == (4, 12, 20) and rows["z", 0].shape == (4, 16, 16)
    np.testing.assert_allclose(rows["bb", 0], stock(setting, central(picture(30, 60, 7), (24, 40))), atol=0.01)
    assert encode.main(argv) == 0
    assert "nothing to append" in capsys.readouterr().out


def test_buckets_that_were_edited_or_lost_are_named(setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(setting / "whole", tmp_path / "out")
    file = tmp_path / "out" / "buckets-00000.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert encode.main(arguments(setting, tmp_path / "out", *AUTO)) == 2
    assert "its buckets-00000.npy has been edited (its sha256 is not the plan's); put it back" in capsys.readouterr().err
    file.unlink()
    assert encode.main(arguments(setting, tmp_path / "out", *AUTO)) == 2
    assert "its buckets-00000.npy cannot be read (No such file or directory); put it back" in capsys.readouterr().err


def test_other_buckets_are_another_recipe(setting: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = ("--data.buckets=24x40,32x32,40x24",)
    assert encode.main(arguments(setting, setting / "whole", *changed)) == 2
    assert "data.buckets: 'auto' -> ['24x40', '32x32', '40x24']" in capsys.readouterr().err
    assert encode.main(arguments(setting, setting / "whole", "--data.resolution=32")) == 2
    assert "data.buckets: 'auto' -> None" in capsys.readouterr().err


def test_an_image_has_rows_of_every_resolution_crop_and_mirror_in_this_order(setting: Path, tmp_path: Path) -> None:
    more = ("--data.resolutions=32,16", "--data.crop=random", "--data.crops=2", "--mirrors", "--data.zoom=[1.0, 1.5]", "--seed=5")
    assert encode.main(arguments(setting, tmp_path, *more)) == 0
    rows, config = rows_of(tmp_path), DataConfig(resolution=32, zoom=(1.0, 1.5), flip=False)
    manifest = Latents(tmp_path).manifest
    assert (manifest["rows"], manifest["rows_per_image"], manifest["shapes"]) == (80, 8, [[4, 16, 16], [4, 8, 8]])
    assert "buckets" not in manifest["segments"][0] and not list(tmp_path.glob("buckets-*"))
    assert [bad["rows"] for bad in manifest["bad"]] == [[80, 81], [82, 83], [84, 85], [86, 87]]
    for image, name in enumerate(sorted(EXPECTED)[:4]):
        for view in range(8):
            side = (32, 16)[view // 4]
            position = (8 * image + view) // 2
            crop, _ = train_crop(pixels(setting, name), config, generator(5, "crop", position), size=(side, side))
            assert crop.shape == (side, side, 3)
            mirrored = crop[:, ::-1] if view % 2 else crop
            np.testing.assert_allclose(rows[name, view], stock(setting, mirrored), atol=2e-6)
    assert len({mean.tobytes() for mean in rows.values()}) == 80


def test_listed_buckets_for_pictures_of_each(setting: Path, tmp_path: Path) -> None:
    assert encode.main(arguments(setting, tmp_path, "--data.buckets=[48x16, 16x16]")) == 0
    latents = Latents(tmp_path)
    assert latents.shapes == [(4, 8, 24), (4, 8, 8)]
    by_ratio = {name: "48x16" if np.log(w / h) > np.log(3) / 2 else "16x16" for name, (h, w) in SIZES.items()}
    shapes = {name: mean.shape for (name, _), mean in rows_of(tmp_path).items()}
    assert all(shapes[name] == {"48x16": (4, 8, 24), "16x16": (4, 8, 8)}[bucket] for name, bucket in by_ratio.items())


def test_what_reads_latents_takes_several_shapes(setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latents = str(setting / "whole")
    assert verify_latents.main(["--latents", latents, "--decode=10", "--out", str(tmp_path / "F.json")]) == 0
    found = json.loads((tmp_path / "F.json").read_text())
    assert found["damage"] == [] and found["decoded"]["rows"] + len(found["decoded"]["unreadable"]) == 10
    assert found["decoded"]["distance"]["most"] < 1e-5
    assert reconstruct.main(["--latents", latents, "--out", str(tmp_path / "pictures")]) == 0
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {*(f"{k:08d}.png" for k in range(10)), *(f"grid-{w}x{h}.png" for h, w in BUCKETS)}
    for name, bucket in EXPECTED.items():
        if name != "k":
            with Image.open(tmp_path / "pictures" / f"{ord(name) - ord('a'):08d}.png") as image:
                assert (image.height, image.width) == BUCKETS[bucket]
    assert export_latents.main(["--latents", latents, "--out", str(tmp_path / "export")]) == 0
    for entry in Latents(latents).manifest["shards"]:
        schema = pyarrow.parquet.read_schema(tmp_path / "export" / Path(entry["file"]).with_suffix(".parquet").name)
        assert json.loads(schema.metadata[b"latents"])["shape"] == entry["shape"]


def test_a_diffusion_model_takes_the_square_latents_of_one_side(setting: Path) -> None:
    latents = Latents(setting / "whole")
    with pytest.raises(ConfigError, match=r"give data\.side, or encode to one"):
        space.of_latents(latents, conditional=False)
    square = space.of_side(latents, 16)
    assert (square.shape, len(square)) == ((4, 16, 16), 3)
    assert space.of_latents(square, conditional=False).shape == (4, 16, 16)
    assert space.of_side(latents, None) is latents
    with pytest.raises(ConfigError, match=r"data.side: got 12; .* has latents of \(4, 20, 12\)"):
        space.of_side(latents, 12)
