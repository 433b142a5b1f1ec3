"""`evaluate_autoencoder`: rate, distortion and quality of any diffusers autoencoder, with intervals and provenance."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autoencoder.data.paths import check_source
from autoencoder.data.remote import check_local
from autoencoder.data_config import check_own
from autoencoder.evaluation_file import open_report
from autoencoder.lpips_weights import check_side, lpips_weights_path
from autoencoder.model_path import check_model
from autoencoder.runtime import cli
from autoencoder.runtime.errors import require
from autoencoder.runtime.files import write_out
from autoencoder.runtime.own_class import OwnClass, find_class

if TYPE_CHECKING:
    from autoencoder.measuring import Section


@dataclass(frozen=True, kw_only=True)
class EvaluateDataConfig:
    """Images to measure on. What is left null is taken from the model's `preprocessing.json`, where it has one."""

    source: str | None = None
    """`demo`, a folder, a parquet or WebDataset glob, or a dataset's hub name; null takes the validation images of the run."""
    own: OwnClass = field(default_factory=OwnClass)
    """Instead of `source`, a class of your own whose objects have __len__ and __getitem__ (docs/extending.md)."""
    split: str | None = None
    """Split of `source`; null takes its validation or test split, or all of it where it has none."""
    images: int | None = None
    """Most images to measure on, chosen evenly; null takes all."""
    resolution: int | None = None
    """Side of the central crops in pixels."""
    resize: int | None = None
    """Scale each image's short side to this many pixels before cropping."""
    grid: int | None = None
    """Crops an image: a k x k grid around its centre."""
    filter: Literal["lanczos", "bicubic", "bilinear", "box"] | None = None
    """Resampling filter of a resize."""
    image_column: str | None = None
    """Column that holds the images; null: the only image column."""
    workers: int | None = None
    """Loader processes; null chooses by source and cores."""

    def __post_init__(self) -> None:
        require(self.images is None or self.images >= 1, "images", self.images, "give at least 1 or null")
        check_own(self.own, source=self.source, split=self.split, image_column=self.image_column)

    @property
    def given(self) -> str | None:
        """What names the images, if anything does."""
        return self.own.class_path or self.source


@dataclass(frozen=True, kw_only=True)
class EvaluateLikelihoodConfig:
    """p(x|z) for the rate-distortion account. Null takes what was saved beside the model; without either, NLL and ELBO are left out."""

    name: Literal["gaussian", "laplace", "discretized_logistic", "discretized_gaussian"] | None = None
    """Family; needs `scale`, which is to be fitted on training images, never on these."""
    scale: float | None = None
    """Its scale, in units where images span [-1, 1]."""
    levels: int = 256
    """Levels of a value (discretised families): 256 for 8-bit images, 65536 for 16-bit ones."""

    def __post_init__(self) -> None:
        require((self.name is None) == (self.scale is None), "scale", self.scale, "give name and scale together, or neither")
        require(self.scale is None or self.scale > 0, "scale", self.scale, "give a scale above 0")
        require(self.levels >= 2, "levels", self.levels, "give the levels that the images have, at least 2")


@dataclass(frozen=True, kw_only=True)
class GapConfig:
    """How far the ELBO is from log p(x), and whether the encoder or the family of posteriors is to blame. Off unless asked for."""

    samples: int = 0
    """Importance samples k a crop of IWAE-k; 0 leaves the gap out. Twenty and more tell something."""
    images: int = 32
    """Most crops to measure it on, spread evenly over the images evaluated; below 8 the verdict is left open."""
    refine_steps: int = 100
    """Steps of Adam that refine each crop's posterior; each takes it once through the decoder, forth and back."""
    lr: float = 0.1
    """Step size, in standard deviations of the encoder's posterior."""

    def __post_init__(self) -> None:
        require(self.samples == 0 or self.samples >= 2, "samples", self.samples, "give 0 for none, or at least 2")
        require(self.images >= 2, "images", self.images, "give at least 2: standard errors need them")
        require(self.refine_steps >= 2, "refine_steps", self.refine_steps, "give at least 2")
        require(self.lr > 0, "lr", self.lr, "give a step size above 0")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure an autoencoder on fixed central crops."""

    model: str
    """A run, a diffusers folder or a hub id."""
    data: EvaluateDataConfig = field(default_factory=EvaluateDataConfig)
    """Images."""
    out: str | None = None
    """JSON file for the figures with intervals and provenance; null prints the table only."""
    subfolder: str | None = None
    """Subfolder of `model` (such as `vae`)."""
    revision: str | None = None
    """Hub revision of `model`."""
    variant: str | None = None
    """Weight variant of `model` (such as `fp16`)."""
    likelihood: EvaluateLikelihoodConfig = field(default_factory=EvaluateLikelihoodConfig)
    """Likelihood."""
    gap: GapConfig = field(default_factory=GapConfig)
    """The gap between ELBO and log p(x)."""
    diffusability: bool = False
    """Measure how latents transform with the image (equivariance error), and where their energy lies (spectrum)."""
    headroom: bool = False
    """Measure the largest activation of every layer against where fp16 ends."""
    compare: str | None = None
    """Another evaluation's JSON, or a finished run for its own: mean differences to it over the same images, with standard errors.
    Refused where its nats mean others."""
    lpips: Literal["none", "vgg", "alex", "squeeze"] = "none"
    """LPIPS with this backbone beside PSNR and SSIM."""
    lpips_weights: str | None = None
    """The backbone's weights (.pth or .safetensors); null looks in torchvision's cache."""
    lpips_bands: tuple[int, ...] | None = None
    """Channels that LPIPS sees, one or three, counted from 0; null: the channel of grey images, the three of RGB, the first three of
    four."""
    batch_size: int = 64
    """Crops that go through the network at once."""
    seed: int = 0
    """Seed of the posterior samples and of the bootstrap."""

    def __post_init__(self) -> None:
        check_local(self.out, "out")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "give at least 1")
        if self.lpips != "none" and self.data.resolution is not None:
            check_side(self.lpips, self.data.resolution, key="data.resolution")
        unused = self.lpips_bands is not None and self.lpips == "none"
        require(not unused, "lpips_bands", self.lpips_bands, "leave it out, or give lpips=vgg, alex or squeeze with it")
        parent = Path(self.out).absolute().parent if self.out else Path()
        require(parent.is_dir(), "out", self.out, f"the folder {parent} does not exist; make it first")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(lambda: _evaluate(argv))


def _evaluate(argv: list[str] | None) -> int:
    return run(
        cli.parse(
            EvaluateConfig, argv, prog="firststage evaluate_autoencoder", description="Measure an autoencoder on fixed central crops."
        )
    )


def check(config: EvaluateConfig) -> None:
    """Refuse what can be refused without torch."""
    check_model(config.model, "model", config.subfolder, config.variant)
    if config.data.source is not None:
        check_source(config.data.source, "data.source")
    if config.data.own.given:
        find_class(config.data.own, "data.own")
    if config.lpips != "none":
        lpips_weights_path(config.lpips, config.lpips_weights, key="lpips_weights")
    if config.compare is not None:
        open_report(config.compare, "compare")


def run(config: EvaluateConfig, sections: "Mapping[str, tuple[Section, Callable[[dict[str, Any]], str]]] | None" = None) -> int:
    """Measure, print and write; `sections` by their key in the report, each with the text of what it is there."""
    check(config)
    from autoencoder import evaluation_text
    from autoencoder.measuring import measure

    sections = sections or {}
    report = measure(config, {name: section for name, (section, _) in sections.items()})
    print("\n\n".join([evaluation_text.whole(report), *(text(report[name]) for name, (_, text) in sections.items())]))
    if config.out is not None:
        write_out(config.out, json.dumps(report, indent=1))
        print(f"written to {config.out}")
    return 0
