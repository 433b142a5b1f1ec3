"""Pretrained networks from wherever they are, and what is said of what is none."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoencoder.model import AutoencoderKL
from autoencoder.model_path import check_model
from autoencoder.pretrained import load, load_weights, open_pretrained
from autoencoder.runtime.errors import ConfigError, UsageError
from autoencoder.single_file import save_single_file, to_ldm
from tests.test_ldm_names import assert_same

WEIGHTS = "diffusion_pytorch_model.safetensors"


def network(seed: int = 0, **given: object) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae: AutoencoderKL = AutoencoderKL(**{"block_out_channels": (8,), "norm_num_groups": 4, "scaling_factor": 0.7, **given}).eval()
    return vae


def test_folders_shards_variants_and_pipelines_are_the_same_network(tmp_path: Path) -> None:
    vae = network()
    vae.save_pretrained(tmp_path / "plain")
    vae.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*-of-*.safetensors"))) > 1
    vae.save_pretrained(tmp_path / "variant", variant="ema")
    network(1).save_pretrained(tmp_path / "variant")
    vae.save_pretrained(tmp_path / "both", variant="ema", max_shard_size="10KB")
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    vae.save_pretrained(tmp_path / "odd" / "first_stage")
    save_single_file(vae, tmp_path / "one.safetensors", preprocessing=None, scale_known=True)
    for name, where in {
        "plain": {}, "shards": {}, "variant": {"variant": "ema"}, "both": {"variant": "ema"}, "pipeline": {}, "one.safetensors": {},
        "pipeline ": {"subfolder": "vae"}, "odd": {"subfolder": "first_stage"},
    }.items():  # fmt: skip
        opened = open_pretrained(str(tmp_path / name.strip()), **where)
        assert_same(vae, opened.vae)
        assert (opened.vae.config["scaling_factor"], opened.scale_known) == (0.7, True)
        assert opened.pixels == {"range": [-1.0, 1.0], "levels": 256, "channels": 3}
    assert not torch.equal(load(str(tmp_path / "variant")).quant_conv.weight, vae.quant_conv.weight)


def test_what_is_no_autoencoder_is_told_in_one_message_before_torch(tmp_path: Path) -> None:
    vae = network()
    vae.save_pretrained(tmp_path / "vae", variant="fp16")
    (tmp_path / "empty").mkdir()
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    (tmp_path / "vae.ckpt").write_bytes(b"PK")
    (tmp_path / "text.safetensors").write_text("no such thing")
    save_file({"lora.up.weight": torch.ones(2)}, tmp_path / "lora.safetensors")
    save_file(to_ldm(vae), tmp_path / "ldm.safetensors")
    for name, where, key, said in (
        ("no/such/folder", {}, "model.pretrained", "no such folder or file"),
        ("empty", {}, "model.pretrained", "no config.json, nor vae/config.json"),
        ("vae", {"subfolder": "unet"}, "model.pretrained", "no unet/config.json"),
        ("unet", {}, "model.pretrained", "holds a UNet2DConditionModel; give an AutoencoderKL"),
        ("text", {}, "model.pretrained", "model of another library"),
        ("torn", {}, "model.pretrained", "config.json cannot be read"),
        ("vae", {}, "model.variant", "variants in .*: `fp16`"),
        ("vae", {"variant": "ema"}, "model.variant", "got 'ema'; variants in .*: `fp16`"),
        ("vae.ckpt", {}, "model.pretrained", "pickles, which may run code"),
        ("text.safetensors", {}, "model.pretrained", "not a whole safetensors file"),
        ("lora.safetensors", {}, "model.pretrained", r"no autoencoder under LDM's names .*: lora\.up\.weight"),
        ("ldm.safetensors", {"variant": "fp16"}, "model.variant", "single file"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            check_model(str(tmp_path / name), "model.pretrained", **where)
        assert caught.value.key == key
    check_model("stabilityai/sd-vae-ft-mse", "model.pretrained", "vae")


def test_a_folder_whose_weights_lack_something_is_refused(tmp_path: Path) -> None:
    # diffusers would start what is missing at random.
    vae = network()
    vae.save_pretrained(tmp_path / "vae")
    state = load_file(tmp_path / "vae" / WEIGHTS)
    for changed, said in (
        ({k: v for k, v in state.items() if k != "quant_conv.weight"}, "missing: quant_conv.weight"),
        (state | {"encoder.more.weight": torch.ones(2)}, "unexpected: encoder.more.weight"),
        (state | {"quant_conv.weight": torch.ones(2, 2, 1, 1)}, "cannot be loaded"),
    ):
        save_file(changed, tmp_path / "vae" / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(UsageError, match=said):
            load(str(tmp_path / "vae"))


def test_weights_of_another_network_name_the_first_tensors_that_differ(tmp_path: Path) -> None:
    network(block_out_channels=(12,)).save_pretrained(tmp_path / "wide")
    save_single_file(network(latent_channels=3), tmp_path / "three.safetensors", preprocessing=None, scale_known=True)
    with pytest.raises(UsageError, match=r"decoder\.conv_in\.bias: given \(12,\), the network has \(8,\)\n.*\n.*\n  and \d+ more"):
        load_weights(network(), str(tmp_path / "wide"))
    with pytest.raises(UsageError, match=r"decoder\.conv_in\.weight: given \(8, 3, 3, 3\), the network has \(8, 4, 3, 3\)"):
        load_weights(network(), str(tmp_path / "three.safetensors"))
