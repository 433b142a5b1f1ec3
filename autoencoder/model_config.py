"""The network's configuration: a preset's shape or a pretrained network, and what of it trains. Torch-free."""

from dataclasses import dataclass
from typing import Any, Literal

from autoencoder.runtime.errors import require

PRESETS: dict[str, dict[str, Any]] = {
    # Two CPU cores: the demo, tests and sketches. 32 groups of 32 channels would normalise every channel's contrast away.
    "tiny": {"block_out_channels": (32, 64, 64), "layers_per_block": 1, "latent_channels": 4, "attention": False, "norm_groups": 8},
    # Rombach et al. 2022, table 8 and the released configurations: ch 128, two blocks a level; f16 attends in its lowest level too.
    "kl-f4": {"block_out_channels": (128, 256, 512), "layers_per_block": 2, "latent_channels": 3, "attention": True},
    "kl-f8": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "attention": True},
    "kl-f16": {
        "block_out_channels": (128, 128, 256, 256, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "attention": True,
        "attention_levels": 1,
    },
}
SHAPE = ("block_out_channels", "layers_per_block", "attention", "norm_groups")
"""What a pretrained network keeps of its own."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: a diffusers AutoencoderKL."""

    preset: Literal["tiny", "kl-f4", "kl-f8", "kl-f16"] | None = "kl-f8"
    """Published widths (`kl-*`, LDM) or `tiny` for two cores; not beside `pretrained`, with which it may be null."""
    pretrained: str | None = None
    """What to take network and weights from, instead of a preset: a run, a checkpoint, a diffusers folder, a hub id, or a safetensors
    file with LDM's names."""
    subfolder: str | None = None
    """Subfolder of `pretrained` (such as `vae`)."""
    revision: str | None = None
    """Hub revision of `pretrained`."""
    variant: str | None = None
    """Weight variant of `pretrained` (such as `fp16`)."""
    train: Literal["all", "decoder", "encoder"] = "all"
    """What trains. `decoder`: encoder, both quant convs, scaling factor and all else that makes the latents stay as they are, so that
    latents and diffusion models of the pretrained network stay good. `encoder`: decoder and post_quant_conv stay."""
    scaling_factor: float | None = None
    """What diffusion models multiply the latents with, where what is frozen does not tell: a single file of others (0.18215 for Stable
    Diffusion 1 and 2, 0.13025 for SDXL, 0.3611 for FLUX)."""
    shift_factor: float | None = None
    """What they subtract before, with `scaling_factor` (0.1159 for FLUX; most have none)."""
    latent_channels: int | None = None
    """Latent channels; null takes the preset's, or the pretrained network's, which more of them widen."""
    block_out_channels: tuple[int, ...] | None = None
    """Width of each level, each but the first at half the resolution; null takes the preset's."""
    layers_per_block: int | None = None
    """Residual blocks a level; null takes the preset's."""
    attention: bool | None = None
    """Self-attention in the middle block (quadratic in the latent's area); null takes the preset's."""
    norm_groups: int | None = None
    """Groups of every GroupNorm; must divide each width. Null takes the preset's."""

    def __post_init__(self) -> None:
        if self.pretrained is None:
            remedy = f"give one of {', '.join(PRESETS)}, or model.pretrained for a network that there is"
            require(self.preset is not None, "preset", None, remedy)
        overrides = [k for k in SHAPE if getattr(self, k) is not None]
        require(
            self.pretrained is None or not overrides,
            "pretrained",
            self.pretrained,
            f"a pretrained network keeps its own shape: leave out model.{', model.'.join(overrides)}, or give null where a file has them",
        )
        for key in ("subfolder", "revision", "variant"):
            given = getattr(self, key)
            require(given is None or self.pretrained is not None, key, given, "leave it out, or give model.pretrained with it")
        self._check_scale()
        require(self.latent_channels is None or self.latent_channels >= 1, "latent_channels", self.latent_channels, "give at least 1")
        require(self.layers_per_block is None or self.layers_per_block >= 1, "layers_per_block", self.layers_per_block, "give at least 1")
        widths = self.block_out_channels
        require(
            widths is None or (len(widths) >= 1 and all(w >= 1 for w in widths)), "block_out_channels", widths, "give one width a level"
        )
        require(self.norm_groups is None or self.norm_groups >= 1, "norm_groups", self.norm_groups, "give at least 1")
        if self.pretrained is None:
            self._check_groups()

    def _check_groups(self) -> None:
        widths, shape = self.block_out_channels, self.shape()
        groups = shape["norm_groups"]
        for width in shape["block_out_channels"]:
            require(
                width % groups == 0,
                "block_out_channels",
                widths,
                f"give widths that {groups} divides (GroupNorm), or another model.norm_groups",
            )

    def _check_scale(self) -> None:
        factor, shift = self.scaling_factor, self.shift_factor
        require(
            factor is None or self.train == "decoder",
            "scaling_factor",
            factor,
            "leave it out: with model.train=all or encoder it is measured at the end of the run",
        )
        require(factor is None or factor > 0, "scaling_factor", factor, "give a factor above 0")
        require(shift is None or factor is not None, "shift_factor", shift, "give model.scaling_factor with it")

    def shape(self) -> dict[str, Any]:
        """The preset with the overrides in it (a pretrained network has a shape of its own)."""
        assert self.preset is not None
        named = {k: getattr(self, k) for k in (*SHAPE, "latent_channels")}
        return {"attention_levels": 0, "norm_groups": 32} | PRESETS[self.preset] | {k: v for k, v in named.items() if v is not None}

    def factor(self) -> int:
        """Downsampling factor of a preset network (a pretrained one's is known after loading)."""
        return 2 ** (len(self.shape()["block_out_channels"]) - 1)
