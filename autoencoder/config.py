"""The autoencoder stage's configuration. Torch-free: every command's --help is built from it."""

from dataclasses import dataclass, field
from typing import Any, Literal

from autoencoder.equivariance_config import check_equivariance
from autoencoder.experimental.config import ExperimentalConfig, check_objective
from autoencoder.objective_config import ObjectiveConfig
from autoencoder.runtime.config import CheckpointConfig, LogConfig, OptimizerConfig, TrainConfig
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


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and how they are cropped."""

    source: str = "demo"
    """`demo` (scikit-image's photos), a folder (class folders become labels), a parquet or WebDataset glob, or a dataset's hub name."""
    split: str = "train"
    """Split of `source` to train on, where it has splits (hub names, `train/` and `validation/` folders)."""
    validation_source: str | None = None
    """Images to validate on; null: the `validation` or `test` split of `source`, else `validation_images` held out of it."""
    validation_images: int = 64
    """Most images that a validation looks at. Without a validation split they are held out, but never more than a tenth of the source."""
    validation_grid: int = 1
    """Validation crops an image: a k x k grid of crops around its centre."""
    image_column: str | None = None
    """Column that holds the images; null: the only image column."""
    label_column: str | None = None
    """Column that holds class labels; null: `label` where there is one."""
    resolution: int = 256
    """Side of the square training crops, in pixels."""
    channels: int = 3
    """Image channels: 3 (RGB) or 1 (grey)."""
    resize: int | None = None
    """Scale each image's short side to this many pixels before cropping; null crops at the image's own pixels."""
    crop: Literal["random", "center"] = "random"
    """Where training crops are taken; validation crops are central."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Range of a random factor (log-uniform) on the image's size before a random crop; below 1 shows more of it, smaller."""
    flip: bool = True
    """Mirror half of the training crops."""
    shuffle_channels: bool = False
    """Put the colour channels of each training crop into a random order: colours that few photos lack (the demo has six)."""
    filter: Literal["lanczos", "bicubic", "bilinear", "box"] = "lanczos"
    """Resampling filter of every resize (always antialiased)."""
    workers: int | None = None
    """Loader processes for each training process; null chooses by source and cores (none for in-memory sources)."""
    max_bad: int = 100
    """Unreadable images tolerated (each is skipped, counted and listed in `bad_images.jsonl`); one more ends the run."""

    def __post_init__(self) -> None:
        require(bool(self.source), "source", self.source, "give `demo`, a folder, a glob or a hub name")
        require(self.resolution >= 8, "resolution", self.resolution, "give at least 8 pixels")
        require(self.channels in (1, 3), "channels", self.channels, "give 3 (RGB) or 1 (grey)")
        require(
            self.resize is None or self.resize >= self.resolution,
            "resize",
            self.resize,
            f"give null or at least the resolution ({self.resolution})",
        )
        require(0 < self.zoom[0] <= self.zoom[1], "zoom", self.zoom, "give two factors above 0, the smaller first")
        require(self.validation_images >= 1, "validation_images", self.validation_images, "give at least 1")
        require(self.validation_grid >= 1, "validation_grid", self.validation_grid, "give at least 1")
        require(self.workers is None or self.workers >= 0, "workers", self.workers, "give 0 or more, or null")
        require(self.max_bad >= 0, "max_bad", self.max_bad, "give 0 or more")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: a diffusers AutoencoderKL."""

    preset: Literal["tiny", "kl-f4", "kl-f8", "kl-f16"] = "kl-f8"
    """Published widths (`kl-*`, LDM) or `tiny` for two cores."""
    pretrained: str | None = None
    """A diffusers folder or hub id to take network and weights from, instead of a preset."""
    subfolder: str | None = None
    """Subfolder of `pretrained` (such as `vae`)."""
    revision: str | None = None
    """Hub revision of `pretrained`."""
    variant: str | None = None
    """Weight variant of `pretrained` (such as `fp16`)."""
    latent_channels: int | None = None
    """Latent channels; null takes the preset's."""
    block_out_channels: tuple[int, ...] | None = None
    """Width of each level, each but the first at half the resolution; null takes the preset's."""
    layers_per_block: int | None = None
    """Residual blocks a level; null takes the preset's."""
    attention: bool | None = None
    """Self-attention in the middle block (quadratic in the latent's area); null takes the preset's."""
    norm_groups: int | None = None
    """Groups of every GroupNorm; must divide each width. Null takes the preset's."""

    def __post_init__(self) -> None:
        overrides = [
            k
            for k in ("latent_channels", "block_out_channels", "layers_per_block", "attention", "norm_groups")
            if getattr(self, k) is not None
        ]
        require(
            self.pretrained is None or not overrides,
            "pretrained",
            self.pretrained,
            f"a pretrained network keeps its own shape: leave out model.{', model.'.join(overrides)}",
        )
        require(self.latent_channels is None or self.latent_channels >= 1, "latent_channels", self.latent_channels, "give at least 1")
        require(self.layers_per_block is None or self.layers_per_block >= 1, "layers_per_block", self.layers_per_block, "give at least 1")
        widths = self.block_out_channels
        require(
            widths is None or (len(widths) >= 1 and all(w >= 1 for w in widths)), "block_out_channels", widths, "give one width a level"
        )
        require(self.norm_groups is None or self.norm_groups >= 1, "norm_groups", self.norm_groups, "give at least 1")
        shape = self.shape()
        groups = shape["norm_groups"]
        for width in shape["block_out_channels"]:
            require(
                width % groups == 0,
                "block_out_channels",
                widths,
                f"give widths that {groups} divides (GroupNorm), or another model.norm_groups",
            )

    def shape(self) -> dict[str, Any]:
        """The preset with the overrides in it."""
        named = {k: getattr(self, k, None) for k in PRESETS[self.preset]}
        return {"attention_levels": 0, "norm_groups": 32} | PRESETS[self.preset] | {k: v for k, v in named.items() if v is not None}

    def factor(self) -> int:
        """Downsampling factor of a preset network (a pretrained one's is known after loading)."""
        return 2 ** (len(self.shape()["block_out_channels"]) - 1)


@dataclass(frozen=True, kw_only=True)
class TrainAutoencoderConfig:
    """Train a KL-VAE on images."""

    out: str
    """The run's folder: new to start, the same again to go on."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Network."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Objective."""
    experimental: ExperimentalConfig = field(default_factory=ExperimentalConfig)
    """Experimental families, off by default."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training."""
    log: LogConfig = field(default_factory=LogConfig)
    """Logging and validation."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    init_from: str | None = None
    """Start a new phase from the weights of a run, a checkpoint or a diffusers folder of the same architecture."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on where the folder's newest complete checkpoint ends; `never` refuses a used folder."""
    preflight: bool = False
    """Do three real steps, a validation, a checkpoint and an export in a scratch folder, print memory and expected hours, stop."""

    def __post_init__(self) -> None:
        if self.model.pretrained is None:
            factor = self.model.factor()
            require(
                self.data.resolution % factor == 0,
                "data.resolution",
                self.data.resolution,
                f"give a multiple of {factor}, the downsampling factor of model.preset={self.model.preset}",
            )
            check_equivariance(
                self.objective.equivariance,
                latent_side=self.data.resolution // factor,
                factor=factor,
                least_image=self.objective.perceptual.least_side,
            )
        check_objective(self.experimental, self.objective)
        window = self.objective.perceptual.window
        require(
            self.objective.perceptual.name != "ssim" or window <= self.data.resolution,
            "objective.perceptual.window",
            window,
            f"give at most data.resolution ({self.data.resolution})",
        )
        smallest = self.objective.perceptual.least_side
        require(
            self.objective.perceptual.name != "lpips" or self.data.resolution >= smallest,
            "data.resolution",
            self.data.resolution,
            f"LPIPS with {self.objective.perceptual.net} needs at least {smallest} pixels",
        )
