"""The autoencoder stage's configuration. Torch-free: every command's --help is built from it."""

import os
from dataclasses import dataclass, field, fields
from typing import Literal

from autoencoder.adversarial_config import AdversarialConfig
from autoencoder.data.remote import check_local
from autoencoder.data_config import DataConfig
from autoencoder.equivariance_config import check_equivariance
from autoencoder.experimental.config import ExperimentalConfig, check_objective
from autoencoder.freezing import check_frozen
from autoencoder.lpips_weights import backbone_bands, check_side
from autoencoder.model_config import SHAPE, ModelConfig
from autoencoder.objective_config import ObjectiveConfig
from autoencoder.runtime.config import CheckpointConfig, LogConfig, OptimizerConfig, TrainConfig
from autoencoder.runtime.errors import require
from autoencoder.runtime.idle import AVERAGE, OPTIMIZER, Idle


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
    """Start a new phase from the weights of a run, a checkpoint, a diffusers folder or a single file of the same architecture; optimiser,
    learning-rate schedule and image count start anew. They replace those of `model.pretrained`; with `model.train=decoder` the latents
    stay those of `init_from`."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on where the folder's newest complete checkpoint ends; `never` refuses a used folder."""
    preflight: bool = False
    """Do three real steps, a validation, a checkpoint and an export in a scratch folder, print memory and expected hours, stop."""

    def __post_init__(self) -> None:
        check_local(self.out, "out")
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
        share = self.objective.equivariance.share
        remedy = "a transformed image has no mask of its missing pixels: give 0, or leave out data.nodata"
        require(share == 0 or self.data.nodata is None, "objective.equivariance.share", share, remedy)
        check_objective(self.experimental, self.objective)
        check_frozen(self.model, self.init_from, self.objective, self.experimental)
        window = self.objective.perceptual.window
        require(
            self.objective.perceptual.name != "ssim" or window <= self.data.resolution,
            "objective.perceptual.window",
            window,
            f"give at most data.resolution ({self.data.resolution})",
        )
        perceptual, adversarial = self.objective.perceptual, self.objective.adversarial
        if perceptual.name == "lpips":
            check_side(perceptual.net, self.data.resolution, key="data.resolution")
            backbone_bands(perceptual.bands, self.data.channels)
        if adversarial.on:
            least = adversarial.smallest_side
            remedy = f"give at least {least} pixels, or fewer objective.adversarial.layers: {adversarial.layers} of them leave no patch"
            require(self.data.resolution >= least, "data.resolution", self.data.resolution, remedy)
            remedy = "the discriminator's gradients have no loss scale: give bf16 or fp32"
            require(self.train.precision != "fp16", "train.precision", self.train.precision, remedy)


IDLE = (
    Idle(
        "model.pretrained",
        lambda pretrained: pretrained is not None,
        ("model.preset", *(f"model.{key}" for key in SHAPE)),
        "model.pretrained={value} brings a network of its own shape. Leave it out, or give model.pretrained=null for fresh weights",
    ),
    Idle(
        "objective.adversarial.name",
        lambda name: name == "none",
        (
            *(f"objective.adversarial.{f.name}" for f in fields(AdversarialConfig) if f.name not in ("name", "own")),
            "objective.adversarial.own.class_path",
        ),
        "objective.adversarial.name is none, so that there is no discriminator. Give a name (hinge or non_saturating), or leave it out",
    ),
    Idle(
        "objective.perceptual.name",
        lambda name: name != "own",
        ("objective.perceptual.own.class_path",),
        "objective.perceptual.name is {value}. If it is meant, give objective.perceptual.name=own with it, else leave it out",
    ),
    Idle(
        "objective.perceptual.name",
        lambda name: name == "none",
        ("objective.perceptual.weight",),
        "objective.perceptual.name is none, so that there is no distance. Give a name (ssim, lpips or own), or leave it out",
    ),
    Idle(
        "objective.equivariance.share",
        lambda share: share == 0,
        ("objective.equivariance.weight",),
        "objective.equivariance.share is 0, so that no image is transformed. Give a share (0.5, say), or leave it out",
    ),
    Idle(
        "objective.adversarial.r1",
        lambda gamma: gamma == 0,
        ("objective.adversarial.r1_every",),
        "objective.adversarial.r1 is 0, so that there is no penalty. Give a gamma above 0, or leave it out",
    ),
    Idle(
        "objective.likelihood.scale",
        lambda scale: scale != "analytic",
        ("objective.likelihood.decay",),
        "objective.likelihood.scale is {value}, which follows no running moment. Give objective.likelihood.scale=analytic, or leave it out",
    ),
    Idle(
        "objective.likelihood.scale",
        lambda scale: scale == "fixed",
        ("objective.likelihood.bounds",),
        "objective.likelihood.scale is fixed, and stays at objective.likelihood.value. Give another scale, or leave it out",
    ),
    Idle(
        "data.source",
        lambda source: source != "demo" and os.path.isdir(os.path.expanduser(source)),
        ("data.label_column",),
        "data.source={value} is a folder, which has no columns: its class folders are the labels. Leave it out",
    ),
    OPTIMIZER,
    AVERAGE,
)
"""What has no effect beside what."""
