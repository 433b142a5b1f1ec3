"""Weights under the names of the LDM code base (Rombach et al. 2022), which ComfyUI and others read from one file."""

import re

from torch import Tensor

from autoencoder.model import AutoencoderKL, stock_state

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


def to_ldm(vae: AutoencoderKL) -> dict[str, Tensor]:
    """The stock state dict of `vae` under LDM's names and shapes: up blocks counted from the output, attention as 1x1 convolutions."""
    levels = len(vae.config["block_out_channels"])
    named = {}
    for name, value in stock_state(vae).items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"\.up\.(\d+)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", name)
        if ".attn" in name:
            for ours, theirs in _ATTENTION:
                name = name.replace(ours, theirs)
            if value.ndim == 2:
                value = value[:, :, None, None]
        named[name] = value
    return named
