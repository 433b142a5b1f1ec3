"""The diffusion stage as a task of the training loop."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from autoencoder.data.steps import Steps
from autoencoder.model import AutoencoderKL, decode, decoded_at_once, downsampling
from autoencoder.preview import Preview
from autoencoder.report.pictures import plain_grid
from autoencoder.runtime.alarms import AlarmNews
from autoencoder.runtime.checkpoint import HasTensors
from autoencoder.runtime.config import count
from diffusion import times
from diffusion.config import TrainDiffusionConfig
from diffusion.data import LatentBatch, LatentLoader, TrainRows, ValidationRows
from diffusion.denoiser import EDGES, NULL_CLASS, Denoiser
from diffusion.evaluation import NoiseLevel, draw_samples, mean_loss, validation_loss
from diffusion.process import build
from diffusion.space import LatentSpace


@dataclass
class ProcessTerms:
    """Per-image loss of a microbatch, (B,)."""

    loss: Tensor
    head: str
    """What the network gives, whose error is the one term."""
    named: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The one term."""
        return {self.head: self.loss}


class DiffusionTask:
    """Latents to the weighted error of the network's output; validation at fixed times and noise, with a grid of samples."""

    moving: tuple[str, ...] = ()

    def __init__(
        self,
        config: TrainDiffusionConfig,
        module: Denoiser,
        space: LatentSpace,
        train: TrainRows,
        validation: ValidationRows,
        vae: AutoencoderKL,
        accelerator: Accelerator,
        folder: Path,
        notes: Sequence[str] = (),
        preview: Preview | None = None,
    ) -> None:
        self.config, self.module, self.space, self.train_rows, self.validation_rows = config, module, space, train, validation
        self.accelerator, self.folder, self.notes, self.preview = accelerator, folder, list(notes), preview or Preview()
        self.vae = vae.to(accelerator.device).eval().requires_grad_(False)
        self.edges = EDGES
        self.process = build(config.process)
        self.steps = Steps(
            images=count(config.train.images, "train.images"),
            batch_size=config.train.batch_size,
            microbatch=config.train.microbatch,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )

    def loader(self, first_step: int) -> Iterable[tuple[int, list[LatentBatch]]]:
        pin_memory = self.accelerator.device.type == "cuda"
        return LatentLoader(self.train_rows, self.steps, first_step=first_step, workers=self.config.data.workers, pin_memory=pin_memory)

    def losses(self, module: nn.Module, batch: LatentBatch, images: int, *, probe: bool = False) -> ProcessTerms:
        predicted = module(self.process.noisy(batch.latents, batch.noise, batch.t), batch.t, batch.labels)
        error = self.process.squared_error(predicted, batch.latents, batch.noise, batch.t)
        if self.config.process.weight == "unit":
            return ProcessTerms(error, self.process.head)
        return ProcessTerms(times.weight(self.config.process, batch.t) * error, self.process.head, {"squared_error": error.detach()})

    def standing(self, step: int, images: int) -> Sequence[nn.Parameter]:
        return ()

    def finish_gradients(self, images: int) -> dict[str, Tensor]:
        return {}

    def update(self, means: dict[str, Tensor], images: int, found_inf: Tensor, lr_factor: float) -> None:
        pass

    def scalars(self, means: dict[str, float], images: int) -> dict[str, float]:
        return {}

    @property
    def batch_size(self) -> int:
        """Rows that go through the network at once outside training."""
        share = -(-self.config.train.batch_size // self.accelerator.num_processes)
        return min(share, self.config.train.microbatch or share)

    def noise_levels(self, module: Denoiser) -> list[NoiseLevel]:
        """The validation loss by time; every process calls it."""
        return validation_loss(
            module, self.validation_rows, self.process, self.config.process, accelerator=self.accelerator, batch_size=self.batch_size
        )

    def measure(self, module: Denoiser) -> dict[str, float]:
        module.eval()
        levels = self.noise_levels(module)
        found = {"loss": mean_loss(levels)}
        if self.config.process.weight != "unit":
            found["squared_error"] = sum(level.loss for level in levels) / len(levels)
        return found

    def held_out_loss(self, scalars: dict[str, float], images: int) -> float:
        return scalars["loss"]

    def validated(self, module: Denoiser, scalars: dict[str, float], step: int) -> None:
        if self.accelerator.is_main_process:
            self._draw(module, step)

    def images(self, latents: Tensor) -> Tensor:
        """Normalised latents (N, c, h, w) to pictures (N, 1 or 3, H, W), uint8 on the CPU, in batches."""
        device = self.accelerator.device
        chunks = latents.split(decoded_at_once(self.space.shape[1] * downsampling(self.vae)))
        with torch.no_grad():
            return torch.cat([self.preview.each(decode(self.vae, self.space.denormalize(z.to(device)))) for z in chunks])

    def sample_labels(self, number: int) -> Tensor:
        """Labels (N,) of the first samples: the classes in turn."""
        return torch.arange(number) % self.space.classes if self.space.classes else torch.full((number,), NULL_CLASS)

    def samples(self, module: nn.Module, labels: Tensor, guidance: float) -> Tensor:
        """Samples number 0 to N - 1 of the averaged weights, normalised latents (N, c, h, w)."""
        return draw_samples(
            module, labels, self.config.sampling, process=self.process, seed=self.config.train.seed, shape=self.space.shape,
            guidance=guidance, batch_size=self.batch_size,
        )  # fmt: skip

    def _draw(self, module: Denoiser, step: int) -> None:
        folder = self.folder / "images"
        folder.mkdir(exist_ok=True)
        samples = self.samples(module, self.sample_labels(self.config.log.grid_images), self.config.guidance)
        # A column a class, where there is room for it.
        classes = self.space.classes
        columns = max(1, 8 // classes) * classes if 0 < classes <= 10 else 8
        plain_grid(self.images(samples), columns=columns).save(folder / f"step-{step:08d}.png")

    def alarms(self) -> AlarmNews:
        return AlarmNews()

    def held(self) -> dict[str, HasTensors]:
        return {}

    def state(self) -> dict[str, Any]:
        return {"encoder_hash": self.space.encoder_hash, "notes": self.notes}

    def load_state(self, state: dict[str, Any]) -> None:
        # What was noted at earlier starts belongs to the weights as well.
        self.notes = list(dict.fromkeys([*state["notes"], *self.notes]))
