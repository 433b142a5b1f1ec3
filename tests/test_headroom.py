"""The fp16 audit against fp16 itself: what it calls safe runs in half precision, what it calls unsafe overflows there."""

import copy
import json
from pathlib import Path

import pytest
import torch

from autoencoder import export
from autoencoder.artifact import preprocessing, save_autoencoder
from autoencoder.config import DataConfig, ModelConfig
from autoencoder.data.loader import ValidationSet
from autoencoder.data.pixels import to_images
from autoencoder.data.sources import open_evaluation
from autoencoder.evaluation_text import headroom as text
from autoencoder.headroom import ENOUGH, Headroom, measure_headroom
from autoencoder.model import AutoencoderKL, build
from autoencoder.pixel_recipe import PixelRecipe

DATA = DataConfig(resolution=16)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def crops() -> ValidationSet:
    return ValidationSet(open_evaluation(DATA, split=None, images=3), DATA, seed=0, batch_size=3, latent_shape=(4, 8, 8))


@pytest.fixture(scope="module")
def sound() -> AutoencoderKL:
    torch.manual_seed(0)
    return build(ModelConfig(preset="tiny", block_out_channels=(8, 8), norm_groups=4), channels=3, resolution=16).eval()


@pytest.fixture(scope="module")
def hot(sound: AutoencoderKL) -> AutoencoderKL:
    """The same function in fp32, but for rounding: one layer's output is made large, and the GroupNorm after it takes that out."""
    vae = copy.deepcopy(sound)
    layer = vae.decoder.mid_block.resnets[0].conv1
    with torch.no_grad():
        layer.weight *= 1e7
        layer.bias *= 1e7
    return vae


def test_a_sound_network_has_headroom_and_runs_in_half_precision(sound: AutoencoderKL, crops: ValidationSet) -> None:
    found = measure_headroom(sound, crops, PixelRecipe(), CPU)
    assert found.factor >= ENOUGH and not found.force_upcast and found.crops == 3
    images = to_images(crops.pixels([0, 1, 2]))
    half = copy.deepcopy(sound).half()
    with torch.no_grad():
        assert half.decode(half.encode(images.half()).latent_dist.mode()).sample.isfinite().all()


def test_a_layer_that_overflows_is_named_and_does_so_in_half_precision(
    sound: AutoencoderKL, hot: AutoencoderKL, crops: ValidationSet
) -> None:
    found = measure_headroom(hot, crops, PixelRecipe(), CPU)
    assert found.force_upcast and found.factor < 1
    assert found.worst == "decoder.mid_block.resnets.0.conv1"
    images = to_images(crops.pixels([0, 1, 2]))
    half = copy.deepcopy(hot).half()
    with torch.no_grad():
        latents = hot.encode(images).latent_dist.mode()
        torch.testing.assert_close(hot.decode(latents).sample, sound.decode(latents).sample, rtol=1e-2, atol=1e-2)
        assert not half.decode(latents.half()).sample.isfinite().all()
    told = text(found.report())
    assert "fp16 overflows on these images: force_upcast true" in told and "decoder.mid_block.resnets.0.conv1 " in told


def test_the_largest_value_is_that_of_the_layer_over_all_crops(sound: AutoencoderKL, crops: ValidationSet) -> None:
    seen: list[torch.Tensor] = []
    hook = sound.encoder.conv_in.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        sound.encoder(to_images(crops.pixels([0, 1, 2])))
    hook.remove()
    found = measure_headroom(sound, crops, PixelRecipe(), CPU)
    assert found.largest["encoder.conv_in"] == pytest.approx(seen[0].abs().max().item(), rel=1e-5)
    assert next(iter(found.largest)) == "encoder.conv_in"
    assert not sound.encoder.conv_in._forward_hooks


@pytest.mark.parametrize(("largest", "upcast"), [(65504 / ENOUGH, False), (65504 / ENOUGH * 1.01, True), (float("nan"), True)])
def test_the_verdict_turns_at_the_stated_headroom(largest: float, upcast: bool) -> None:
    found = Headroom({"a": 1.0, "b": largest}, crops=1)
    assert (found.force_upcast, found.worst) == (upcast, "b")
    json.dumps(found.report(), allow_nan=False)


@pytest.mark.parametrize("upcast", [False, True])
def test_an_audited_export_has_its_verdict(
    sound: AutoencoderKL, hot: AutoencoderKL, tmp_path: Path, capsys: pytest.CaptureFixture[str], upcast: bool
) -> None:
    vae = hot if upcast else sound
    save_autoencoder(vae, tmp_path / "model", preprocessing=preprocessing(DATA, 256), likelihood=None)
    argv = ["--checkpoint", str(tmp_path / "model"), "--audit", "demo", "--out", str(tmp_path / "out")]
    assert export.main(argv) == 0
    assert "fp16 headroom on" in capsys.readouterr().out
    assert AutoencoderKL.from_pretrained(tmp_path / "out").config["force_upcast"] is upcast


def test_an_audit_needs_crops_that_the_network_takes(sound: AutoencoderKL, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound.save_pretrained(tmp_path / "stock")
    argv = ["--checkpoint", str(tmp_path / "stock"), "--out", str(tmp_path / "out")]
    assert export.main([*argv, "--audit", "demo"]) == 2
    assert "audit_resolution: not given; give the side of the crops in pixels" in capsys.readouterr().err
    assert export.main([*argv, "--audit", "demo", "--audit_resolution", "17"]) == 2
    assert "audit_resolution: got 17; give a multiple of 2" in capsys.readouterr().err
    assert export.main([*argv, "--audit_resolution", "16"]) == 2
    assert export.main([*argv, "--audit", str(tmp_path / "none")]) == 2
    assert "audit" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
