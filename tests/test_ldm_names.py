"""One file under LDM's names, there and back: bitwise, whatever the network; read off its tensors where nothing else tells."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file

from autoencoder.ldm_names import find_prefix, ldm_name, network_config
from autoencoder.model import AutoencoderKL, encode, stock_config
from autoencoder.runtime.errors import UsageError
from autoencoder.single_file import load_single_file, save_single_file, to_ldm

NETWORKS: dict[str, dict[str, Any]] = {
    "quant convs and attention": {"latent_channels": 3, "layers_per_block": 2, "scaling_factor": 0.18215},
    "like FLUX": {
        "latent_channels": 4, "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159
    },
    "attention in the lowest level, none in the middle": {
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "mid_block_add_attention": False,
    },
    "grey, one level": {"in_channels": 1, "out_channels": 1, "block_out_channels": (32,)},
}  # fmt: skip


def network(seed: int = 0, **given: Any) -> AutoencoderKL:
    torch.manual_seed(seed)
    shape = {"block_out_channels": (32, 64), "sample_size": 256, **given}
    levels = len(shape["block_out_channels"])
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    vae: AutoencoderKL = AutoencoderKL(**{**kinds, **shape})
    # Biases and gains that differ, so that none can be mistaken for another.
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter))
    return vae.eval()


def assert_same(one: AutoencoderKL, other: AutoencoderKL) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_export_and_import_is_bitwise_with_and_without_our_metadata(name: str, tmp_path: Path) -> None:
    vae = network(**NETWORKS[name])
    recipe = {"pixels": {"range": [-1.0, 1.0], "levels": 256, "channels": 3}, "crops": {"resolution": 16}}
    save_single_file(vae, tmp_path / "ours.safetensors", preprocessing=recipe, scale_known=True)
    ours = load_single_file(tmp_path / "ours.safetensors")
    assert_same(vae, ours.vae)
    assert (ours.preprocessing, ours.scale_known) == (recipe, True)
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in stock_config(vae).items()}
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in stock_config(ours.vae).items()} == listed

    save_file({f"first_stage_model.{k}": v.contiguous() for k, v in to_ldm(vae).items()}, tmp_path / "theirs.safetensors")
    theirs = load_single_file(tmp_path / "theirs.safetensors")
    assert_same(vae, theirs.vae)
    assert (theirs.preprocessing, theirs.scale_known) == (None, False)
    told = ("scaling_factor", "shift_factor")
    assert {k: v for k, v in stock_config(theirs.vae).items() if k not in told} == {k: v for k, v in listed.items() if k not in told}

    images = torch.rand(1, int(vae.config["in_channels"]), 16, 16) * 2 - 1
    stock, back = vae.encode(images).latent_dist, encode(theirs.vae, images)
    torch.testing.assert_close(back.mean, stock.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(back.logvar, stock.logvar, atol=1e-6, rtol=0)


def test_equal_autoencoders_are_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_single_file(network(), tmp_path / name, preprocessing={"pixels": {}, "crops": {}}, scale_known=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_that_is_there_stays_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vae.safetensors"
    path.write_bytes(b"the old one")

    def killed(given: Path, content: object) -> None:
        if isinstance(content, bytes):
            with given.open("wb") as file:
                file.write(content[:10])
        raise KeyboardInterrupt

    for owner, name in ((Path, "write_bytes"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(KeyboardInterrupt):
                save_single_file(network(), path, preprocessing=None, scale_known=True)
        assert path.read_bytes() == b"the old one"
    save_single_file(network(), path, preprocessing=None, scale_known=True)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert load_single_file(path).scale_known


def test_a_factor_that_nobody_knows_is_not_in_the_file(tmp_path: Path) -> None:
    save_single_file(network(), tmp_path / "a.safetensors", preprocessing=None, scale_known=False)
    found = load_single_file(tmp_path / "a.safetensors")
    assert (found.scale_known, found.vae.config["scaling_factor"]) == (False, 1.0)


def test_diffusers_own_conversion_reads_what_we_write() -> None:
    vae = network(**NETWORKS["quant convs and attention"])
    back = convert_ldm_vae_checkpoint({f"first_stage_model.{k}": v for k, v in to_ldm(vae).items()}, dict(vae.config))
    assert back.keys() == vae.state_dict().keys()
    assert all(torch.equal(back[k].reshape(v.shape), v) for k, v in vae.state_dict().items())


def test_names_are_those_that_ldms_readers_look_for() -> None:
    # ComfyUI and LDM's own code: levels of both halves are counted from the image's resolution.
    assert ldm_name("encoder.down_blocks.1.downsamplers.0.conv.weight", 4) == "encoder.down.1.downsample.conv.weight"
    assert ldm_name("decoder.up_blocks.0.resnets.2.conv_shortcut.bias", 4) == "decoder.up.3.block.2.nin_shortcut.bias"
    assert ldm_name("decoder.up_blocks.2.upsamplers.0.conv.bias", 4) == "decoder.up.1.upsample.conv.bias"
    assert ldm_name("encoder.mid_block.attentions.0.to_out.0.weight", 4) == "encoder.mid.attn_1.proj_out.weight"
    assert ldm_name("decoder.mid_block.resnets.1.norm1.weight", 4) == "decoder.mid.block_2.norm1.weight"
    assert ldm_name("decoder.conv_norm_out.weight", 4) == "decoder.norm_out.weight"
    assert ldm_name("post_quant_conv.weight", 4) == "post_quant_conv.weight"


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_only_the_autoencoder_is_taken_from_a_whole_checkpoint(prefix: str, tmp_path: Path) -> None:
    vae = network()
    named = {f"{prefix}{k}": v.contiguous() for k, v in to_ldm(vae).items()}
    others = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4), "cond_stage_model.logit_scale": torch.ones(1)}
    save_file({**named, **others, f"{prefix}loss.logvar": torch.zeros(1)}, tmp_path / "sd.safetensors")
    assert_same(vae, load_single_file(tmp_path / "sd.safetensors").vae)


@pytest.mark.parametrize("shape", [(0, 1), (0, 1, 2), (0, 1, 2, 3)])
def test_attention_may_be_matrices_or_convolutions(shape: tuple[int, ...], tmp_path: Path) -> None:
    vae = network()
    named = {k: v.reshape([*v.shape[:2], 1, 1][: len(shape)]) if "attn" in k and v.ndim == 4 else v for k, v in to_ldm(vae).items()}
    save_file({k: v.contiguous() for k, v in named.items()}, tmp_path / "a.safetensors")
    assert_same(vae, load_single_file(tmp_path / "a.safetensors").vae)


def test_half_precision_files_come_as_fp32(tmp_path: Path) -> None:
    vae = network()
    save_single_file(vae, tmp_path / "half.safetensors", preprocessing=None, scale_known=True, dtype=torch.float16)
    assert {v.dtype for v in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}
    read = load_single_file(tmp_path / "half.safetensors").vae.state_dict()
    assert all(torch.equal(read[k], v.half().float()) for k, v in vae.state_dict().items())


def test_what_is_no_autoencoder_of_this_architecture_is_told_apart(tmp_path: Path) -> None:
    vae = network()
    named = {k: v.contiguous() for k, v in to_ldm(vae).items()}
    path = tmp_path / "a.safetensors"

    def refused(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, path)
        with pytest.raises(UsageError) as caught:
            load_single_file(path)
        return str(caught.value)

    assert "no autoencoder under LDM's names" in refused({"model.diffusion_model.out.weight": torch.ones(1)})
    assert "names of diffusers" in refused(vae.state_dict())
    assert "VQ autoencoder" in refused({**named, "quantize.embedding.weight": torch.ones(2, 2)})
    assert "decoder.mid.block_1.conv1.weight: given none" in refused({k: v for k, v in named.items() if "decoder.mid.block_1" not in k})
    assert "encoder.extra.weight: given (3,), the network has none" in refused({**named, "encoder.extra.weight": torch.ones(3)})
    narrow = {**named, "quant_conv.weight": torch.ones(6, 8, 1, 1), "quant_conv.bias": torch.ones(6)}
    assert "quant_conv makes 6 channels for a decoder of 4" in refused(narrow)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_single_file(path)


def test_widths_that_32_groups_do_not_divide_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    save_file({k: v.contiguous() for k, v in to_ldm(vae).items()}, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="cannot be loaded as an AutoencoderKL"):
        load_single_file(tmp_path / "a.safetensors")
    save_single_file(vae, tmp_path / "ours.safetensors", preprocessing=None, scale_known=True)
    assert_same(vae, load_single_file(tmp_path / "ours.safetensors").vae)


def test_shapes_give_the_configuration_of_stable_diffusion() -> None:
    widths, shapes = (128, 256, 512, 512), {}
    for level, width in enumerate(widths):
        shapes |= {f"encoder.down.{level}.block.{i}.conv1.weight": (width, widths[max(level - 1, 0)], 3, 3) for i in range(2)}
    shapes |= {"encoder.conv_in.weight": (128, 3, 3, 3), "encoder.conv_out.weight": (8, 512, 3, 3), "quant_conv.weight": (8, 8, 1, 1)}
    shapes |= {"decoder.conv_in.weight": (512, 4, 3, 3), "decoder.conv_out.weight": (3, 128, 3, 3), "post_quant_conv.weight": (4, 4, 1, 1)}
    shapes |= {"encoder.mid.attn_1.q.weight": (512, 512, 1, 1)}
    found = network_config(shapes)
    assert found["block_out_channels"] == [128, 256, 512, 512]
    assert (found["layers_per_block"], found["latent_channels"], found["mid_block_add_attention"]) == (2, 4, True)
    assert found["down_block_types"] == ["DownEncoderBlock2D"] * 4
    assert find_prefix(f"vae.{name}" for name in shapes) == "vae."
