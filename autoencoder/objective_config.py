"""What is minimised: likelihood, KL, perceptual and adversarial term. Torch-free."""

import math
from dataclasses import dataclass, field
from typing import Literal

from autoencoder.adversarial_config import AdversarialConfig
from autoencoder.equivariance_config import EquivarianceConfig
from autoencoder.lpips_weights import SMALLEST
from autoencoder.runtime.config import count
from autoencoder.runtime.errors import require
from autoencoder.runtime.own_class import OwnClass

AT_BOUND = 1.05
"""A scale or weight is at a bound that it comes within this factor of: a smooth bound is approached and never reached."""
LEAST_SPAN = 100
"""Least ratio of the bounds of a scale: closer ones would not both be out of the way in between."""


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """p(x|z): what makes the reconstruction error nats."""

    name: Literal["gaussian", "laplace", "discretized_logistic", "discretized_gaussian"] = "laplace"
    """Density of a pixel given the decoder's output; the discretised ones give bits/dim."""
    scale: Literal["analytic", "learned", "fixed", "pixel"] = "analytic"
    """`analytic`: follows the training error (its maximum-likelihood value); `learned`: a parameter; `fixed`: `value`;
    `pixel`: a scale of each value's own from the decoder, whose channels for it stock code does not know: stripped at export."""
    value: float = 0.1
    """The scale (sigma, b or s, in units where images span [-1, 1]) where `fixed`; where the others start."""
    levels: int = 256
    """Levels of a value (discretised likelihoods): 256 for 8-bit images, 65536 for 16-bit ones, high - low + 1 for a range of whole
    numbers. Continuous values have none."""
    decay: float = 0.9
    """How much of the analytic scale's running moment each optimiser step keeps."""
    bounds: tuple[float, float] = (1e-4, 100.0)
    """Least and largest scale that is not `fixed`; a run whose scale lies at one raises an alarm."""

    def __post_init__(self) -> None:
        require(0 < self.value < math.inf, "value", self.value, "give a finite scale above 0")
        require(self.levels >= 2, "levels", self.levels, "give the levels that the images have, at least 2")
        require(0 <= self.decay < 1, "decay", self.decay, "give 0 to below 1")
        low, high = self.bounds
        require(0 < low < high < math.inf, "bounds", self.bounds, "give two finite scales above 0, the smaller first")
        apart = self.scale == "fixed" or high >= LEAST_SPAN * low
        require(apart, "bounds", self.bounds, f"a scale nears them smoothly: give an upper one {LEAST_SPAN} times the lower, or more")
        inside = self.scale == "fixed" or low < self.value < high
        require(inside, "value", self.value, f"give a scale between the bounds, {low:g} and {high:g}")


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """The KL term: its weight over the run, and what holds it up or in place."""

    weight: float = 1.0
    """Final weight of the KL, read by `objective.convention` (in `elbo`: beta, nats against nats); with a `control`, where it starts."""
    schedule: Literal["constant", "linear", "cosine", "cyclical"] = "constant"
    """`linear` and `cosine` raise the weight from zero over `anneal_images`, `cyclical` anew in each of `cycles` (Fu et al. 2019)."""
    anneal_images: int | str = 0
    """Length of the rise in images seen (`linear`, `cosine`)."""
    cycles: int = 4
    """Equal parts of the run, each with a linear rise and a hold (`cyclical`)."""
    rise: float = 0.5
    """Share of a cycle that the rise takes (`cyclical`)."""
    free_bits: float = 0.0
    """Nats an image that each group may hold at no cost: sum_g max(free_bits, running mean of KL_g) (Kingma et al. 2016, eq. 15, whose mean
    is the batch's)."""
    free_bits_per: Literal["channel", "site"] = "channel"
    """A group: a latent channel over all sites, or a site over all channels."""
    control: Literal["none", "target", "geco"] = "none"
    """`target` moves the weight until the KL is `target`; `geco` until the error is `target_rmse` (Rezende & Viola 2018)."""
    target: float | None = None
    """KL to hold, nats an image (`target`)."""
    target_rmse: float | None = None
    """Root mean squared error to hold, where images span [-1, 1] (`geco`): 0.1 is a PSNR of 26 dB, half of it 6 dB more."""
    bounds: tuple[float, float] = (1e-8, 1e4)
    """Least and largest weight that a `control` may reach."""
    response_images: int | str = 100
    """Time constant of the mean that `target` compares with its target, half that of `geco`; other durations are in proportion. Where the
    weight swings, the network answers more slowly than the control expects (large batches, low learning rates): give more."""

    def __post_init__(self) -> None:
        require(0 <= self.weight < math.inf, "weight", self.weight, "give a finite weight, 0 or more")
        self._check_schedule()
        self._check_control()
        require(0 <= self.free_bits < math.inf, "free_bits", self.free_bits, "give finite nats, 0 or more")
        unused = self.free_bits == 0 and self.free_bits_per != "channel"
        require(not unused, "free_bits", self.free_bits, "give nats above 0 with free_bits_per `site`")

    def _check_schedule(self) -> None:
        images, rises = count(self.anneal_images, "anneal_images"), self.schedule in ("linear", "cosine")
        remedy = f"schedule `{self.schedule}` rises over them: give images above 0" if rises else _unused("schedule", "linear", "cosine")
        require((images > 0) == rises, "anneal_images", self.anneal_images, remedy)
        require(self.cycles >= 1, "cycles", self.cycles, "give at least 1")
        require(0 < self.rise <= 1, "rise", self.rise, "give a share of a cycle, above 0 and at most 1")
        cyclical = self.schedule == "cyclical"
        for key in ("cycles", "rise"):
            given = getattr(self, key)
            require(cyclical or given == getattr(KLConfig, key), key, given, _unused("schedule", "cyclical"))

    def _check_control(self) -> None:
        for control, key, unit in (("target", "target", "nats an image"), ("geco", "target_rmse", "where images span [-1, 1]")):
            given = getattr(self, key)
            if self.control == control:
                held = given is not None and 0 < given < math.inf
                require(held, key, given, f"control `{control}` needs what it is to hold: give a number above 0 ({unit})")
            else:
                require(given is None, key, given, _unused("control", control))
        low, high = self.bounds
        require(0 < low < high < math.inf, "bounds", self.bounds, "give two finite weights above 0, the smaller first")
        response = count(self.response_images, "response_images")
        require(response >= 1, "response_images", self.response_images, "give at least one image")
        if self.control == "none":
            # Its bounds and response are let pass: the saved configuration of a run has the defaults of its own version.
            return
        require(
            self.schedule == "constant", "schedule", self.schedule, f"control `{self.control}` moves the weight itself; give `constant`"
        )
        inside = low < self.weight < high
        require(inside, "weight", self.weight, f"a control starts from it: give a weight between its bounds, {low:g} and {high:g}")


def _unused(key: str, *values: str) -> str:
    """The remedy for a setting that only these values of `objective.kl.KEY` read."""
    words = " or ".join(f"`{value}`" for value in values)
    given = " or ".join(f"objective.kl.{key}={value}" for value in values)
    return f"leave it out unless {key} is {words}; if it is meant, give {given} with it"


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """The auxiliary perceptual term: not part of the ELBO, logged apart from it."""

    name: Literal["none", "ssim", "lpips", "own"] = "none"
    """`ssim`: 1 - SSIM, needs no weights. `lpips`: Zhang et al. 2018, needs a backbone's weights. `own`: the class that `own` names."""
    weight: float = 1.0
    """Weight of the distance, read by `objective.convention` (in `elbo`: nats a dimension at distance 1)."""
    net: Literal["vgg", "alex", "squeeze"] = "vgg"
    """LPIPS backbone."""
    weights: str | None = None
    """The backbone's weights (.pth or .safetensors); null looks in torchvision's cache; `random` for benchmarks."""
    bands: tuple[int, ...] | None = None
    """Channels that LPIPS sees, one (as grey) or three (as RGB), counted from 0; null: the channel of grey images, the three of RGB, the
    first three of four."""
    window: int = 7
    """Side of SSIM's Gaussian window, in pixels (odd, not above the resolution)."""
    own: OwnClass = field(default_factory=OwnClass)
    """A torch.nn.Module of your own, called with images and reconstruction (B, C, H, W) in [-1, 1] for a distance (B,)
    (docs/extending.md)."""

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, "give 0 or more")
        unused = self.bands is not None and self.name != "lpips"
        require(not unused, "bands", self.bands, "leave it out unless name is `lpips`: others see every channel")
        require(self.window >= 3 and self.window % 2 == 1, "window", self.window, "give an odd number from 3")
        if self.name == "own":
            require(self.own.given, "own.class_path", None, "name `own` needs the class: give objective.perceptual.own.class_path")

    @property
    def least_side(self) -> int:
        """Side in pixels of the smallest images that the distance is defined for; 1 for one of the user's own, which is tried instead."""
        return {"none": 1, "ssim": self.window, "lpips": SMALLEST[self.net], "own": 1}[self.name]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised."""

    convention: Literal["elbo", "ldm", "monai", "diffusers"] = "elbo"
    """How weights are read. `elbo`: NLL + beta KL + w D distance, in nats. `ldm`: (sum|e| + w D distance) / s + D ln s + w KL
    (Rombach et al. 2022). `monai`: mean|e| + w distance + w KL, as its tutorials have it, but on images in [-1, 1]: double the
    weights of a recipe for images in [0, 1]. `diffusers`: sum e**2 + w D distance + w KL, as its own trainer. D: an image's values."""
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    """p(x|z). In other conventions than `elbo` it does not enter the loss but is fitted and reported beside it."""
    kl: KLConfig = field(default_factory=KLConfig)
    """The KL term."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """The perceptual term."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """The adversarial term."""
    equivariance: EquivarianceConfig = field(default_factory=EquivarianceConfig)
    """Equivariance regularisation: an auxiliary loss beside the ELBO."""
    ldm_logvar: float = 0.0
    """LDM's `logvar`, the log of its scale s (convention `ldm`; 0 in every published run)."""

    def __post_init__(self) -> None:
        require(
            self.convention == "elbo" or self.likelihood.scale not in ("learned", "pixel"),
            "likelihood.scale",
            self.likelihood.scale,
            f"convention `{self.convention}` has no likelihood in its loss to learn a scale from; give `analytic` or `fixed`, "
            "or objective.convention=elbo",
        )
        remedy = "leave it out unless convention is `ldm`; if it is meant, give objective.convention=ldm with it"
        require(self.convention == "ldm" or self.ldm_logvar == 0, "ldm_logvar", self.ldm_logvar, remedy)
