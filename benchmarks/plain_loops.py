"""The two loops that `recipe.py` compares with: what people run, and the same with its mistakes mended. Nothing of ours but the network.

`plain`: fp32, L1 + KL, AdamW at a constant learning rate. `strong`: bf16 autocast, the same loss, AdamW with a tuned learning rate under a
cosine, warm-up, gradient clipping, a moving average of the weights.
"""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from autoencoder.model import AutoencoderKL

Photos = list[np.ndarray]


def read(folder: Path, side: int) -> Photos:
    """All photos of a folder, (H, W, 3) uint8, those with a side below `side` enlarged."""
    photos = []
    for file in sorted(folder.iterdir()):
        photo = Image.open(file).convert("RGB")
        scale = max(1.0, side / min(photo.size))
        photos.append(np.asarray(photo.resize([max(side, round(length * scale)) for length in photo.size]) if scale > 1 else photo))
    return photos


def crops(photos: Photos, batch: int, side: int, rng: np.random.Generator) -> Tensor:
    """Random crops, half of them mirrored, (B, 3, side, side) in [-1, 1]."""
    out = np.empty((batch, side, side, 3), np.uint8)
    for row in out:
        photo = photos[rng.integers(len(photos))]
        top, left = rng.integers(photo.shape[0] - side + 1), rng.integers(photo.shape[1] - side + 1)
        crop = photo[top : top + side, left : left + side]
        row[:] = crop[:, ::-1] if rng.random() < 0.5 else crop
    return torch.from_numpy(out).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(
    vae: AutoencoderKL,
    photos: Photos,
    *,
    strong: bool,
    lr: float,
    kl_weight: float,
    steps: int,
    batch: int,
    side: int,
    seed: int,
    say: Callable[[str], None] = print,
) -> tuple[AutoencoderKL, float]:
    """Train `vae` on sum |e| + `kl_weight` KL a mean image; the weights to use and the CPU seconds of a step."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    average = copy.deepcopy(vae).requires_grad_(False) if strong else vae
    begun = time.process_time()
    for step in range(steps):
        if strong:
            warm, fall = min(1.0, (step + 1) / max(1, steps // 20)), 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = lr * warm * fall
        images = crops(photos, batch, side, rng)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=strong):
            posterior = vae.encode(images).latent_dist
            reconstruction = vae.decode(posterior.sample(generator)).sample
        loss = ((images - reconstruction.float()).abs().sum() + kl_weight * posterior.kl().sum()) / batch
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if strong:
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1000.0)
        optimizer.step()
        if strong:
            # A twentieth of the steps so far, as ours: the random start is forgotten.
            decay = 0.5 ** (1 / max(1.0, min(0.05 * step, steps / 20)))
            torch._foreach_lerp_(list(average.parameters()), list(vae.parameters()), 1 - decay)
        if (step + 1) % max(1, steps // 20) == 0:
            say(f"{step + 1:,} of {steps:,} steps  loss {loss.item():.1f}  {(time.process_time() - begun) / (step + 1):.3f} CPU s a step")
    return average.eval(), (time.process_time() - begun) / steps
