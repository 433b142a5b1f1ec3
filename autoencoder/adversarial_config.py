"""The adversarial term: the discriminator, its start, and what keeps it from ruining a trained autoencoder. Torch-free."""

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from autoencoder.runtime.config import count
from autoencoder.runtime.errors import ConfigError, require
from autoencoder.runtime.own_class import OwnClass

PLATEAU = "plateau"


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """The auxiliary adversarial term: not part of the ELBO, logged apart from it."""

    name: Literal["none", "hinge", "non_saturating"] = "none"
    """`hinge` (Lim & Ye 2017) or `non_saturating` (Goodfellow et al. 2014): the losses of a discriminator of patches and of the decoder
    against it."""
    weight: float = 0.1
    """Weight of the decoder's adversarial loss; with `running` and `step` weighting, the norm of its gradient at the last layer as a
    share of that of pixels and perceptual term."""
    weighting: Literal["running", "step", "fixed"] = "running"
    """`running`: `weight` times a running geometric mean of the ratio of the two gradients' norms at the decoder's last convolution
    (Esser et al. 2021, eq. 7), from the steps before; `step`: times this step's own ratio, as LDM has it; `fixed`: `weight` itself."""
    ratio_bound: float | None = None
    """Largest ratio; null: none. LDM's is 1e4, for sums of absolute errors: a loss in nats is often above it, whatever the step."""
    memory_images: int | str = "2k"
    """Time constant of the running mean, in images (`running`)."""
    start: int | str = PLATEAU
    """Images seen when the discriminator begins to train (`50k`), or `plateau`: when the NLL has stopped falling."""
    plateau_images: int | str = "20k"
    """The NLL has stopped falling when its mean over so many images is less than 0.01 nats a value below that over as many before."""
    warmup_images: int | str = "10k"
    """Images over which the discriminator trains alone, before the decoder hears it."""
    ramp_images: int | str = "10k"
    """Images over which the decoder's adversarial weight then rises from zero."""
    gate: tuple[float, float] = (0.55, 0.85)
    """Running accuracies of the discriminator, of its patches: below the first the decoder does not hear it, above the second it stands
    still until the decoder has caught up; `[0, 1]` switches both off."""
    gate_images: int | str = "1k"
    """Time constant of the running accuracy, in images."""
    width: int = 64
    """Channels of the discriminator's first layer; each further one has twice as many, up to eight times."""
    layers: int = 3
    """Layers that halve the sides: a patch is judged by 16, 34, 70 and 142 pixels a side with 1, 2, 3 and 4 of them."""
    norm: Literal["group", "none", "spectral"] = "group"
    """`group`: GroupNorm behind the inner convolutions; `spectral`: spectral norm of all (Miyato et al. 2018); never BatchNorm."""
    lr: float = 2e-4
    """Peak learning rate of the discriminator's AdamW; it follows the schedule of `optimizer`."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Its moment decays."""
    clip_norm: float | None = 1.0
    """Largest norm of its gradient; null switches clipping off."""
    r1: float = 0.0
    """Gamma of the penalty gamma / 2 |grad D(x)|^2 on real images (Mescheder et al. 2018), D(x) the mean of an image's patches; 0: none."""
    r1_every: int = 16
    """Steps between two penalties, each then weighing as much as that many (Karras et al. 2020)."""
    own: OwnClass = field(default_factory=OwnClass)
    """A torch.nn.Module of your own in place of ours, constructed with channels=C besides its arguments, from images (B, C, H, W) to
    logits (B, 1, h, w) (docs/extending.md); `name` says the losses."""

    def __post_init__(self) -> None:
        require(0 <= self.weight < math.inf, "weight", self.weight, "give a finite weight, 0 or more")
        bounded = self.ratio_bound is None or 0 < self.ratio_bound < math.inf
        require(bounded, "ratio_bound", self.ratio_bound, "give a finite ratio above 0 or null")
        if self.start != PLATEAU:
            try:
                count(self.start, "start")
            except ConfigError:
                raise ConfigError("start", self.start, "give images seen, such as 50k, or `plateau`") from None
        for key, least in (("memory_images", 1), ("plateau_images", 1), ("warmup_images", 0), ("ramp_images", 0), ("gate_images", 1)):
            given = getattr(self, key)
            require(count(given, key) >= least, key, given, f"give at least {least}")
        low, high = self.gate
        require(0 <= low < high <= 1, "gate", self.gate, "give two accuracies from 0 to 1, the smaller first; [0, 1] for no gate")
        require(self.width >= 1, "width", self.width, "give at least 1")
        require(1 <= self.layers <= 8, "layers", self.layers, "give 1 to 8")
        require(self.lr > 0, "lr", self.lr, "give a learning rate above 0")
        require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "give two decays from 0 to below 1")
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "give a norm above 0 or null")
        require(0 <= self.r1 < math.inf, "r1", self.r1, "give a finite gamma, 0 or more")
        require(self.r1_every >= 1, "r1_every", self.r1_every, "give at least 1")
        if self.own.given:
            for key in ("width", "layers", "norm"):
                given, remedy = getattr(self, key), "it is of our discriminator, not of your own: leave it out, or give it in own.init_args"
                require(given == getattr(AdversarialConfig, key), key, given, remedy)

    @property
    def on(self) -> bool:
        """Whether there is a discriminator."""
        return self.name != "none"

    @property
    def heard_from(self) -> int:
        """The first count of images at which the decoder may hear the discriminator: of a plateau, after two windows and the warm-up."""
        begins = 2 * count(self.plateau_images, "plateau_images") if self.start == PLATEAU else count(self.start, "start")
        return begins + count(self.warmup_images, "warmup_images")

    @property
    def unused(self) -> list[str]:
        """Settings away from their defaults that are there without a discriminator."""
        usual = AdversarialConfig()
        return [] if self.on else [f.name for f in fields(self) if getattr(self, f.name) != getattr(usual, f.name)]

    @property
    def smallest_side(self) -> int:
        """Least side of an image that leaves one patch: each layer halves it, two more convolutions of 4 pixels take one off each. 1 for a
        network of the user's own, which is tried instead."""
        return 1 if self.own.given else 3 * 2**self.layers
