"""What `encode_dataset` writes: rows, labels, columns, statistics; held against stock diffusers and NumPy."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch import Tensor

from autoencoder import encode
from autoencoder.config import DataConfig
from autoencoder.data.transforms import train_crop
from autoencoder.identity import decoder_hash, encoder_hash
from autoencoder.latents.reader import Latents
from autoencoder.model import AutoencoderKL
from autoencoder.posterior import DiagonalGaussian
from autoencoder.pretrained import load
from autoencoder.runtime.rng import generator
from tests.encode_children import SIDE, files, photos, small_model

NAMES = ["ape/1.png", "ape/2.png", "bee/1.png", "bee/2.png", "bee/3.png"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AutoencoderKL, list[np.ndarray]]:
    folder = tmp_path_factory.mktemp("encode")
    return folder, small_model(folder / "vae"), photos(folder / "photos", NAMES)


Made = tuple[Path, AutoencoderKL, list[np.ndarray]]


def run(made: Made, out: Path, *more: str, source: str | None = None) -> Latents:
    assert encode.main(arguments(made, out, *more, source=source)) == 0
    return Latents(out)


def arguments(made: Made, out: Path, *more: str, source: str | None = None) -> list[str]:
    model, data = made[0] / "vae", source or made[0] / "photos"
    # Later ones override earlier ones.
    return [f"--model={model}", f"--data.source={data}", "--data.workers=0", "--precision=fp32", "--batch_size=2", f"--out={out}", *more]


@torch.no_grad()
def stock(vae: AutoencoderKL, crops: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Moments of crops (S, S, 3) uint8 by diffusers' own `encode`."""
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2) / 127.5 - 1
    posterior = vae.encode(images).latent_dist
    return posterior.mean.numpy(), posterior.logvar.numpy()


def center(pixels: np.ndarray) -> np.ndarray:
    return pixels[4:20, 2:18]


def close(found: np.ndarray | None, wanted: np.ndarray, atol: float = 2e-6) -> None:
    assert found is not None
    np.testing.assert_allclose(found, wanted, atol=atol, rtol=0)


def test_rows_are_the_posteriors_of_central_crops(made: Made, tmp_path: Path) -> None:
    folder, vae, pixels = made
    latents = run(made, tmp_path / "out", "--shard_rows=3")
    rows = latents.gather(range(5))
    mean, logvar = stock(vae, [center(p) for p in pixels])
    close(rows.mean, mean)
    close(rows.logvar, logvar)
    assert rows.id.tolist() == [0, 1, 2, 3, 4]
    assert rows.label.tolist() == [0, 0, 1, 1, 1]
    assert (latents.labels, latents.shape, latents.rows_per_image) == (["ape", "bee"], (4, 8, 8), 1)
    side = pyarrow.parquet.read_table(tmp_path / "out" / "data-00001.parquet").to_pydict()
    assert side == {"row": [3, 4], "image": [3, 4], "view": [0, 0], "name": ["bee/2.png", "bee/3.png"]}
    manifest = latents.manifest
    pixel_recipe = {"range": [-1.0, 1.0], "levels": 256, "channels": 3}
    assert (manifest["encoder_hash"], manifest["decoder_hash"]) == (encoder_hash(vae, pixel_recipe), decoder_hash(vae))
    kept = load(str(tmp_path / "out" / "vae"))
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in kept.state_dict().items())
    assert (tmp_path / "out" / "vae" / "likelihood.safetensors").read_bytes() == (folder / "vae" / "likelihood.safetensors").read_bytes()
    assert len({file.stat().st_mode for file in (tmp_path / "out").rglob("*.safetensors")}) == 1
    assert str(tmp_path.parent) not in (tmp_path / "out" / "vae" / "config.json").read_text()


def test_random_crops_follow_each_other_and_are_functions_of_seed_and_row(made: Made, tmp_path: Path) -> None:
    _, vae, pixels = made
    random = ("--data.crop=random", "--data.crops=3", "--data.zoom=[0.8, 1.0]", "--seed=7")
    latents = run(made, tmp_path / "out", *random)
    config = DataConfig(resolution=SIDE, zoom=(0.8, 1.0), flip=False)
    crops = [train_crop(pixels[row // 3], config, generator(7, "crop", row))[0] for row in range(15)]
    rows = latents.gather(range(15))
    close(rows.mean, stock(vae, crops)[0])
    assert rows.label.tolist() == [0] * 6 + [1] * 9
    assert latents.rows_per_image == 3
    assert len({row.tobytes() for row in rows.mean}) == 15


@pytest.mark.parametrize("random", [(), ("--data.crop=random", "--data.crops=2")])
def test_mirrors_are_encoded_mirror_images_after_their_originals(made: Made, tmp_path: Path, random: tuple[str, ...]) -> None:
    _, vae, pixels = made
    latents = run(made, tmp_path / "out", "--mirrors", *random)
    rows, plain = latents.gather(range(len(latents))), run(made, tmp_path / "plain", *random)
    originals = plain.gather(range(len(plain)))
    assert latents.rows_per_image == 2 * plain.rows_per_image
    close(rows.mean[::2], originals.mean)
    if not random:
        close(rows.mean[1::2], stock(vae, [center(p)[:, ::-1] for p in pixels])[0])
    # Convolutions pad evenly but stride unevenly: a mirrored latent is another one.
    assert np.abs(rows.mean[1::2] - rows.mean[::2, :, :, ::-1]).max() > 1e-3
    side = pyarrow.parquet.read_table(tmp_path / "out" / "data-00000.parquet").to_pydict()
    assert side["view"] == list(range(latents.rows_per_image)) * 5


@pytest.mark.parametrize("more", [("--dtype=fp32",), ("--dtype=fp16",), ("--moments=false",)])
def test_statistics_are_those_of_a_float64_pass_over_the_stored_rows(made: Made, tmp_path: Path, more: tuple[str, ...]) -> None:
    latents = run(made, tmp_path, *more, "--data.crop=random", "--data.crops=5", "--mirrors", "--shard_rows=7")
    stored = [load_file(file) for file in sorted(tmp_path.glob("data-*.safetensors"))]
    assert {tensors["mean"].dtype for tensors in stored} == {np.dtype(np.float16 if "fp16" in more[0] else np.float32)}
    mean = np.concatenate([tensors["mean"] for tensors in stored]).astype(np.float64)
    variance = mean.var((0, 2, 3))
    told = latents.manifest["statistics"]
    if latents.has_logvar:
        posterior = np.exp(np.concatenate([tensors["logvar"] for tensors in stored]).astype(np.float64)).mean((0, 2, 3))
        np.testing.assert_allclose(told["posterior_variance"], posterior, rtol=1e-6)
        variance = variance + posterior
    else:
        assert told["posterior_variance"] is None
        assert {*stored[0]} == {"mean", "label", "id"}
    np.testing.assert_allclose(latents.mean, mean.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(latents.std, np.sqrt(variance), rtol=1e-6)
    assert told["values"] == 50 * 8 * 8


def test_means_alone_and_half_precision_are_the_same_rows(made: Made, tmp_path: Path) -> None:
    full = run(made, tmp_path / "full").gather(range(5))
    alone = run(made, tmp_path / "alone", "--moments=false").gather(range(5))
    half = run(made, tmp_path / "half", "--dtype=fp16").gather(range(5))
    assert alone.logvar is None
    np.testing.assert_array_equal(alone.mean, full.mean)
    np.testing.assert_array_equal(half.mean, full.mean.astype(np.float16))
    assert full.logvar is not None
    np.testing.assert_array_equal(half.logvar, full.logvar.astype(np.float16))


def parquet(folder: Path, pixels: list[np.ndarray]) -> str:
    def png(p: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(p).save(buffer, "PNG")
        return buffer.getvalue()

    rows = {
        "image": [{"bytes": png(p), "path": None} for p in pixels],
        "mask": [b"raw"] * len(pixels),
        "label": [f"class {k % 3}" for k in range(len(pixels))],
        "row": [100 + k for k in range(len(pixels))],
        "caption": [f"number {k}" for k in range(len(pixels))],
        "boxes": [[k, k + 1] for k in range(len(pixels))],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(), "mask": datasets.Value("binary"), "label": datasets.Value("string"), "row": datasets.Value("int64"),
            "caption": datasets.Value("string"), "boxes": datasets.Sequence(datasets.Value("int64")),
        }
    )  # fmt: skip
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "x.parquet")
    return str(folder / "x.parquet")


def test_labels_and_columns_of_a_table_arrive(made: Made, tmp_path: Path) -> None:
    table = parquet(tmp_path, made[2])
    latents = run(made, tmp_path / "out", "--mirrors", "--shard_rows=6", "--data.image_column=image", source=table)
    assert latents.labels == ["class 0", "class 1", "class 2"]
    assert latents.labels_of().tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1]
    close(latents.gather([2]).mean, stock(made[1], [center(made[2][1])])[0])
    side = [pyarrow.parquet.read_table(tmp_path / "out" / f"data-0000{shard}.parquet").to_pylist() for shard in (0, 1)]
    expected = [
        {
            "row": row, "image": row // 2, "view": row % 2, "name": str(row // 2), "source_row": 100 + row // 2,
            "caption": f"number {row // 2}", "boxes": [row // 2, row // 2 + 1],
        }
        for row in range(10)
    ]  # fmt: skip
    assert side == [expected[:6], expected[6:]]
    run(made, tmp_path / "chosen", "--data.columns=[caption]", "--data.image_column=image", source=table)
    names = pyarrow.parquet.read_schema(tmp_path / "chosen" / "data-00000.parquet").names
    assert names == ["row", "image", "view", "name", "caption"]


def test_rows_of_bad_images_are_left_out_and_listed_and_move_nothing(made: Made, tmp_path: Path) -> None:
    photos(tmp_path / "photos", NAMES)
    whole = run(made, tmp_path / "whole", "--mirrors", "--shard_rows=4").gather(range(10))
    (tmp_path / "photos" / "ape" / "2.png").write_bytes(b"no image")
    latents = run(made, tmp_path / "out", "--mirrors", "--shard_rows=4", source=str(tmp_path / "photos"))
    assert latents.ids.tolist() == [0, 1, 4, 5, 6, 7, 8, 9]
    rows = latents.gather(range(8))
    np.testing.assert_array_equal(rows.mean, whole.mean[rows.id])
    assert latents.manifest["bad"] == [{"image": 1, "name": "ape/2.png", "reason": "not an image of a known format", "rows": [2, 3]}]
    assert json.loads((tmp_path / "out" / "data-00000.json").read_text())["bad"] == latents.manifest["bad"]
    assert pyarrow.parquet.read_table(tmp_path / "out" / "data-00000.parquet")["row"].to_pylist() == [0, 1]


def test_a_shard_of_bad_images_is_empty(made: Made, tmp_path: Path) -> None:
    photos(tmp_path / "photos", NAMES)
    for name in NAMES[2:4]:
        (tmp_path / "photos" / name).write_bytes(b"no image")
    latents = run(made, tmp_path / "out", "--shard_rows=2", source=str(tmp_path / "photos"))
    assert [entry["rows"] for entry in latents.manifest["shards"]] == [2, 0, 1]
    assert latents.gather([2, 0]).id.tolist() == [4, 0]
    np.testing.assert_allclose(latents.mean, latents.gather(range(3)).mean.astype(np.float64).mean((0, 2, 3)), rtol=1e-6)


def test_more_bad_images_than_tolerated_end_the_run_which_goes_on_with_a_larger_number(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path / "photos", NAMES)
    for name in NAMES[1:4]:
        (tmp_path / "photos" / name).write_bytes(b"no image")
    argv = arguments(made, tmp_path / "out", "--data.max_bad=2", "--shard_rows=1", source=str(tmp_path / "photos"))
    assert encode.main(argv) == 2
    message = capsys.readouterr().err
    assert "3 images cannot be read, data.max_bad is 2: ape/2.png (not an image of a known format); " in message
    assert encode.main(argv) == 2
    assert encode.main([*argv, "--data.max_bad=3"]) == 0
    assert Latents(tmp_path / "out").ids.tolist() == [0, 4]
    for name in NAMES:
        (tmp_path / "photos" / name).write_bytes(b"no image")
    assert encode.main(arguments(made, tmp_path / "none", source=str(tmp_path / "photos"))) == 2
    assert "none of the images" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_change_nothing(made: Made, tmp_path: Path, workers: int) -> None:
    more = ("--data.crop=random", "--data.crops=3", "--mirrors", "--shard_rows=8")
    alone = run(made, tmp_path / "alone", *more)
    run(made, tmp_path / "many", *more, f"--data.workers={workers}")
    assert files(tmp_path / "alone") == files(tmp_path / "many")
    assert len(alone) == 30


def test_a_model_without_a_recipe_gets_one(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made[1].save_pretrained(tmp_path / "stock")
    argv = ["--model", str(tmp_path / "stock"), "--data.source", str(made[0] / "photos"), "--out", str(tmp_path / "out")]
    assert encode.main(argv) == 2
    assert "data.resolution: not given; give the side of the crops" in capsys.readouterr().err
    assert not (tmp_path / "out" / "plan.json").exists()
    assert encode.main([*argv, "--data.resolution=16", "--precision=fp32"]) == 0
    kept = json.loads((tmp_path / "out" / "vae" / "preprocessing.json").read_text())
    assert kept["encoder_hash"] == Latents(tmp_path / "out").manifest["encoder_hash"] == encoder_hash(made[1], kept["pixels"])


def test_the_models_resolution_brings_its_resize_and_a_given_one_does_not(made: Made, tmp_path: Path) -> None:
    small_model(tmp_path / "vae")
    recipe = json.loads((tmp_path / "vae" / "preprocessing.json").read_text())
    recipe["crops"] |= {"resize": 18, "filter": "box"}
    (tmp_path / "vae" / "preprocessing.json").write_text(json.dumps(recipe))
    for name, more, expected in (("a", (), (18, "box")), ("b", ("--data.resolution=16",), (None, "box"))):
        data = run(made, tmp_path / name, f"--model={tmp_path / 'vae'}", *more).manifest["recipe"]["data"]
        assert (data["resize"], data["filter"]) == expected


class Overflowing:
    """A posterior whose second image has means that fp16, or nothing, can hold."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, vae: AutoencoderKL, images: Tensor) -> DiagonalGaussian:
        mean = torch.zeros(len(images), 4, 8, 8)
        mean[1, 2, 3, 4] = self.value
        return DiagonalGaussian(mean, torch.zeros_like(mean))


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (1e5, "fp16", "error: mean of image ape/2.png (row 1) reaches 1e+05, fp16 ends at 65504; encode with --dtype fp32\n"),
        (float("nan"), "fp16", "error: mean of image ape/2.png (row 1) is not finite in fp32; check the autoencoder's weights\n"),
        (float("inf"), "fp32", "error: mean of image ape/2.png (row 1) is not finite in fp32; check the autoencoder's weights\n"),
    ],
)
def test_latents_that_cannot_be_stored_end_the_run_and_name_the_image(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: float, dtype: str, said: str
) -> None:
    monkeypatch.setattr("autoencoder.latents.network.encode", Overflowing(value))
    assert encode.main(arguments(made, tmp_path, f"--dtype={dtype}")) == 1
    assert capsys.readouterr().err.endswith(said)
    assert not list(tmp_path.glob("data-*"))
