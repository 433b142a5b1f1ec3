"""A classifier of CIFAR-10 trained here: its features are where samples are compared with photos, as no published network is at hand."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (32, 64, 128)
EPOCHS, BATCH, PEAK = 20, 64, 0.01
FEATURES = WIDTHS[-1]


class Classifier(nn.Module):
    """Six convolutions, a mean over sites, a linear layer: images (B, 3, 32, 32) in [-1, 1] to (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for i, width in enumerate(WIDTHS):
            for stride in (2 if i else 1, 1):
                layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.GroupNorm(8, width), nn.SiLU()]
                before = width
        self.body, self.head = nn.Sequential(*layers), nn.Linear(FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """(B, FEATURES)."""
        found: Tensor = self.body(images)
        return found.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(functional.dropout(self.features(images), 0.2, self.training))
        return logits


def read(file: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) in [-1, 1] and labels (N,) of a parquet file with columns `image` and `label`."""
    table = pq.read_table(file)
    pictures = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["image"].to_pylist()]
    return to_images(np.stack(pictures)), torch.tensor(table["label"].to_pylist())


def to_images(pixels: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def trained(file: Path, train: Path, test: Path) -> tuple[Classifier, float]:
    """The classifier of `file`, trained first where there is none; and its accuracy on `test`."""
    torch.manual_seed(0)
    network = Classifier()
    if file.exists():
        network.load_state_dict(load_file(file))
    else:
        _fit(network, *read(train))
        save_file(network.state_dict(), file)
    network.eval()
    images, labels = read(test)
    with torch.no_grad():
        right = [(network(x).argmax(1) == y).float().sum() for x, y in zip(images.split(500), labels.split(500), strict=True)]
    return network, float(sum(right)) / len(labels)


def _fit(network: Classifier, images: Tensor, labels: Tensor) -> None:
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps)
    rng = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images), generator=rng).split(BATCH)[: len(images) // BATCH]:
            batch = _augmented(images[chosen], rng)
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(batch)
            functional.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def _augmented(images: Tensor, rng: torch.Generator) -> Tensor:
    """Shifted by up to four pixels, together, and half of them mirrored."""
    dy, dx = torch.randint(0, 9, (2,), generator=rng).tolist()
    padded = functional.pad(images, (4, 4, 4, 4), mode="reflect")[:, :, dy : dy + 32, dx : dx + 32]
    mirrored = torch.rand(len(images), generator=rng) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), padded.flip(3), padded)


@torch.no_grad()
def features_of(network: Classifier, images: Tensor) -> np.ndarray:
    """Features (N, FEATURES) in float64."""
    return torch.cat([network.features(part) for part in images.split(500)]).double().numpy()
