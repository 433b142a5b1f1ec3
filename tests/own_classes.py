"""Classes that tests give by `class_path`: whole ones, and ones with a fault each."""

import random
import sys

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


class Blurred(nn.Module):
    """Mean squared difference of a random convolution's features."""

    def __init__(self, width: int = 4, power: float = 2.0) -> None:
        super().__init__()
        self.features, self.power = nn.Conv2d(3, width, 3, padding=1), power

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        difference = self.features(images) - self.features(reconstruction)
        return difference.abs().pow(self.power).mean((1, 2, 3))


class Squared(nn.Module):
    """Mean squared error, as lpips and others give theirs: (B, 1, 1, 1)."""

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        return (images - reconstruction).square().mean((1, 2, 3), keepdim=True)


class Rooted(nn.Module):
    """A mean of roots, whose slope at zero is infinite."""

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        return (images - reconstruction).square().sqrt().mean((1, 2, 3))


class Faulty(nn.Module):
    """A distance with one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        error = (images - reconstruction).square()
        match self.fault:
            case "map":
                return error.mean(1)
            case "mean":
                return error.mean()
            case "tuple":
                return error, error  # type: ignore[return-value]
            case "raises":
                raise RuntimeError("no luck")
            case "infinite":
                return error.mean((1, 2, 3)) / images.abs().amax((1, 2, 3))
            case "cut":
                return error.detach().mean((1, 2, 3))
            case "flat":
                return (reconstruction * 0).sum((1, 2, 3)) + error.detach().mean((1, 2, 3))
            case "coupled":
                return error.mean((1, 2, 3)) / error.mean()
            case "random":
                return error.mean((1, 2, 3)) * torch.rand(())
            case "overwrites":
                return reconstruction.sub_(images).square().mean((1, 2, 3))
            case "overwrites images":
                return images.sub_(reconstruction).square().mean((1, 2, 3))
            case "backward":
                return NoWayBack.apply(error).mean((1, 2, 3))
            case "pairs":
                return error.mean((1, 2, 3)) if len(images) > 1 else images[1]
            case "leaves":
                sys.exit()
        raise AssertionError


class Drawn(nn.Module):
    """A distance, and with `channels` a discriminator, of weights that are drawn by some generator."""

    def __init__(self, by: str, channels: int = 3) -> None:
        super().__init__()
        draws = {
            "numpy": lambda: np.random.randn(1, channels, 3, 3),  # noqa: NPY002
            "random": lambda: [[[[random.random()] * 3] * 3] * channels],
            "system": lambda: np.random.default_rng().random((1, channels, 3, 3)),
        }
        self.weight = nn.Parameter(torch.tensor(draws[by](), dtype=torch.float32))

    def forward(self, images: Tensor, reconstruction: Tensor | None = None) -> Tensor:
        if reconstruction is None:
            return nn.functional.conv2d(images, self.weight)
        return nn.functional.conv2d(images - reconstruction, self.weight).square().mean((1, 2, 3))


class Lazy(nn.Module):
    """A layer that waits for its input."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.LazyConv2d(2, 3)


class Constant:
    """No module."""


class Critic(nn.Module):
    """A small discriminator; `norm` puts one of the layers that there are between its convolutions."""

    def __init__(self, channels: int, width: int = 8, norm: str = "group") -> None:
        super().__init__()
        first, last = nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.Conv2d(width, 1, 3, padding=1)
        if norm == "spectral":
            first = nn.utils.parametrizations.spectral_norm(first)
        if norm == "hook":
            first = nn.utils.spectral_norm(first)
        kinds = {"group": nn.GroupNorm(2, width), "batch": nn.BatchNorm2d(width), "sync": nn.SyncBatchNorm(width), "drop": nn.Dropout(0.5)}
        between = kinds.get(norm, nn.Identity())
        self.body = nn.Sequential(first, between, nn.LeakyReLU(0.2), last)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


class FaultyCritic(nn.Module):
    """A discriminator with one fault."""

    def __init__(self, channels: int, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.layer = nn.Conv2d(channels, 1, 3, padding=1)
        self.register_buffer("passes", torch.zeros(()))
        if fault == "unused":
            self.spare = nn.Conv2d(channels, 1, 1)
        if fault == "tied":
            self.again = self.layer
        if fault == "frozen":
            self.requires_grad_(False)

    def get_extra_state(self) -> object:
        return "text" if self.fault == "extra" else torch.zeros(1)

    def set_extra_state(self, state: object) -> None:
        pass

    def forward(self, images: Tensor) -> Tensor:
        logits = self.layer(images)
        match self.fault:
            case "score":
                return logits.mean((1, 2, 3))
            case "channels":
                return images
            case "cut":
                return logits.detach()
            case "infinite":
                return logits / 0
            case "coupled":
                return logits - logits.mean()
            case "counts":
                self.passes += 1
            case "once":
                return Once.apply(logits)
            case "overwrites":
                return self.layer(images.mul_(2))
            case "backward":
                return NoWayBack.apply(logits)
            case "pairs":
                return logits if len(images) > 1 else images[1]
        return logits


class NoWayBack(torch.autograd.Function):
    """The identity with a backward pass that fails."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: object, upstream: Tensor) -> Tensor:
        raise RuntimeError("no way back")


class Once(torch.autograd.Function):
    """The identity, as fused kernels often are: with a first derivative alone."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: object, upstream: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("no second derivative")
        return upstream.clone()


class OnFrozenFeatures(nn.Module):
    """A discriminator whose first layer is fixed, as that of one on another network's features."""

    def __init__(self, channels: int, norm: str = "none") -> None:
        super().__init__()
        self.features = nn.Conv2d(channels, 6, 3, stride=2, padding=1).requires_grad_(False)
        kinds = {"frozen": nn.BatchNorm2d(6), "untracked": nn.BatchNorm2d(6, track_running_stats=False)}
        self.norm = kinds.get(norm, nn.Identity()).requires_grad_(False)
        self.head = nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.features(images)).relu())


class Photos:
    """Coloured noise of some size; the argument says in which form it is given."""

    def __init__(
        self, count: int = 12, form: str = "array", side: int = 24, broken: int | None = None, fails_after: int | None = None
    ) -> None:
        self.count, self.form, self.side, self.broken, self.fails_after, self.looked = count, form, side, broken, fails_after, 0
        if form == "labelled":
            self.classes, self.in_memory = ["even", "odd"], True
        if form == "named":
            self.ids, self.fingerprint = [f"photo/{i}.png" for i in range(count)], "of mine"
        if form == "misnamed":
            self.ids = ["one"]
        if form == "labels":
            self.classes = [0, 1]
        if form == "synonyms":
            self.classes = [("even", "pair"), "odd"]
        if form == "outside":
            self.classes = ["even"]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> object:
        if self.fails_after is not None and self.looked >= self.fails_after:
            raise OSError(f"no photo {index} any more")
        self.looked += 1
        if index == self.broken or self.form == "raises":
            raise OSError(f"no photo {index}")
        generator = np.random.default_rng(index)
        pixels = generator.integers(0, 256, (self.side, self.side, 3), dtype=np.uint8)
        match self.form:
            case "grey":
                return pixels[:, :, 0]
            case "pil":
                return Image.fromarray(pixels)
            case "labelled" | "synonyms" | "outside":
                return Image.fromarray(pixels), np.int64(index % 2)
            case "channels first":
                return pixels.transpose(2, 0, 1)
            case "tensor":
                return torch.from_numpy(pixels).permute(2, 0, 1)
            case "float":
                return pixels.astype(np.float32) / 255
            case "bands":
                return np.concatenate([pixels, pixels], axis=2)
            case "text":
                return pixels, "odd"
            case "dictionary":
                return {"image": pixels}
        return pixels


class Uncounted:
    """No length."""

    def __getitem__(self, index: int) -> None: ...
