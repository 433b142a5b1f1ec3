"""What both stages configure alike: optimiser, training, validation, logging, checkpoints. Torch-free.

Durations count images seen, so that batch size and process count do not change a recipe.
"""

import re
from dataclasses import dataclass
from typing import Literal

from autoencoder.runtime.errors import ConfigError, require

ANEW = "optimiser, learning-rate schedule and image count start anew"
"""What a phase from other weights (`init_from`) does not take along."""


def count(value: int | str, key: str) -> int:
    """`1500`, `"20k"`, `"1.5M"` or `"1e6"` images as an integer."""
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]\+?\d+)?)\s*([kKmM]?)\s*", value)
    if match is None:
        raise ConfigError(key, value, "give a number of images such as 50000, 50k or 1.5M")
    return round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6}[match[2].lower()])


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimiser and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """`adamw`, or `muon`: Muon on the inner convolution and matrix weights, AdamW on everything else."""
    lr: float = 1e-3
    """Peak learning rate of AdamW (with `muon`: of the parameters that AdamW keeps)."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon, on its orthogonalised updates."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's moment decays."""
    muon_momentum: float = 0.95
    """Muon's (Nesterov) momentum."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on weights of two and more dimensions."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm, over the gradient of the mean loss; null switches clipping off."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the learning rates fall from peak to `final_lr` between warm-up and the last image."""
    warmup_images: int | str = 0
    """Images over which the learning rates rise linearly from zero."""
    final_lr: float = 0.0
    """Learning rate at the last image, as a share of the peak."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "lr", self.lr, "give a learning rate above 0")
        require(self.muon_lr > 0, "muon_lr", self.muon_lr, "give a learning rate above 0")
        require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "give two decays from 0 to below 1")
        require(0 <= self.muon_momentum < 1, "muon_momentum", self.muon_momentum, "give 0 to below 1")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "give 0 or more")
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "give a norm above 0 or null")
        require(count(self.warmup_images, "warmup_images") >= 0, "warmup_images", self.warmup_images, "give 0 or more")
        require(0 <= self.final_lr <= 1, "final_lr", self.final_lr, "give a share of the peak from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how large, how precise."""

    images: int | str = "1M"
    """Length of the run in training images seen (`200k`, `1.5M`); an optimiser step sees `batch_size` of them."""
    batch_size: int = 64
    """Images an optimiser step, over all processes and accumulation; the gradient is that of their mean loss."""
    microbatch: int | None = None
    """Most images that a process takes through the network at once; smaller than its share of `batch_size` accumulates."""
    seed: int = 0
    """Every random draw is a function of this and of how far the run has come."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision; weights, moments and losses stay fp32. `auto`: bf16 where the device is fast at it, else fp32."""
    ema_halflife_images: int | str | None = "20k"
    """Half-life of the weights' moving average; null keeps none. Early on it is shortened by `ema_rampup`."""
    ema_rampup: float = 0.05
    """The half-life is never longer than this share of the images seen (Karras et al. 2022)."""
    ema_lengths: list[float] | None = None
    """In place of a half-life, several averages: standard deviations of their profiles as shares of the run so far, such as [0.05, 0.1]
    (sigma_rel of Karras et al. 2024). Each is validated, the best is exported."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """A non-finite loss or gradient never moves the weights; then end the run with term, module and images named (`stop`), go on
    (`skip`), or go back to the newest sound checkpoint and on from there with a lower learning rate (`rollback`)."""
    rollbacks: int = 3
    """Most returns of a run to a checkpoint (`rollback`); one more ends it as `stop` does."""
    rollback_lr: float = 0.5
    """What each such return multiplies the learning rates by, from there on."""
    compile: bool = False
    """`torch.compile` the network: worth its start-up on GPUs, not on CPUs."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    deterministic: bool = False
    """On GPUs, choose only deterministic kernels (slower); on CPUs training is deterministic as it is."""
    max_hours: float | None = None
    """Write a checkpoint and leave with exit code 0 after this many hours; the same command goes on."""

    def __post_init__(self) -> None:
        require(count(self.images, "images") >= 1, "images", self.images, "give at least one image")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "give at least 1")
        require(self.microbatch is None or self.microbatch >= 1, "microbatch", self.microbatch, "give at least 1 or null")
        require(0 <= self.seed < 2**63, "seed", self.seed, "give an integer from 0 to 2**63 - 1")
        if self.ema_halflife_images is not None:
            halflife = count(self.ema_halflife_images, "ema_halflife_images")
            require(halflife > 0, "ema_halflife_images", self.ema_halflife_images, "give images above 0 or null")
        self._check_lengths()
        require(self.ema_rampup > 0, "ema_rampup", self.ema_rampup, "give a share above 0")
        require(self.rollbacks >= 1, "rollbacks", self.rollbacks, "give at least 1; train.on_nonfinite=stop makes none")
        require(0 < self.rollback_lr <= 1, "rollback_lr", self.rollback_lr, "give a factor above 0 and at most 1")
        require(self.max_hours is None or self.max_hours > 0, "max_hours", self.max_hours, "give hours above 0 or null")

    def _check_lengths(self) -> None:
        lengths = self.ema_lengths
        if lengths is None:
            return
        require(lengths != [], "ema_lengths", lengths, "give at least one length, or null")
        for length in lengths:
            require(0.005 <= length <= 0.288, "ema_lengths", length, "give shares of the run, 0.005 to 0.288 (the mean of all of it)")
        remedy = "lengths are told apart by three decimals; leave one out"
        require(len({f"{length:.3f}" for length in lengths}) == len(lengths), "ema_lengths", lengths, remedy)
        remedy = f"train.ema_lengths is {list(lengths)} beside it; give one of the two, and null to the other"
        require(self.ema_halflife_images is None, "ema_halflife_images", self.ema_halflife_images, remedy)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training."""

    every_images: int | str = "2k"
    """Images between two lines of `metrics.jsonl`; scalars are means over the steps in between."""
    validate_every_images: int | str = "50k"
    """Images between two validations (with image grids); one more at the end."""
    grid_images: int = 16
    """Validation images in each grid under `images/`."""
    trackers: list[str] = ("tensorboard",)  # type: ignore[assignment]
    """Trackers by the names that accelerate gives them (`tensorboard`, `wandb`, `aim`, ...); `[]` for none."""
    gradient_norms: bool = False
    """At each log line, the norm of the gradient of every weighted term apart: a forward and some backward passes more there."""
    progress: bool = True
    """A progress bar on a terminal, or plain lines into a file."""

    def __post_init__(self) -> None:
        for key in ("every_images", "validate_every_images"):
            require(count(getattr(self, key), key) >= 1, key, getattr(self, key), "give at least one image")
        require(self.grid_images >= 1, "grid_images", self.grid_images, "give at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is written, and how much of it stays."""

    every_images: int | str | None = "200k"
    """Images between two checkpoints; null: by minutes only."""
    every_minutes: float | None = 30.0
    """Minutes between two checkpoints; null: by images only. One more is written at the end and when stopped."""
    keep: int = 2
    """Newest complete checkpoints that stay."""

    def __post_init__(self) -> None:
        if self.every_images is not None:
            require(count(self.every_images, "every_images") >= 1, "every_images", self.every_images, "give at least one image or null")
        require(self.every_minutes is None or self.every_minutes > 0, "every_minutes", self.every_minutes, "give minutes above 0 or null")
        require(self.keep >= 1, "keep", self.keep, "give at least 1")
