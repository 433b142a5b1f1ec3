"""The autoencoder stage's configuration. Torch-free: every command's --help is built from it."""

from dataclasses import dataclass, field
from typing import Literal

from autoencoder.experimental.config import ExperimentalConfig, check_objective
from autoencoder.freezing import check_frozen
from autoencoder.model_config import ModelConfig
from autoencoder.objective_config import ObjectiveConfig
from autoencoder.runtime.config import CheckpointConfig, LogConfig, OptimizerConfig, TrainConfig
from autoencoder.runtime.errors import require


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
    """Start a new phase from the weights of a run, a checkpoint, a diffusers folder or a single file of the same architecture. They replace
    those of `model.pretrained`; with `model.train=decoder` the latents stay those of `init_from`."""
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
        check_objective(self.experimental, self.objective)
        check_frozen(self.model, self.init_from, self.objective, self.experimental)
        window = self.objective.perceptual.window
        require(
            self.objective.perceptual.name != "ssim" or window <= self.data.resolution,
            "objective.perceptual.window",
            window,
            f"give at most data.resolution ({self.data.resolution})",
        )
        smallest = {"vgg": 16, "alex": 35, "squeeze": 17}[self.objective.perceptual.net]
        require(
            self.objective.perceptual.name != "lpips" or self.data.resolution >= smallest,
            "data.resolution",
            self.data.resolution,
            f"LPIPS with {self.objective.perceptual.net} needs at least {smallest} pixels",
        )
