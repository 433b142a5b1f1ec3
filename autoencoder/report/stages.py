"""What the page says about the runs of each stage: its figures, its charts and how to read them."""

from dataclasses import dataclass, field
from typing import Literal

from autoencoder.report import quantities
from autoencoder.report.quantities import Quantity


@dataclass(frozen=True)
class Headline:
    """A figure that stands at the top of the page."""

    key: str
    label: str = ""
    """Empty takes the quantity's own."""
    beside: tuple[tuple[str, str], ...] = ()
    """(words, key) of figures of the evaluation that stand below in small type, as a scale."""


@dataclass(frozen=True)
class Section:
    """Charts under one heading, with a sentence on how to read them."""

    title: str
    note: str
    scalars: tuple[str, ...]
    drawn: tuple[str, ...] = ("train", "validation")
    """Phases whose lines are drawn."""
    endings: tuple[str, ...] = ()
    """Charts that follow those of the scalars, by their names in `curves.ENDINGS`."""
    own: Literal["", "bound", "objective", "latents", "account"] = ""
    """What stands there beside charts: how far the nats compare, the objective's terms, alarms and what the latents carry at the end of
    the run, or the account of both stages."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One of the two stages of latent diffusion."""

    key: Literal["autoencoder", "diffusion"]
    title: str
    headlines: tuple[Headline, ...]
    sections: tuple[Section, ...]
    grids: tuple[str, str, str]
    """Heading, note and alternative text of the pictures of each validation."""
    grid_figures: tuple[tuple[str, str], ...]
    """(key, words around {}) of the figures of its validation that stand below such a picture."""
    measures: dict[str, tuple[str, ...]]
    """Keys of the configuration, or of `latents.json` as `latents.KEY`, by what to say of runs that differ in one: they are not measured
    alike."""
    own: dict[str, Quantity] = field(default_factory=dict)
    """Scalars that mean something else here than elsewhere."""

    def quantity(self, key: str) -> Quantity:
        """The scalar as this stage means it."""
        return self.own.get(key) or quantities.quantity(key)


AUTOENCODER = Stage(
    key="autoencoder",
    title="Autoencoder",
    headlines=tuple(Headline(key) for key in ("psnr_db", "kl_nats", "nll_nats", "elbo_nats", "bits_per_dim", "ssim", "lpips")),
    sections=(
        Section(
            "Evidence lower bound",
            "Of pixels alone: ELBO = −NLL − KL at β = 1, in nats an image, whatever is optimised. Training values are means over training "
            "crops; validation values come from the averaged weights on fixed held-out crops. A start that would flatten the rest runs off "
            "its chart.",
            ("nll_nats", "kl_nats", "elbo_nats", "bits_per_dim"),
            own="bound",
        ),
        Section(
            "Auxiliary losses",
            "In the loss beside the bound and in no ELBO: distances in units of their own, before their weights. A discriminator that "
            "is right of every patch tells the decoder nothing; at one half it knows nothing.",
            ("perceptual", "equivariance", "adversarial", "adversarial_weight", "discriminator_loss", "discriminator_accuracy"),
        ),
        Section(
            "What is optimised",
            "The loss and the weights in it. Effective β is that of the β-VAE with this loss's minimum; at 1 it is the bound itself. "
            "Losses of runs with different objectives are not comparable. Several moving averages are compared by NLL + effective β × KL, "
            "nats an image.",
            ("loss", "kl_weight", "effective_beta", "running_kl_nats", "running_rmse", "charged_groups"),
            endings=("averages",),
            own="objective",
        ),
        Section(
            "Reconstruction",
            "Posterior mode, clamped and rounded to 8 bits, mean over held-out crops.",
            ("psnr_db", "ssim", "lpips", "sharpness"),
            ("validation",),
            ("trade-off",),
        ),
        Section(
            "Latents",
            "A unit is one channel at one site; it is active where the variance of its posterior mean over images exceeds 0.01. A site is "
            "active where one of its units is, a channel where that variance, averaged over its sites, exceeds 0.01: judged by that "
            "variance, not by the KL.",
            ("kl_nats_per_latent", "active_units", "share_near_prior", "shuffled_delta_nats"),
            own="latents",
        ),
        Section(
            "Under the hood",
            "Optimiser, throughput and what the model's parts settle on. Gradient norms of single terms are those of one step, with the "
            "term's weight and before clipping.",
            (
                "lr",
                "gradient_norm",
                *(f"gradient_norm_{part}" for part in quantities.PARTS),
                "discriminator_gradient_norm",
                "r1",
                "images_per_second",
                "likelihood_scale",
                "geometric_mean_scale",
            ),
        ),
    ),
    grids=(
        "Held-out crops",
        "In each pair of rows originals stand above their reconstructions (posterior mode).",
        "Held-out crops above their reconstructions",
    ),
    grid_figures=(("psnr_db", "{} dB"), ("kl_nats", "{} nats")),
    measures={
        "NLL and ELBO of these runs are not in the same nats": (
            "data.source",
            "data.own",
            "data.resolution",
            "data.channels",
            "data.resize",
            "objective.likelihood.name",
            "objective.likelihood.levels",
        ),
        "KL of these runs is to different priors": ("experimental.prior",),
    },
)

DIFFUSION = Stage(
    key="diffusion",
    title="Diffusion",
    headlines=(
        Headline("frechet", beside=(("untrained", "frechet_untrained"), ("training rows", "frechet_floor"))),
        Headline("loss", "Validation loss"),
    ),
    sections=(
        Section(
            "Loss",
            "Mean squared error of what the network gives (a flow's velocity, say) a latent value, in normalised latents, times the weight "
            "of its time where the run has one; without, a flow's network that always gives 0 has about 2. Training values are means over "
            "random times and noise; validation values come from the averaged weights at fixed times and noise. A "
            "start that would flatten the rest runs off its chart.",
            ("loss",),
            endings=("noise levels", "averages"),
        ),
        Section(
            "Account of both stages",
            "A bound on −log p(x) of the autoencoder with this diffusion model for its prior, beside the standard normal that it was "
            "trained with: nats an image, ± standard error over images. Where a level saves less than nothing the network is worse there "
            "than the standard normal's own best denoiser. Calibrated: the network's estimate, scaled by noise level and channel.",
            (),
            endings=("account",),
            own="account",
        ),
        Section("Under the hood", "Optimiser and throughput.", ("lr", "gradient_norm", "images_per_second")),
    ),
    grids=(
        "Samples over training",
        "Drawn with the averaged weights of each moment, from the same starting noise.",
        "Samples",
    ),
    grid_figures=(("loss", "loss {}"),),
    measures={
        "Losses and Fréchet distances of these runs are not measured alike": (
            "latents.encoder_hash", "latents.rows_hash", "latents.rows", "data.draw", "data.validation_rows",
            "process.name", "process.prediction", "process.schedule", "process.times", "process.t_mean", "process.t_std", "process.log_snr",
            "process.weight", "process.min_snr_gamma", "sampling.evaluate",
        ),
    },
    own={"loss": Quantity("loss", "Loss", "", 4)},
)  # fmt: skip

STAGES = (AUTOENCODER, DIFFUSION)
"""In the order of the page."""
