"""Which experimental families a run trains with. Torch-free."""

from dataclasses import dataclass
from typing import Literal

from autoencoder.objective_config import ObjectiveConfig
from autoencoder.runtime.config import count
from autoencoder.runtime.errors import require


@dataclass(frozen=True, kw_only=True)
class ExperimentalConfig:
    """Families beyond the Gaussian VAE. What they add to the exported network is not loadable in stock code."""

    posterior: Literal["gaussian", "flow"] = "gaussian"
    """q(z|x). `flow`: a coupling flow bends the Gaussian's noise, with the Gaussian's parameters as context
    (Rezende & Mohamed 2015; Dinh et al. 2017). Its latents cannot be encoded to a data set."""
    prior: Literal["standard_normal", "mixture", "vamp", "flow"] = "standard_normal"
    """p(z). `mixture`: learned Gaussians that all sites share; `vamp`: posteriors of learned pseudo-inputs (Tomczak & Welling 2018);
    `flow`: a learned coupling flow to N(0, I)."""
    flow_couplings: int = 8
    """Couplings of each flow (posterior or prior `flow`); eight change every latent four times."""
    flow_width: int = 64
    """Width of a coupling's network (posterior or prior `flow`)."""
    components: int = 64
    """Components of the prior `mixture`, pseudo-inputs of `vamp` (each is encoded once a step)."""
    iwae_samples: int = 1
    """Above 1: train on the importance-weighted bound of this many samples (Burda et al. 2016); each is decoded."""
    encoder_steps: int = 0
    """Steps on images of their own that move the encoder alone before each step that moves everything (He et al. 2019)."""
    encoder_steps_images: int | str = 0
    """Training images, from the first, over which such steps are taken."""

    def __post_init__(self) -> None:
        require(
            self.flow_couplings >= 2 and self.flow_couplings % 2 == 0,
            "flow_couplings",
            self.flow_couplings,
            "give an even number, 2 or more: a coupling changes half of the latents",
        )
        require(self.flow_width >= 1, "flow_width", self.flow_width, "give at least 1")
        require(self.components >= 1, "components", self.components, "give at least 1")
        self._check_sizes()
        require(self.iwae_samples >= 1, "iwae_samples", self.iwae_samples, "give at least 1")
        require(self.encoder_steps >= 0, "encoder_steps", self.encoder_steps, "give 0 or more")
        images = count(self.encoder_steps_images, "encoder_steps_images")
        require(
            (images > 0) == (self.encoder_steps > 0),
            "encoder_steps_images",
            self.encoder_steps_images,
            "give images above 0 with encoder_steps, 0 without",
        )

    def _check_sizes(self) -> None:
        flow, counted = "flow" in (self.posterior, self.prior), self.prior in ("mixture", "vamp")
        flows = "leave it out unless posterior or prior is `flow`; if it is meant, give experimental.posterior=flow or prior=flow with it"
        priors = "leave it out unless prior is `mixture` or `vamp`; if it is meant, give experimental.prior=mixture or prior=vamp with it"
        for key, used, remedy in (("flow_couplings", flow, flows), ("flow_width", flow, flows), ("components", counted, priors)):
            given = getattr(self, key)
            require(used or given == getattr(ExperimentalConfig, key), key, given, remedy)

    @property
    def families(self) -> bool:
        """Whether the rate is log q(z|x) - log p(z) of samples instead of the Gaussian's closed form."""
        return self.posterior != "gaussian" or self.prior != "standard_normal" or self.iwae_samples > 1

    @property
    def parts(self) -> bool:
        """Whether something is trained that a stock AutoencoderKL has no place for."""
        return self.posterior != "gaussian" or self.prior != "standard_normal"


def check_objective(config: ExperimentalConfig, objective: ObjectiveConfig) -> None:
    """Refuse what the families leave without a meaning; keys are those of `TrainAutoencoderConfig`."""
    defaults, kl = ExperimentalConfig(), objective.kl
    chosen = [key for key in ("posterior", "prior", "iwae_samples", "encoder_steps") if getattr(config, key) != getattr(defaults, key)]
    first = f"experimental.{chosen[0]}" if chosen else ""
    given = getattr(config, chosen[0]) if chosen else None
    require(
        not chosen or objective.convention == "elbo",
        first,
        given,
        f"experimental families are parts of the ELBO: leave it out, or give objective.convention `elbo`, not `{objective.convention}`",
    )
    require(
        not config.families or kl.free_bits == 0,
        "objective.kl.free_bits",
        kl.free_bits,
        f"{first}={given} has a rate for the image only, none for a channel or site: give 0",
    )
    if config.iwae_samples == 1:
        return
    samples = f"experimental.iwae_samples={config.iwae_samples}"
    require(kl.weight == 1, "objective.kl.weight", kl.weight, f"{samples} is a bound on log p(x) at weight 1 alone: give 1")
    require(kl.schedule == "constant", "objective.kl.schedule", kl.schedule, f"{samples} is a bound at weight 1 alone: give `constant`")
    require(kl.control == "none", "objective.kl.control", kl.control, f"{samples} is a bound at weight 1 alone: give `none`")
    require(
        objective.perceptual.name == "none",
        "objective.perceptual.name",
        objective.perceptual.name,
        f"{samples} weighs samples by p(x, z) / q(z|x), where a perceptual distance has no place: give `none`",
    )
    require(
        not objective.adversarial.on,
        "objective.adversarial.name",
        objective.adversarial.name,
        f"{samples} weighs samples by p(x, z) / q(z|x), where a discriminator has no place: give `none`",
    )
    require(
        objective.equivariance.share == 0,
        "objective.equivariance.share",
        objective.equivariance.share,
        f"{samples} weighs samples by p(x, z) / q(z|x), where transformed reconstructions have no place: give 0",
    )
