"""`reconstruct --latents`: pictures of stored means, by the autoencoder that made them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from autoencoder import artifact, encode, export, reconstruct
from autoencoder.latents.reader import Latents
from autoencoder.pretrained import load
from tests.encode_children import photos, small_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoding")
    vae = small_model(folder / "vae")
    small_model(folder / "other", seed=1)
    recipe = artifact.load_preprocessing(folder / "vae")
    assert recipe is not None
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.3
    artifact.save_autoencoder(vae, folder / "brighter", preprocessing=recipe, likelihood=None)
    photos(folder / "photos", [f"{k}.png" for k in range(9)])
    (folder / "photos" / "2.png").write_bytes(b"no image")
    argv = ["--model", str(folder / "vae"), "--data.source", str(folder / "photos"), "--data.workers=0", "--shard_rows=5"]
    assert encode.main([*argv, "--precision=fp32", "--out", str(folder / "latents")]) == 0
    return folder


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@torch.no_grad()
def expected(model: Path, mean: torch.Tensor) -> np.ndarray:
    """8-bit pixels (N, H, W, 3) by diffusers' own `decode`."""
    images = load(str(model)).decode(mean).sample.clamp(-1, 1)
    return ((images + 1) * 127.5).round().permute(0, 2, 3, 1).numpy().astype(int)


def test_a_folder_becomes_pictures_named_by_id_and_a_grid(made: Path, tmp_path: Path) -> None:
    assert reconstruct.main(["--latents", str(made / "latents"), "--out", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [*(f"{k:08d}.png" for k in range(9) if k != 2), "grid.png"]
    mean = torch.from_numpy(Latents(made / "latents").gather(range(8)).mean)
    found = np.stack([picture(tmp_path / f"{k:08d}.png") for k in range(9) if k != 2])
    assert np.abs(found - expected(made / "vae", mean)).max() <= 1  # a value on the edge between two levels may round either way
    grid = picture(tmp_path / "grid.png")
    np.testing.assert_array_equal(grid[0:128, 0:128], found[0].repeat(8, 0).repeat(8, 1))
    np.testing.assert_array_equal(grid[0:128, -128:], found[7].repeat(8, 0).repeat(8, 1))


def test_rows_are_spread_evenly_over_the_data_set(made: Path, tmp_path: Path) -> None:
    assert reconstruct.main(["--latents", str(made / "latents"), "--out", str(tmp_path), "--rows", "3"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000000.png", "00000005.png", "00000008.png", "grid.png"]


@pytest.mark.parametrize("name", ["mean", "latents"])
def test_a_file_is_decoded_by_the_model_beside_it_or_a_given_one(made: Path, tmp_path: Path, name: str) -> None:
    shard = made / "latents" / "data-00001.safetensors"
    assert reconstruct.main(["--latents", str(shard), "--out", str(tmp_path / "shard")]) == 0
    assert sorted(p.name for p in (tmp_path / "shard").iterdir()) == [*(f"{k:08d}.png" for k in range(5, 9)), "grid.png"]
    mean = load_file(shard)["mean"]
    save_file({name: mean.to(torch.bfloat16)}, tmp_path / "own.safetensors")
    argv = ["--latents", str(tmp_path / "own.safetensors"), "--out", str(tmp_path / "own")]
    assert reconstruct.main(argv) == 2
    assert reconstruct.main([*argv, "--model", str(made / "vae")]) == 0
    found = np.stack([picture(tmp_path / "own" / f"{k:08d}.png") for k in range(4)])
    assert np.abs(found - expected(made / "vae", mean.to(torch.bfloat16).float())).max() <= 1


@pytest.mark.parametrize("given", ["latents", "latents/data-00000.safetensors"])
def test_another_encoder_is_refused_with_both_hashes_or_allowed_and_said(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    hashes = [json.loads((made / name / "preprocessing.json").read_text())["encoder_hash"] for name in ("vae", "other")]
    argv = ["--latents", str(made / given), "--out", str(tmp_path / "out"), "--model", str(made / "other")]
    assert reconstruct.main(argv) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: model: latents of another encoder\n")
    assert all(value in message for value in (*hashes, "allow_vae_mismatch"))
    assert not (tmp_path / "out").exists()
    assert reconstruct.main([*argv, "--allow_vae_mismatch"]) == 0
    noted = capsys.readouterr().err
    assert all(value in noted for value in (*hashes, "allow_vae_mismatch"))
    assert (tmp_path / "out" / "grid.png").exists()


def test_another_decoder_is_noted_and_used(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--latents", str(made / "latents"), "--rows", "1", "--model", str(made / "brighter"), "--out", str(tmp_path)]
    assert reconstruct.main(argv) == 0
    assert "the decoder has changed" in capsys.readouterr().err
    mean = torch.from_numpy(Latents(made / "latents").gather([0]).mean)
    assert np.abs(picture(tmp_path / "00000000.png") - expected(made / "brighter", mean)[0]).max() <= 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--latents=MADE/latents", "--input=MADE/photos"], "give one of them"),
        ([], "input: not given; give --input FILE_OR_FOLDER for images, or --latents FILE_OR_FOLDER for latents"),
        (["--input=MADE/photos"], "model: not given"),
        (["--latents=MADE/no"], "latents: got"),
        (["--latents=MADE/photos"], "no manifest.json in it"),
        (["--latents=MADE/photos/0.png"], "a file of latents ends in .safetensors"),
        (["--latents=MADE/latents", "--model=MADE/photos"], "model: got"),
        (["--latents=MADE/latents", "--rows=0"], "rows: got 0"),
        (["--latents=OWN", "--model=MADE/vae"], "SAID"),
    ],
)
def test_bad_input_ends_with_2_and_one_message(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    own = tmp_path / "own.safetensors"
    cases: list[tuple[dict[str, torch.Tensor] | None, str]] = [(None, said)]
    if said == "SAID":
        wrong = torch.zeros(2, 4, 8, 8)
        wrong[1, 0, 0, 0] = torch.nan
        cases = [
            ({"weights": torch.zeros(2)}, "holds weights; give a file with a tensor `mean` or `latents`"),
            ({"mean": torch.zeros(4, 8, 8)}, "mean has shape (4, 8, 8); give (N, c, h, w)"),
            ({"latents": torch.zeros(2, 3, 8, 8)}, "these have 3 channels, the model 4"),
            ({"mean": wrong}, "mean of row 1 is not finite"),
        ]
    for tensors, expected_message in cases:
        if tensors is not None:
            save_file(tensors, own)
        given = [a.replace("MADE", str(made)).replace("OWN", str(own)) for a in argv]
        assert reconstruct.main([*given, "--out", str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert expected_message in message
        assert message.startswith("error: ")
        assert not (tmp_path / "out").exists()
    own.write_bytes(b"nothing of the kind")
    assert reconstruct.main([f"--latents={own}", f"--model={made / 'vae'}", "--out", str(tmp_path / "out")]) == 2
    assert "cannot be read as safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_an_out_that_is_a_file_or_lies_in_one_is_one_message(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], below: str
) -> None:
    (tmp_path / "file").touch()
    out = f"{tmp_path / 'file'}{below}"
    commands = [
        (reconstruct.main, ["--latents", str(made / "latents")]),
        (reconstruct.main, ["--model", str(made / "vae"), "--input", str(made / "photos" / "0.png")]),
        (export.main, ["--checkpoint", str(made / "vae")]),
    ]
    for main, argv in commands:
        capsys.readouterr()
        assert main([*argv, "--out", out]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"error: out: got '{out}'")
        assert message.count("\n") == 1
