"""A perceptual distance of the user's own."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder.own_module import build_module, called, check_alone, noise, tried
from autoencoder.runtime.errors import ConfigError
from autoencoder.runtime.own_class import OwnClass

KEY = "objective.perceptual.own"


class OwnDistance(nn.Module):
    """The module that `own` names as a distance: frozen, in evaluation mode for good, its result at least float32.

    It is called under autocast, as the network is, with images and reconstruction (B, C, H, W) in [-1, 1], of one dtype; what it gives has
    B values, (B,) or (B, 1, 1, 1). What its constructor draws at random is the same every time.

    Raises:
        ConfigError: a class that cannot be found or constructed, is no module, or is another one when constructed again.
    """

    def __init__(self, own: OwnClass) -> None:
        super().__init__()
        self.own = own
        self.module = build_module(own, KEY, seed=0).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "OwnDistance":
        """Stays as it is."""
        return super().train(False)

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """The distance, (B,)."""
        found: Tensor = self.module(images, reconstruction.to(images.dtype))
        return found.reshape(len(images)).to(torch.promote_types(found.dtype, torch.float32))

    def described(self) -> str:
        """Class, arguments and size, for a log."""
        numbers = sum(parameter.numel() for parameter in self.module.parameters())
        return f"perceptual distance: {self.own}, {numbers / 1e6:.2f} M parameters, frozen"

    def check(
        self,
        shape: tuple[int, int, int],
        device: torch.device,
        *,
        may_miss: bool = False,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        """Try it on a few images (C, H, W) under `autocast`, of noise and of zeros; with `may_miss` also where both sides are the same, as
        missing pixels are.

        Raises:
            ConfigError: it raises, changes its input, or gives anything but a finite value an image, with a finite gradient to the
                reconstruction that is not zero, or one that depends on the rest of the batch.
        """
        tried(lambda: self._check(shape, device, may_miss, autocast), (2, *shape), self._refuse)

    def _check(
        self,
        shape: tuple[int, int, int],
        device: torch.device,
        may_miss: bool,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    ) -> None:
        images, other = noise(2, *shape, seed=0, device=device), noise(2, *shape, seed=1, device=device)
        images[1] = 0
        reconstruction = 0.7 * images + 0.3 * other
        with autocast():
            self._check_values(images, reconstruction)
            gradient = self._gradient(images, reconstruction)
        if not gradient.flatten(1).abs().amax(1).gt(0).all():
            raise self._refuse("it has no gradient to the reconstruction; leave out no_grad, detach and rounding")
        if may_miss:
            half, row = reconstruction.clone(), shape[1] // 2
            half[:, :, :row] = images[:, :, :row]
            with autocast():
                for same in (half, images):
                    self._gradient(images, same)
        with torch.no_grad():
            alone = called(self, images[:1], reconstruction[:1], refuse=self._refuse)
            check_alone(self(images, reconstruction), alone, self._refuse)

    def _check_values(self, images: Tensor, reconstruction: Tensor) -> None:
        shape = tuple(images.shape)
        found = called(self.module, images, reconstruction, refuse=self._refuse)
        if found.shape[:1] != images.shape[:1] or found.numel() != len(images):
            raise self._refuse(f"images {shape} give {tuple(found.shape)}; give a value an image, {(len(images),)}")
        if not found.isfinite().all():
            raise self._refuse(f"it is not finite for images {shape} of noise and of zeros")

    def _gradient(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """To the reconstruction."""
        leaf = reconstruction.detach().requires_grad_()
        distance = self(images, leaf)
        if not distance.requires_grad:
            raise self._refuse("it has no gradient to the reconstruction; leave out no_grad, detach and rounding")
        (gradient,) = torch.autograd.grad(distance.sum(), leaf, allow_unused=True)
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        if not gradient.isfinite().all():
            same = " where the reconstruction equals the image, as missing pixels do; keep roots from zero by an epsilon inside"
            where = same if bool((leaf == images).any()) else ""
            raise self._refuse(f"its gradient to the reconstruction is not finite{where}")
        return gradient

    def _refuse(self, finding: str) -> ConfigError:
        remedy = f"{finding}. A distance maps (images, reconstruction), (B, C, H, W) in [-1, 1], to (B,)"
        return ConfigError(f"{KEY}.class_path", self.own.class_path, remedy)
