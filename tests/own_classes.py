"""Classes that tests give by `class_path`: whole ones, and ones with a fault each."""

import torch
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
        raise AssertionError


class Lazy(nn.Module):
    """A layer that waits for its input."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.LazyConv2d(2, 3)


class Constant:
    """No module."""
