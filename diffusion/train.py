"""`train_diffusion`: parse, check, and only then import what is heavy."""

from pathlib import Path

from autoencoder.latents.check import check_latents
from autoencoder.model_path import check_model
from autoencoder.runtime import cli
from autoencoder.runtime.errors import ConfigError
from autoencoder.runtime.idle import AVERAGE, OPTIMIZER, Idle
from autoencoder.runtime.training_command import start
from diffusion.config import TrainDiffusionConfig

IDLE = (
    OPTIMIZER,
    AVERAGE,
    Idle(
        "process.name",
        lambda name: name != "vp",
        ("process.schedule",),
        "process.name is {value}, which has no table. Give process.name=vp with it, or leave it out",
    ),
    Idle(
        "process.times",
        lambda drawn: drawn != "logit_normal",
        ("process.t_mean", "process.t_std"),
        "process.times is {value}. Give process.times=logit_normal, or leave it out",
    ),
    Idle(
        "process.weight",
        lambda weight: weight != "min_snr",
        ("process.min_snr_gamma",),
        "process.weight is {value}. Give process.weight=min_snr with it, or leave it out",
    ),
)
"""What has no effect beside what."""


def check(config: TrainDiffusionConfig) -> None:
    """Refuse what can be refused without torch: missing folders."""
    check_latents(config.latents, "latents")
    if config.vae is not None:
        check_model(config.vae, "vae")
    elif not (Path(config.latents) / "vae" / "config.json").is_file():
        raise ConfigError("latents", config.latents, "no vae/ in it; give the autoencoder that made them as --vae")
    if config.init_from is not None and not Path(config.init_from).is_dir():
        raise ConfigError("init_from", config.init_from, "no such folder; give a diffusion run or one of its checkpoints")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(lambda: _train(argv))


def _train(argv: list[str] | None) -> int:
    config = cli.parse(
        TrainDiffusionConfig,
        argv,
        prog="firststage train_diffusion",
        description="Train a latent diffusion model.",
        stage="diffusion",
        idle=IDLE,
    )
    check(config)
    return start(config, "diffusion.training")
