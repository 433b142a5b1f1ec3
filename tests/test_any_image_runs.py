"""Five bands of 16 bits with missing pixels, from training to source values back, held against stock diffusers and NumPy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from safetensors.torch import load_file

from autoencoder import encode, evaluate, export, reconstruct, train
from autoencoder.latents.reader import Latents
from autoencoder.model import AutoencoderKL
from autoencoder.pixel_recipe import PixelRecipe
from autoencoder.reconstruction import dtype_of
from tests.children import SMALL
from tests.gradients import launch
from tests.test_processes import ARGV as GRADIENTS

HIGH, NODATA = 10_000, 65_535
RECIPE = {"range": [-1.0, 1.0], "levels": HIGH + 1, "channels": 5, "low": [0.0] * 5, "high": [float(HIGH)] * 5, "nodata": float(NODATA)}
OPTIONS = [
    "--data.channels=5", "--data.low=0", f"--data.high={HIGH}", f"--data.nodata={NODATA}", "--data.preview=[4,2,0]",
    "--data.stretch=[2,98]",
    "--objective.likelihood.name=discretized_logistic", f"--objective.likelihood.levels={HIGH + 1}", "--objective.perceptual.name=ssim",
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


def scene(seed: int, side: int = 24) -> np.ndarray:
    """(side, side, 5) uint16: waves in five bands, a corner missing in two of three, all of it in the eighth."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(rng.uniform(2, 9) * x + rng.uniform(2, 9) * y + rng.uniform(0, 6)) for _ in range(5)]
    pixels = (HIGH * (0.5 + 0.45 * np.stack(waves, 2))).round().astype(np.uint16)
    if seed % 3:
        pixels[x + y < 0.7] = NODATA
    # Where one band is missing the pixel is.
    pixels[-6, -6, 3] = NODATA
    if seed == 8:
        pixels[:] = NODATA
    return pixels


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    for seed in range(20):
        tifffile.imwrite(folder / f"{seed:02d}.tif", scene(seed), photometric="minisblack", planarconfig="contig")
    return folder


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("five") / "run"
    assert train.main([*SMALL, *OPTIONS, "--train.images=64", f"--data.source={source}", "--out", str(out)]) == 0
    return out


def stock(run: Path) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(run / "vae")
    assert (vae.config["in_channels"], vae.config["out_channels"]) == (5, 5)
    return vae


def encoder_input(pixels: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """What the encoder is to see of source values, (1, 5, H, W), and which pixels are there, (H, W)."""
    valid = (pixels != NODATA).all(2)
    images = np.where(valid[:, :, None], pixels.astype(np.float64) / (HIGH / 2) - 1, 0)
    return torch.from_numpy(images).float().permute(2, 0, 1)[None], valid


@torch.no_grad()
def source_values(vae: AutoencoderKL, images: torch.Tensor) -> np.ndarray:
    """The reconstruction (H, W, 5) in source values, by stock code."""
    decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample[0]
    values: np.ndarray = (((decoded.clamp(-1, 1) + 1) * (HIGH / 2)).permute(1, 2, 0)).double().numpy()
    return values


def test_the_run_states_its_recipe_and_logs_what_was_missing(run: Path) -> None:
    told = json.loads((run / "vae" / "preprocessing.json").read_text())
    assert told["pixels"] == RECIPE
    assert told["preview"] == {"channels": [4, 2, 0], "stretch": [2.0, 98.0]}
    report = json.loads((run / "evaluation.json").read_text())
    assert report["provenance"]["pixels"] == RECIPE
    assert "high - low" in report["provenance"]["quality"]
    assert "high - low" in report["metrics"]["psnr_db"]["unit"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0.6 < line["valid_share"] < 1 for line in lines)
    # 10,001 levels are 13.3 bits; an untrained network's bound lies near them.
    assert all(0 < line["bits_per_dim"] < 20 for line in lines)
    for picture in (run / "images").glob("*.png"):
        assert np.asarray(Image.open(picture)).shape[2] == 3


def test_evaluation_is_on_the_stated_range_over_what_is_there(run: Path, source: Path, tmp_path: Path) -> None:
    argv = ["--model", str(run), f"--data.source={source}", "--data.resolution=24", "--out", str(tmp_path / "F.json")]
    assert evaluate.main(argv) == 0
    report = json.loads((tmp_path / "F.json").read_text())
    photos = {photo["id"]: photo for photo in report["photos"]}
    assert len(photos) == 19  # nothing of the eighth is there
    vae = stock(run)
    for seed in (0, 1, 7):
        pixels = scene(seed)
        images, valid = encoder_input(pixels)
        error = (source_values(vae, images) - pixels)[valid]
        wanted = 10 * np.log10(HIGH**2 / np.mean(error**2))
        assert photos[f"{seed:02d}.tif"]["psnr_db"] == pytest.approx(wanted, abs=1e-3)
        assert photos[f"{seed:02d}.tif"]["valid_share"] == pytest.approx(valid.mean())
    for photo in photos.values():
        values = 5 * 24 * 24 * photo["valid_share"]
        assert photo["bits_per_dim"] == pytest.approx(-photo["elbo_nats"] / (values * np.log(2)), rel=1e-5)


def test_latents_are_those_of_stock_code_on_the_same_images(run: Path, source: Path, tmp_path: Path) -> None:
    argv = ["--model", str(run), f"--data.source={source}", "--data.resolution=24", "--data.workers=0", "--out", str(tmp_path / "latents")]
    assert encode.main(argv) == 0
    latents = Latents(tmp_path / "latents")
    rows = latents.gather([1, 5])
    vae = stock(run)
    for row, seed in enumerate((1, 5)):
        with torch.no_grad():
            wanted = vae.encode(encoder_input(scene(seed))[0]).latent_dist.mean[0].numpy()
        np.testing.assert_allclose(rows.mean[row], wanted, atol=2e-5)
    told = json.loads((run / "vae" / "preprocessing.json").read_text())
    kept = json.loads((tmp_path / "latents" / "vae" / "preprocessing.json").read_text())
    assert latents.manifest["encoder_hash"] == kept["encoder_hash"] == told["encoder_hash"]
    assert (kept["pixels"], kept["preview"]) == (told["pixels"], told["preview"])
    assert reconstruct.main(["--latents", str(tmp_path / "latents"), "--out", str(tmp_path / "pictures"), "--rows=2"]) == 0
    assert np.asarray(Image.open(tmp_path / "pictures" / "grid.png")).shape[2] == 3


def test_latents_come_back_in_the_source_values_of_whole_images(
    run: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Latents of whole scenes: what `--latents` writes is what `--input` does, but for what is marked as missing."""
    argv = ["--model", str(run), f"--data.source={source}", "--data.resolution=24", "--precision=fp32", "--data.workers=0"]
    assert encode.main([*argv, "--out", str(tmp_path / "latents")]) == 0
    capsys.readouterr()
    assert reconstruct.main(["--latents", str(tmp_path / "latents"), "--out", str(tmp_path / "out"), "--rows=null"]) == 0
    count = len(list(source.iterdir()))
    assert capsys.readouterr().out == f"{count} pictures, as many TIFFs of source values and grid.png written to {tmp_path / 'out'}\n"
    assert reconstruct.main(["--model", str(run), "--input", str(source), "--out", str(tmp_path / "whole")]) == 0
    for seed in (0, 1, 8):
        found, whole = tifffile.imread(tmp_path / "out" / f"{seed:08d}.tif"), tifffile.imread(tmp_path / "whole" / f"{seed:02d}.tif")
        _, valid = encoder_input(scene(seed))
        assert (found.dtype, found.shape) == (np.uint16, (24, 24, 5))
        assert np.abs(found[valid].astype(int) - whole[valid]).max(initial=0) <= 1


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"levels": 256}, np.uint8),
        ({"levels": 65536}, np.uint16),
        ({"levels": 101, "low": (0.0,), "high": (100.0,)}, np.uint8),
        ({"levels": 10_001, "low": (-1000.0,), "high": (9000.0,)}, np.int16),
        ({"levels": 0, "low": (0.0,), "high": (100.0,)}, np.float32),
    ],
)
def test_values_without_a_file_have_the_smallest_type_that_holds_them(settings: dict[str, Any], dtype: type) -> None:
    assert dtype_of(PixelRecipe(channels=1, **settings)) == dtype


def test_an_exported_checkpoint_gives_source_values_back(run: Path, source: Path, tmp_path: Path) -> None:
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    assert export.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "vae")]) == 0
    exported, kept = (json.loads((folder / "preprocessing.json").read_text()) for folder in (tmp_path / "vae", run / "vae"))
    assert exported["encoder_hash"] == kept["encoder_hash"]
    assert reconstruct.main(["--model", str(tmp_path / "vae"), "--input", str(source), "--out", str(tmp_path / "out")]) == 0
    vae = stock(run)
    for seed in (0, 1, 8):
        images, valid = encoder_input(scene(seed))
        found = tifffile.imread(tmp_path / "out" / f"{seed:02d}.tif")
        assert (found.dtype, found.shape) == (np.uint16, (24, 24, 5))
        assert (found[~valid] == NODATA).all()
        assert np.abs(found[valid] - source_values(vae, images)[valid]).max(initial=0) <= 0.51
        assert Image.open(tmp_path / "out" / f"{seed:02d}.png").mode == "RGB"
    with tifffile.TiffFile(tmp_path / "out" / "00.tif") as file:
        assert file.pages.first.tags.valueof(42113) == str(NODATA)


@pytest.mark.slow
def test_two_processes_are_one_where_pixels_are_missing(source: Path, tmp_path: Path) -> None:
    argv = [*GRADIENTS, *OPTIONS, f"--data.source={source}"]
    for processes in (1, 2):
        launch(tmp_path / str(processes), processes, argv)
    single, double = (load_file(tmp_path / name / "gradients.safetensors") for name in "12")
    for step in {key.split("/")[0] for key in single}:
        keys = [key for key in single if key.startswith(f"{step}/")]
        difference = torch.cat([(single[k] - double[k]).flatten() for k in keys]).norm()
        assert difference <= 1e-5 * torch.cat([single[k].flatten() for k in keys]).norm()


def test_images_that_do_not_fit_the_model_are_refused_in_one_message(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "colour").mkdir()
    for i in range(4):
        Image.new("RGB", (24, 24), (i, 0, 0)).save(tmp_path / "colour" / f"{i}.png")
    given = str(tmp_path / "colour")
    for command, argv in (
        (evaluate.main, ["--model", str(run), f"--data.source={given}"]),
        (encode.main, ["--model", str(run), f"--data.source={given}", f"--out={tmp_path / 'latents'}"]),
        (reconstruct.main, ["--model", str(run), "--input", given, "--out", str(tmp_path / "out")]),
    ):
        assert command(argv) == 2
        printed = capsys.readouterr()
        said = printed.err.strip()
        assert "\n" not in said
        assert "skipped" not in printed.out
        for part in (given, "it has 3 bands", "images of 5 channels, values from 0 to 10000"):
            assert part in said
        # What the recipe has decided is no setting of these commands.
        assert "give data." not in said
    assert not (tmp_path / "out").exists()


def test_likelihoods_over_levels_are_refused_for_continuous_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        np.save(tmp_path / "images" / f"{i}.npy", rng.normal(size=(20, 20, 2)).astype(np.float32))
    argv = [*SMALL, "--train.images=16", f"--data.source={tmp_path / 'images'}", "--data.channels=2", "--data.low=-3", "--data.high=3"]
    discrete = ["--objective.likelihood.name=discretized_logistic", "--objective.likelihood.levels=7"]
    assert train.main([*argv, *discrete, "--out", str(tmp_path / "wrong")]) == 2
    assert "objective.likelihood.name: got 'discretized_logistic'; the values of these images are continuous" in capsys.readouterr().err
    run = tmp_path / "run"
    assert train.main([*argv, "--out", str(run)]) == 0
    assert json.loads((run / "vae" / "preprocessing.json").read_text())["pixels"]["levels"] == 0
    likelihood = ["--likelihood.name=discretized_logistic", "--likelihood.scale=0.1"]
    assert evaluate.main(["--model", str(run), *likelihood]) == 2
    assert "continuous values" in capsys.readouterr().err
    assert reconstruct.main(["--model", str(run), "--input", str(tmp_path / "images" / "3.npy"), "--out", str(tmp_path / "out")]) == 0
    found = tifffile.imread(tmp_path / "out" / "3.tif")
    assert (found.dtype, found.shape) == (np.float32, (20, 20, 2))
    assert np.abs(found).max() <= 3


def test_levels_must_be_those_of_the_range(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*SMALL, *OPTIONS, f"--data.source={source}", "--objective.likelihood.levels=65536", "--out", str(tmp_path / "run")]
    assert train.main(argv) == 2
    assert "objective.likelihood.levels: got 65536; these images have 10001 levels; give 10001" in capsys.readouterr().err


def test_grey_of_16_bits_comes_back_in_16_bits_on_its_own_range(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        smooth = rng.integers(0, 65536, (2, 2)).astype(np.float32).repeat(12, 0).repeat(12, 1)
        Image.fromarray(smooth.astype(np.uint16)).save(tmp_path / "images" / f"{i}.png")
    levels = ["--objective.likelihood.name=discretized_logistic", "--objective.likelihood.levels=65536"]
    argv = [*SMALL, *levels, "--train.images=16", f"--data.source={tmp_path / 'images'}", "--data.channels=1"]
    assert train.main([*argv, "--out", str(tmp_path / "run")]) == 0
    image = tmp_path / "images" / "3.png"
    assert reconstruct.main(["--model", str(tmp_path / "run"), "--input", str(image), "--out", str(tmp_path / "out")]) == 0
    found = tifffile.imread(tmp_path / "out" / "3.tif")
    assert (found.dtype, found.shape) == (np.uint16, (24, 24))
    (tmp_path / "one").mkdir()
    image.rename(tmp_path / "one" / "3.png")
    argv = ["--model", str(tmp_path / "run"), f"--data.source={tmp_path / 'one'}", "--data.resolution=24"]
    assert evaluate.main([*argv, "--out", str(tmp_path / "F.json")]) == 0
    report = json.loads((tmp_path / "F.json").read_text())
    error = found.astype(np.float64) - np.asarray(Image.open(tmp_path / "one" / "3.png"))
    assert report["metrics"]["psnr_db"]["mean"] == pytest.approx(10 * np.log10(65535**2 / np.mean(error**2)), abs=1e-3)


def test_four_channels_keep_their_opacity(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (20, 20, 4), dtype=np.uint8), "RGBA").save(tmp_path / "images" / f"{i}.png")
    argv = [*SMALL, "--train.images=16", f"--data.source={tmp_path / 'images'}", "--data.channels=4"]
    assert train.main([*argv, "--out", str(tmp_path / "run")]) == 0
    told = json.loads((tmp_path / "run" / "vae" / "preprocessing.json").read_text())
    assert told["pixels"] == {"range": [-1.0, 1.0], "levels": 256, "channels": 4}
    assert reconstruct.main(["--model", str(tmp_path / "run"), "--input", str(tmp_path / "images"), "--out", str(tmp_path / "out")]) == 0
    found = tifffile.imread(tmp_path / "out" / "3.tif")
    assert (found.dtype, found.shape) == (np.uint8, (20, 20, 4))


def test_images_that_are_skipped_are_named_once_others_fit(
    run: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mixed").mkdir()
    for name, content in (("0.png", b"no image"), ("2.png", b"nor this"), ("1.tif", (source / "01.tif").read_bytes())):
        (tmp_path / "mixed" / name).write_bytes(content)
    argv = ["--model", str(run), "--input", str(tmp_path / "mixed"), "--out", str(tmp_path / "out")]
    assert reconstruct.main(argv) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["skipped", "1.tif", "skipped"]
    (tmp_path / "mixed" / "1.tif").unlink()
    assert reconstruct.main([*argv[:-1], str(tmp_path / "other" / "out")]) == 2
    assert not (tmp_path / "other").exists()
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == ["skipped", "skipped"]
    assert "none of the 2 images" in said.err


def test_pictures_do_not_replace_the_images(run: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reconstruct.main(["--model", str(run), "--input", str(source), "--out", str(source)]) == 2
    assert "the images themselves are there" in capsys.readouterr().err


def test_crops_without_a_pixel_have_no_part_in_any_mean(source: Path, tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    for number in range(8):
        # Of scenes whose number three divides a single pixel is missing.
        pixels = scene(3 * number) if number % 2 else np.full((24, 24, 5), NODATA, np.uint16)
        tifffile.imwrite(tmp_path / "scenes" / f"{number}.tif", pixels, photometric="minisblack", planarconfig="contig")
    images = [f"--data.source={tmp_path / 'scenes'}", f"--data.validation_source={source}"]
    assert train.main([*SMALL, *OPTIONS, *images, "--train.images=16", "--out", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shares = [line["valid_share"] for line in lines if line["phase"] == "train"]
    assert shares
    assert all(share > 0.99 for share in shares)
