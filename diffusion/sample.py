"""`sample`: images from a pipeline, as PNGs and a grid."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from autoencoder.data.remote import check_local
from autoencoder.runtime import cli
from autoencoder.runtime.errors import require
from diffusion.config import check_sampling
from diffusion.pipeline_path import check_pipeline


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Sample images from a DiTPipeline of flow matching, v or noise prediction; image n depends on seed and n alone.

    The batch size changes an image by rounding only: one level, in rare pixels.
    """

    pipeline: str
    """A finished diffusion run, a DiTPipeline folder or a hub id."""
    out: str
    """Folder for `000000.png`, ... and `grid.png`; images that are there already, from the same settings, are kept."""
    images: int = 16
    """Images to draw."""
    classes: list[str | int] | None = None
    """Class names or numbers, taken in turn; null: all classes in turn, or none where the model has none."""
    sampler: Literal["euler", "heun", "dpm++", "ddim"] = "heun"
    """`euler`: one evaluation of the network a step; `heun`: two, second order. By diffusers' schedulers: `dpm++`, one evaluation, second
    order; `ddim`, not of flows."""
    steps: int = 20
    """Steps from noise to latents."""
    guidance: float = 1.5
    """Classifier-free guidance; 1 is none."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """First and last t at which samples are guided (Kynkäänniemi et al. 2024); at others the network is evaluated once."""
    time_shift: float | None = None
    """Shift s of a flow's times, t -> s t / (1 + (s - 1) t): above 1 spends more steps on noisy latents (Esser et al. 2024). Null: the
    pipeline's."""
    seed: int = 0
    """Seed of the noise."""
    batch_size: int = 64
    """Images at once: memory, not result."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision of the network; the sampler's state and the decoder stay fp32."""
    columns: int = 8
    """Columns of the grid."""

    def __post_init__(self) -> None:
        check_local(self.out, "out")
        for key in ("images", "steps", "batch_size", "columns"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "give at least 1")
        require(self.guidance >= 1, "guidance", self.guidance, "give 1 (none) or more")
        check_sampling(self.sampler, self.steps, self.guidance, self.guidance_interval, self.time_shift)
        require(0 <= self.seed < 2**63, "seed", self.seed, "give an integer from 0 to 2**63 - 1")
        require(self.classes is None or len(self.classes) > 0, "classes", self.classes, "give at least one class, or null for all")
        require(not Path(self.out).is_file(), "out", self.out, "that is a file; give a folder")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(lambda: _sample(argv))


def _sample(argv: list[str] | None) -> int:
    config = cli.parse(SampleConfig, argv, prog="firststage sample", description="Sample images from a pipeline.")
    check_pipeline(config.pipeline, "pipeline")
    from diffusion.drawing import draw

    draw(config)
    return 0
