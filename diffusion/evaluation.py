"""What a diffusion model is measured by: its loss at fixed times and noise, and how far its samples are from held-out latents."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from autoencoder.data.steps import part
from diffusion import sampling, times
from diffusion.config import ProcessConfig, SamplingConfig
from diffusion.data import ValidationRows
from diffusion.frechet import features, frechet_distance
from diffusion.process import Process

LEVELS = 8
"""Times at which every held-out row is validated."""


@dataclass
class NoiseLevel:
    """The validation loss at one time."""

    t: float
    loss: float
    """Mean squared error of the network's output, as it is."""
    weight: float
    """What it counts in training."""


def mean_loss(levels: Sequence[NoiseLevel]) -> float:
    """The training loss's expectation, by the middles of stretches of time that are drawn equally often."""
    return sum(level.weight * level.loss for level in levels) / len(levels)


@torch.no_grad()
def validation_loss(
    denoiser: nn.Module, rows: ValidationRows, process: Process, config: ProcessConfig, *, accelerator: Accelerator, batch_size: int
) -> list[NoiseLevel]:
    """Mean squared error of the network's output a latent value at `LEVELS` times, equally probable in training.

    Every process calls it with its share; all get the same figures.
    """
    levels = times.validation_times(config, LEVELS)
    device = accelerator.device
    sums = torch.zeros(LEVELS, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    share = part(range(len(rows)), accelerator.process_index, accelerator.num_processes)
    for start in range(0, len(share), batch_size):
        latents, noise, labels = (value.to(device) for value in rows.read(share[start : start + batch_size]))
        for level, t in enumerate(levels):
            at = torch.full((len(latents),), t, device=device)
            predicted = denoiser(process.noisy(latents, noise, at), at, labels)
            sums[level] += process.squared_error(predicted, latents, noise, at).to(sums.dtype).sum()
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(sums)
    weights = times.weight(config, torch.tensor(levels, dtype=torch.float64)).tolist()
    return [NoiseLevel(t, loss, weight) for t, loss, weight in zip(levels, (sums / len(rows)).tolist(), weights, strict=True)]


@dataclass
class TwoSample:
    """Fréchet distances to held-out latents."""

    samples: float
    """Of the model's samples."""
    floor: float
    """Of as many training latents: what a perfect model would have at this number."""
    untrained: float
    """Of the samples of an untrained model, whose output is 0 (`denoiser.initialize`): of a flow its starting noise."""
    number: int
    """Samples on either side."""


def two_sample(samples: Tensor, held_out: Tensor, training: Tensor, untrained: Tensor) -> TwoSample:
    """The distances of four sets of normalised latents (N, c, h, w): samples, held-out, training, and samples of an untrained model."""
    reference = features(held_out)
    own, floor, start = (frechet_distance(features(values), reference) for values in (samples, training, untrained))
    return TwoSample(own, floor, start, number=len(samples))


class Nothing(nn.Module):
    """An untrained network: its output is 0."""

    def forward(self, noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """As of `Denoiser`."""
        return torch.zeros_like(noisy)


def draw_samples(
    denoiser: nn.Module,
    labels: Tensor,
    config: SamplingConfig,
    *,
    process: Process,
    seed: int,
    shape: tuple[int, ...],
    guidance: float,
    batch_size: int,
) -> Tensor:
    """Samples number 0 to N - 1, normalised latents (N, c, h, w) on the CPU, for labels (N,), in batches."""
    device = next((parameter.device for parameter in denoiser.parameters()), torch.device("cpu"))
    drawn = []
    for first in range(0, len(labels), batch_size):
        chunk = labels[first : first + batch_size].to(device)
        start = sampling.noise(seed, range(first, first + len(chunk)), shape).to(device)
        latents = sampling.sample(
            denoiser, start, chunk, process=process, sampler=config.sampler, steps=config.steps, guidance=guidance,
            guidance_interval=config.guidance_interval, time_shift=config.time_shift,
        )  # fmt: skip
        drawn.append(latents.cpu())
    return torch.cat(drawn)


def nearest(samples: Tensor, chunks: Iterable[Tensor]) -> Tensor:
    """For each sample (N, c, h, w) the nearest by Euclidean distance of the candidates that come in chunks (M, c, h, w): (N, c, h, w)."""
    found, least = torch.zeros_like(samples), torch.full((len(samples),), float("inf"), dtype=torch.float64)
    for candidates in chunks:
        distances = torch.cdist(samples.flatten(1).double(), candidates.flatten(1).double())
        closest, index = distances.min(1)
        nearer = closest < least
        found[nearer], least[nearer] = candidates[index[nearer]], closest[nearer]
    return found
