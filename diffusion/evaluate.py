"""`evaluate_autoencoder` with a diffusion model for a prior: the autoencoder's command, and the account of both stages."""

from dataclasses import dataclass, field, fields
from typing import Literal

from autoencoder import evaluate
from autoencoder.evaluate import EvaluateConfig
from autoencoder.latents.check import check_latents
from autoencoder.runtime import cli
from autoencoder.runtime.errors import require
from autoencoder.runtime.idle import Idle
from diffusion.pipeline_path import check_pipeline


@dataclass(frozen=True, kw_only=True)
class AccountConfig:
    """The bound on -log p(x) with a diffusion model as the prior (docs/account.md)."""

    images: int = 256
    """Most crops to measure it on, spread evenly over the images evaluated."""
    draws: int = 32
    """Evaluations of the denoiser a crop: one half on each of two posterior samples."""
    labels: Literal["auto", "none"] = "auto"
    """`auto`: the bound is on -log p(x|y) for crops whose class is one of the pipeline's, by name; `none`: on -log p(x), by the null
    class."""
    latents: str | None = None
    """Latents of the same encoder and of other images than those measured: they choose where to draw, where to end, and the calibration.
    Null: the training rows of the run that `pipeline` names."""
    pilot_rows: int = 256
    """Most rows of them that are used, spread evenly."""
    price: bool = True
    """Measure what one more nat of rate buys; takes twice the evaluations more."""
    ode_rows: int = 0
    """Crops whose -log p(z) is also measured by the probability-flow ODE; slow."""
    ode_tolerance: float = 1e-4
    """Relative and absolute tolerance of its solver."""
    batch_size: int = 256
    """Evaluations of the denoiser at once: memory, not result."""

    def __post_init__(self) -> None:
        require(self.images >= 2, "images", self.images, "give at least 2: standard errors need them")
        require(self.draws >= 2 and self.draws % 2 == 0, "draws", self.draws, "give an even number from 2")
        require(self.pilot_rows >= 8, "pilot_rows", self.pilot_rows, "give at least 8")
        require(self.ode_rows >= 0, "ode_rows", self.ode_rows, "give 0 for none, or more")
        require(self.ode_tolerance > 0, "ode_tolerance", self.ode_tolerance, "give a tolerance above 0")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "give at least 1")


@dataclass(frozen=True, kw_only=True)
class EvaluatePairConfig(EvaluateConfig):
    """Measure an autoencoder on fixed central crops, alone or with the diffusion model of its latents."""

    pipeline: str | None = None
    """A finished diffusion run or its pipeline folder: the bound on -log p(x) with it as the prior, beside the standard normal."""
    account: AccountConfig = field(default_factory=AccountConfig)
    """That account."""


IDLE = (
    Idle(
        "pipeline",
        lambda given: given is None,
        tuple(f"account.{setting.name}" for setting in fields(AccountConfig)),
        "without a pipeline there is no account. Give --pipeline with it, or leave it out",
    ),
    Idle(
        "account.ode_rows",
        lambda rows: rows == 0,
        ("account.ode_tolerance",),
        "account.ode_rows is {value}. Give crops for the ODE with it, or leave it out",
    ),
)
"""What has no effect beside what."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(lambda: _evaluate(argv))


def _evaluate(argv: list[str] | None) -> int:
    config = cli.parse(
        EvaluatePairConfig,
        argv,
        prog="firststage evaluate_autoencoder",
        description="Measure an autoencoder on fixed central crops.",
        idle=IDLE,
    )
    if config.pipeline is None:
        return evaluate.run(config)
    check_pipeline(config.pipeline, "pipeline", hub=False)
    if config.account.latents is not None:
        check_latents(config.account.latents, "account.latents")
    evaluate.check(config)
    from diffusion.account import prepare
    from diffusion.account_text import section

    return evaluate.run(config, {"account": (lambda opened: prepare(config, opened), section)})
