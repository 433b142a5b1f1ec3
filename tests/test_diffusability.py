"""Diffusability of networks whose equivariance is known, and what the commands show of it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autoencoder import diffusability, evaluate
from autoencoder.artifact import preprocessing, save_autoencoder
from autoencoder.config import DataConfig, ModelConfig
from autoencoder.data.loader import ValidationSet
from autoencoder.data.pixels import to_images
from autoencoder.data.sources import open_evaluation
from autoencoder.model import build
from autoencoder.pixel_recipe import PixelRecipe
from autoencoder.posterior import DiagonalGaussian

DATA = DataConfig(resolution=8)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def crops() -> ValidationSet:
    return ValidationSet(open_evaluation(DATA, split=None, images=3), DATA, seed=0, batch_size=3, latent_shape=(3, 8, 8))


def measured(monkeypatch: pytest.MonkeyPatch, crops: ValidationSet, encode: Any, decode: Any) -> dict[str, Any]:
    """What a network of these two functions, at the images' own size, comes to."""
    monkeypatch.setattr(diffusability, "encode", lambda vae, x: DiagonalGaussian(encode(x), torch.zeros_like(x)))
    monkeypatch.setattr(diffusability, "decode", lambda vae, z: decode(z))
    monkeypatch.setattr(diffusability, "downsampling", lambda vae: 1)
    network: Any = SimpleNamespace()
    return diffusability.measure_diffusability(network, crops, PixelRecipe(), CPU)


def test_pointwise_networks_are_equivariant_up_to_scaling(monkeypatch: pytest.MonkeyPatch, crops: ValidationSet) -> None:
    told = measured(monkeypatch, crops, lambda x: 2 * x + 1, lambda z: (z - 1) / 2)
    assert told["crops"] == 3 and len(told["transformations"]) == 6
    assert told["decoder_error"] == pytest.approx(0, abs=1e-6) and told["encoder_error"] == pytest.approx(0, abs=1e-6)
    # Nothing but rounding to 8 bits lies between the transformed images and what is decoded.
    assert all(its["psnr_db"] is None or its["psnr_db"] > 60 for its in told["transformations"])
    assert told["spectrum"]["latents"]["octaves"] == [
        {"above": band["above"], "share": pytest.approx(band["share"], abs=1e-6)} for band in told["spectrum"]["images"]["octaves"]
    ]


def test_the_error_is_the_ratio_that_is_stated(monkeypatch: pytest.MonkeyPatch, crops: ValidationSet) -> None:
    """A decoder that doubles the upper half of whatever it is given, and an encoder that does nothing."""

    def decode(z: torch.Tensor) -> torch.Tensor:
        gain = torch.ones(z.shape[-1], 1)
        gain[: z.shape[-1] // 2] = 2
        return z * gain

    told = measured(monkeypatch, crops, lambda x: x, decode)
    images = to_images(crops.pixels([0, 1, 2]))
    wanted = torch.rot90(decode(images), 2, (2, 3))
    spread = (wanted - wanted.mean((2, 3), keepdim=True)).square().sum()
    expected = ((decode(torch.rot90(images, 2, (2, 3))) - wanted).square().sum() / spread).sqrt()
    (half_turn,) = [its for its in told["transformations"] if its["degrees"] == 180]
    assert half_turn["decoder_error"] == pytest.approx(expected.item(), rel=1e-5)
    assert half_turn["encoder_error"] == pytest.approx(0, abs=1e-6)
    assert told["decoder_error"] == pytest.approx(sum(its["decoder_error"] for its in told["transformations"]) / 6)


def test_latents_of_noise_show_in_the_spectrum(monkeypatch: pytest.MonkeyPatch, crops: ValidationSet) -> None:
    told = measured(monkeypatch, crops, lambda x: torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), lambda z: z)
    latents, images = (told["spectrum"][name]["octaves"][0]["share"] for name in ("latents", "images"))
    assert latents > 0.6 and images < 0.3


def test_what_cannot_be_measured_is_null_in_valid_json(monkeypatch: pytest.MonkeyPatch, crops: ValidationSet) -> None:
    told = measured(monkeypatch, crops, torch.zeros_like, torch.zeros_like)
    assert told["decoder_error"] is None and told["encoder_error"] is None
    json.dumps(told, allow_nan=False)


def test_the_evaluation_shows_both_where_they_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    vae = build(ModelConfig(preset="tiny", block_out_channels=(8, 8), norm_groups=4), channels=3, resolution=16)
    save_autoencoder(vae, tmp_path / "model", preprocessing=preprocessing(DataConfig(resolution=16), 256), likelihood=None)
    argv = ["--model", str(tmp_path / "model"), "--data.source", "demo", "--data.images", "2", "--out", str(tmp_path / "f.json")]
    assert evaluate.main(argv) == 0
    assert "equivariance on" not in capsys.readouterr().out
    assert evaluate.main([*argv, "--diffusability", "--headroom"]) == 0
    shown, told = capsys.readouterr().out, json.loads((tmp_path / "f.json").read_text())
    assert "equivariance on 2 crops" in shown and "spectrum: share of the energy" in shown and "fp16 headroom on 2 crops" in shown
    assert len(told["diffusability"]["transformations"]) == 6
    assert told["headroom"]["layers"][0]["largest"] > 0
