"""The tensor names of the LDM code base (Rombach et al. 2022), which ComfyUI and others read from one file. Torch-free.

Up blocks are counted from the output, attention is made of 1x1 convolutions, and nothing but names and shapes tells the architecture.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

Shape = tuple[int, ...]

_RENAMED = (
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.attentions\.", r".down.\1.attn."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.attentions\.", r".up.\1.attn."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)
_ATTENTION = ((".group_norm.", ".norm."), (".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."), (".to_out.0.", ".proj_out."))

PREFIXES = ("", "first_stage_model.", "vae.")
"""Before the autoencoder's names: none in a file of its own; LDM's and others' in a whole diffusion checkpoint."""
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
"""First parts of the autoencoder's names; losses, discriminators and averages may lie beside them."""
_ENDS = tuple(f"{half}.{end}.weight" for half in ("encoder", "decoder") for end in ("conv_in", "conv_out"))
_GROUPS = 32
"""Groups of every GroupNorm in LDM's code."""
_SIDE = 256
"""`sample_size` where nothing tells it: side of the images that LDM's autoencoders were trained on."""


def ldm_name(name: str, levels: int) -> str:
    """LDM's name of a parameter of an AutoencoderKL of so many levels."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    name = re.sub(r"\.up\.(\d+)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", name)
    if ".attn" in name:
        for ours, theirs in _ATTENTION:
            name = name.replace(ours, theirs)
    return name


def find_prefix(names: Iterable[str]) -> str:
    """What stands before the autoencoder's names in a file.

    Raises:
        ValueError: there is no autoencoder under LDM's names; the message says what there is.
    """
    held = set(names)
    for prefix in PREFIXES:
        if all(f"{prefix}{end}" in held for end in _ENDS):
            if any(name.startswith(f"{prefix}quantize.") for name in held):
                raise ValueError("it holds a VQ autoencoder (quantize.*); give a KL autoencoder")
            if any(name.startswith(f"{prefix}encoder.down_blocks.") for name in held):
                raise ValueError("it has the names of diffusers; give the folder that its config.json lies in")
            return prefix
    listed = ", ".join(sorted(held)[:3]) or "nothing"
    raise ValueError(f"it holds no autoencoder under LDM's names (such as {_ENDS[0]}, bare or after {' or '.join(PREFIXES[1:])}): {listed}")


def network_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The configuration of the AutoencoderKL that has these tensors, by LDM's names without prefix. GroupNorm's groups are LDM's 32.

    Raises:
        ValueError: no AutoencoderKL has them.
    """
    width = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(_count(shapes, "encoder.down.{}.block.0.conv1.weight"))]
    if not width:
        raise ValueError("its encoder has no encoder.down.0.block.0.conv1.weight; give an autoencoder of LDM's architecture")
    levels, latents = len(width), shapes["decoder.conv_in.weight"][1]
    twice = {name: shapes[f"{name}.weight"][0] for name in ("encoder.conv_out", "quant_conv") if f"{name}.weight" in shapes}
    for name, made in twice.items():
        if made != 2 * latents:
            raise ValueError(
                f"{name} makes {made} channels for a decoder of {latents}; an AutoencoderKL makes a mean and a log-variance of each, "
                f"{2 * latents}"
            )
    attends = [[f"{half}.{i}.attn.0.q.weight" in shapes for i in range(levels)] for half in ("encoder.down", "decoder.up")]
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": [f"{'Attn' if a else ''}DownEncoderBlock2D" for a in attends[0]],
        "up_block_types": [f"{'Attn' if a else ''}UpDecoderBlock2D" for a in reversed(attends[1])],
        "block_out_channels": width,
        "layers_per_block": _count(shapes, "encoder.down.0.block.{}.conv1.weight"),
        "latent_channels": latents,
        "norm_num_groups": _GROUPS,
        "sample_size": _SIDE,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
    }


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """How many of these names there are, counted from 0 on."""
    n = 0
    while pattern.format(n) in shapes:
        n += 1
    return n


def differing(own: Mapping[str, Shape], given: Mapping[str, Shape], *, most: int = 3) -> list[str]:
    """The first tensors, by name, whose shapes differ between a network and what was given for it, each told in words."""
    names = [name for name in sorted(own.keys() | given.keys()) if own.get(name) != given.get(name)]
    told = [f"{name}: given {given.get(name, 'none')}, the network has {own.get(name, 'none')}" for name in names[:most]]
    return told + ([f"and {len(names) - most} more"] if len(names) > most else [])
