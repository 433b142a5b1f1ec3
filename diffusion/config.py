"""The diffusion stage's configuration. Torch-free: every command's --help is built from it."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from autoencoder.data.remote import check_local
from autoencoder.runtime.config import CheckpointConfig, LogConfig, OptimizerConfig, TrainConfig
from autoencoder.runtime.errors import require

MOST_CLASSES = 1000
"""Stock DiT pipelines have the null class at 1000, whatever the number of classes."""

NO_SHIFT = "a variance-preserving process has its noise levels in its table; give 1, or train a flow"
NO_DDIM = "DDIM is for variance-preserving processes; give euler, which is the same step of a flow"
BLIND_DDIM = "DDIM begins where the cosine table has no signal left, of which a predicted noise says nothing; give euler, the same step"

PRESETS: dict[str, dict[str, int]] = {
    # Two CPU cores: the demo, tests and sketches.
    "tiny": {"layers": 4, "heads": 3, "head_dim": 64},
    # Peebles & Xie 2023, table 1.
    "S": {"layers": 12, "heads": 6, "head_dim": 64},
    "B": {"layers": 12, "heads": 12, "head_dim": 64},
    "L": {"layers": 24, "heads": 16, "head_dim": 64},
    "XL": {"layers": 28, "heads": 16, "head_dim": 72},
}


@dataclass(frozen=True, kw_only=True)
class LatentsConfig:
    """How the stored moments become training latents."""

    draw: Literal["auto", "sample", "mean"] = "auto"
    """`sample`: a fresh draw of the posterior each time a row is seen; `mean`: its mean. `auto`: draws, where log-variances are stored."""
    validation_rows: int = 512
    """Most rows held out to validate on, never more than a tenth. All rows of an image (crops, mirrors) stay on one side, at least one
    image's, but in data sets of fewer than 100 images."""
    side: int | None = None
    """Train on the square latents of this side alone, of a data set that has several shapes; null: there is one."""
    workers: int | None = None
    """Loader processes for each training process; null: none on a CPU, two on a GPU."""

    def __post_init__(self) -> None:
        require(self.side is None or self.side >= 1, "side", self.side, "give at least 1, or null")
        require(self.validation_rows >= 1, "validation_rows", self.validation_rows, "give at least 1")
        require(self.workers is None or self.workers >= 0, "workers", self.workers, "give 0 or more, or null")


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """The network: a diffusers DiTTransformer2DModel (Peebles & Xie 2023)."""

    preset: Literal["tiny", "S", "B", "L", "XL"] = "S"
    """`S`, `B`, `L` and `XL` as published; `tiny` for two cores."""
    patch_size: int = 2
    """Latents a side of a token: halving it makes four times the tokens."""
    layers: int | None = None
    """Transformer blocks; null takes the preset's."""
    heads: int | None = None
    """Attention heads; null takes the preset's."""
    head_dim: int | None = None
    """Width of a head; the network's width is heads x head_dim. Null takes the preset's."""

    def __post_init__(self) -> None:
        require(self.patch_size >= 1, "patch_size", self.patch_size, "give at least 1")
        for key in ("layers", "heads", "head_dim"):
            require(getattr(self, key) is None or getattr(self, key) >= 1, key, getattr(self, key), "give at least 1")
        width = self.shape()["heads"] * self.shape()["head_dim"]
        require(width % 4 == 0, "head_dim", self.head_dim, f"heads x head_dim is {width}; give a multiple of 4 (position embedding)")

    def shape(self) -> dict[str, int]:
        """The preset with the overrides in it."""
        given: dict[str, Any] = {key: getattr(self, key) for key in PRESETS[self.preset]}
        return {**PRESETS[self.preset], **{key: value for key, value in given.items() if value is not None}}


@dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """How latents become noise, what of it the network gives, and at which times it is trained."""

    name: Literal["flow", "vp"] = "flow"
    """`flow`: straight paths, (1 - t) latents + t noise; `vp`: variance-preserving diffusion by a table of 1000 steps (Ho et al. 2020)."""
    prediction: Literal["velocity", "v", "epsilon"] | None = None
    """What the network gives: flow the `velocity`, noise - latents; vp `v` (Salimans & Ho 2022) or the noise, `epsilon`. Null: velocity,
    or v."""
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    """Table of vp, named as in diffusers: `linear` of DDPM and DiT, `scaled_linear` of Stable Diffusion, `squaredcos_cap_v2` the cosine."""
    times: Literal["logit_normal", "uniform", "likelihood"] = "logit_normal"
    """How t is drawn in training. `logit_normal`: most in the middle (Esser et al. 2024); `uniform`; `likelihood`: as often as the
    variational bound counts errors there, so that the plain loss is the bound's diffusion term in other units."""
    t_mean: float = 0.0
    """Mean of logit(t) of `logit_normal` (Esser et al. 2024, eq. 19); above 0 trains more on noisy latents."""
    t_std: float = 1.0
    """Standard deviation of logit(t) of `logit_normal`."""
    weight: Literal["unit", "min_snr", "likelihood"] = "unit"
    """How the squared error counts at t. `unit`: as it is; `min_snr`: an error of the latents by min(SNR, gamma) (Hang et al. 2023);
    `likelihood`: as in the variational bound, by importance weights (mean 1) to the times drawn."""
    min_snr_gamma: float = 5.0
    """Where `min_snr` stops counting errors of the latents by their SNR."""
    log_snr: tuple[float, float] | None = None
    """Log SNRs between which `likelihood` takes the bound; null: from -10 to 10, as far as the process goes."""

    def __post_init__(self) -> None:
        fits = {"flow": ("velocity",), "vp": ("v", "epsilon")}[self.name]
        remedy = f"{self.name} has {' or '.join(fits)}; give {'that' if len(fits) == 1 else 'one of them'}, or null"
        require(self.prediction is None or self.prediction in fits, "prediction", self.prediction, remedy)
        require(self.t_std > 0, "t_std", self.t_std, "give a standard deviation above 0")
        require(self.min_snr_gamma > 0, "min_snr_gamma", self.min_snr_gamma, "give an SNR above 0")
        remedy = "process.times=likelihood draws by the bound already; give unit with it, or weight other times"
        require(self.weight != "likelihood" or self.times != "likelihood", "weight", self.weight, remedy)
        if self.log_snr is not None:
            used = "likelihood" in (self.times, self.weight)
            remedy = "it would have no effect: neither process.times nor process.weight is likelihood. Give one of them, or leave it out"
            require(used, "log_snr", self.log_snr, remedy)
            ordered = -math.inf < self.log_snr[0] < self.log_snr[1] < math.inf
            require(ordered, "log_snr", self.log_snr, "give two finite log SNRs, the lower one first")

    @property
    def head(self) -> Literal["velocity", "v", "epsilon"]:
        """What the network gives."""
        return self.prediction or ("velocity" if self.name == "flow" else "v")

    @property
    def meaning(self) -> str:
        """What a network's output means, in words: weights of one meaning are none of another."""
        return f"flow, {self.head}" if self.name == "flow" else f"vp of the {self.schedule} table, {self.head}"


@dataclass(frozen=True, kw_only=True)
class ConditioningConfig:
    """What the network is told beside the noisy latents."""

    classes: Literal["auto", "none"] = "auto"
    """`auto`: the data set's labels where it has them; `none`: train without."""
    dropout: float = 0.1
    """Share of labels replaced by the null class, which guidance needs (Ho & Salimans 2022); at 0 samples are drawn without."""

    def __post_init__(self) -> None:
        require(0 <= self.dropout < 1, "dropout", self.dropout, "give a share from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How samples are drawn for grids and for the final evaluation."""

    sampler: Literal["euler", "heun", "dpm++", "ddim"] = "heun"
    """`euler`: one evaluation of the network a step; `heun`: two, second order. By diffusers' schedulers: `dpm++`, one evaluation, second
    order, which is what the pipeline has; `ddim`, for `vp` alone."""
    steps: int = 20
    """Steps from noise to latents."""
    guidance: float = 1.5
    """Classifier-free guidance of the grids; 1 is none, and without classes there is none."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """First and last t at which samples are guided (Kynkäänniemi et al. 2024); at others the network is evaluated once. Stock pipelines
    guide at all."""
    time_shift: float = 1.0
    """Shift s of a flow's times, t -> s t / (1 + (s - 1) t): above 1 spends more steps on noisy latents (Esser et al. 2024). The pipeline
    keeps it."""
    evaluate: int = 512
    """Samples of the final evaluation (unguided), at most as many as rows are held out: their Fréchet distance to these. 0: none."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "give at least 1")
        require(self.guidance >= 1, "guidance", self.guidance, "give 1 (none) or more")
        check_sampling(self.sampler, self.steps, self.guidance, self.guidance_interval, self.time_shift)
        require(self.evaluate == 0 or self.evaluate >= 2, "evaluate", self.evaluate, "give 0 or at least 2")


WHOLE = (0.0, 1.0)
"""The guidance interval of all times."""


def check_sampling(sampler: str, steps: int, guidance: float, interval: tuple[float, float], time_shift: float | None) -> None:
    """Raise ConfigError for settings of samples that cannot be, or that do nothing."""
    require(sampler in ("euler", "heun") or steps <= 1000, "steps", steps, f"{sampler} is diffusers' and has 1000 timesteps; give fewer")
    remedy = "give [low, high] with 0 <= low < high <= 1"
    require(0 <= interval[0] < interval[1] <= 1, "guidance_interval", list(interval), remedy)
    idle = guidance == 1 and tuple(interval) != WHOLE
    require(not idle, "guidance_interval", list(interval), "guidance is 1, so nothing is guided; give a guidance above 1, or leave it out")
    require(time_shift is None or time_shift > 0, "time_shift", time_shift, "give a shift above 0; 1 is none")


@dataclass(frozen=True, kw_only=True)
class TrainDiffusionConfig:
    """Train a latent diffusion model and export a stock pipeline."""

    latents: str
    """The folder that encode_dataset wrote."""
    out: str
    """The run's folder: new to start, the same again to go on."""
    vae: str | None = None
    """Autoencoder whose decoder draws and goes into the pipeline; null: the one in `latents`."""
    allow_vae_mismatch: bool = False
    """Go on, noted, where the latents are of another encoder than `vae`, or than those that the run began with."""
    data: LatentsConfig = field(default_factory=LatentsConfig)
    """Latents."""
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    """Conditioning."""
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    """Network."""
    process: ProcessConfig = field(default_factory=ProcessConfig)
    """Noise process."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Samples."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=2e-4, betas=(0.9, 0.95), schedule="constant", warmup_images="20k")
    )
    """Optimiser."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(images="20M", batch_size=256, ema_halflife_images=None, ema_lengths=[0.05, 0.1, 0.2])
    )
    """Training; images are rows of latents."""
    log: LogConfig = field(default_factory=lambda: LogConfig(every_images="20k", validate_every_images="1M"))
    """Logging and validation."""
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every_images="1M"))
    """Checkpoints."""
    init_from: str | None = None
    """Start from the weights of another diffusion run or checkpoint on latents of the same encoder; optimiser, learning-rate schedule and
    image count start anew."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on where the folder's newest complete checkpoint ends; `never` refuses a used folder."""
    preflight: bool = False
    """Do three real steps, a validation, a checkpoint and an export in a scratch folder, print memory and expected hours, stop."""

    def __post_init__(self) -> None:
        check_local(self.out, "out")
        sampling, is_flow = self.sampling, self.process.name == "flow"
        require(is_flow or sampling.time_shift == 1, "sampling.time_shift", sampling.time_shift, NO_SHIFT)
        require(not (is_flow and sampling.sampler == "ddim"), "sampling.sampler", sampling.sampler, NO_DDIM)
        blind = (self.process.schedule, self.process.prediction, sampling.sampler) == ("squaredcos_cap_v2", "epsilon", "ddim")
        require(not blind, "sampling.sampler", sampling.sampler, BLIND_DDIM)
        idle = tuple(sampling.guidance_interval) != WHOLE and (self.conditioning.dropout == 0 or self.conditioning.classes == "none")
        remedy = "without labels, or where none is ever dropped, nothing is guided; leave it out"
        require(not idle, "sampling.guidance_interval", list(sampling.guidance_interval), remedy)

    @property
    def guidance(self) -> float:
        """Guidance of samples: none where labels are never dropped, since the null class is then untrained."""
        return self.sampling.guidance if self.conditioning.dropout > 0 else 1.0
